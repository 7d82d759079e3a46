"""Where actors run: never where nothing is free, and visibly if not where they were asked for."""

import pytest

from cluster.placement import place_actors, place_when_free
from model.errors import InputError


def place(free=None, device="auto", actors=None, num_cpus=1.0, num_gpus=1.0, nodes=None):
    nodes = [free] if nodes is None else nodes
    return place_actors(nodes, device=device, actors=actors, num_cpus=num_cpus, num_gpus=num_gpus)


def test_gpus_where_the_cluster_has_them_else_cpus():
    on_gpus = place({"CPU": 16.0, "GPU": 2.0})
    assert (on_gpus.kind, on_gpus.actors, on_gpus.num_gpus, on_gpus.warnings) == ("cuda", 2, 1.0, ())
    assert place({"CPU": 16.0, "GPU": 2.0}, num_gpus=0.5).actors == 4
    on_cpus = place({"CPU": 4.0})
    assert (on_cpus.kind, on_cpus.actors, on_cpus.num_gpus, on_cpus.warnings) == ("cpu", 4, 0.0, ())
    assert place({"CPU": 16.0, "GPU": 2.0}, device="cpu").kind == "cpu"


@pytest.mark.parametrize("free", [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 0.5}])
def test_a_gpu_that_is_not_free_is_not_waited_for(free):
    placed = place(free, device="cuda")
    assert (placed.kind, placed.num_gpus) == ("cpu", 0.0)
    assert "using 'cpu'" in placed.warnings[0]
    # Nobody asked for one, but the cluster has one that is in use: also worth a word.
    assert len(place(free).warnings) == (1 if "GPU" in free else 0)


def test_no_more_actors_than_fit():
    placed = place({"CPU": 2.0}, actors=8)
    assert placed.actors == 2
    assert "8 actors" in placed.warnings[0]
    assert place({"CPU": 8.0}, actors=3).actors == 3


def test_a_full_cluster_is_an_error():
    with pytest.raises(InputError, match="--num-cpus") as caught:
        place({"CPU": 0.5})
    assert caught.value.code == "too_few_cpus"
    with pytest.raises(InputError):
        place({"CPU": 2.0}, actors=0)
    with pytest.raises(ValueError, match="unknown device"):
        place({"CPU": 2.0}, device="tpu")


def test_an_actor_lies_on_one_node():
    """What is left over on several nodes makes no room for one more."""
    small = [{"CPU": 2.0}, {"CPU": 3.0}]
    assert place(nodes=small).actors == 5
    assert place(nodes=small, num_cpus=2.0).actors == 2
    with pytest.raises(InputError, match="no node has more than 3"):
        place(nodes=small, num_cpus=4.0)
    with pytest.raises(InputError, match="no node has more than 0"):
        place(nodes=[])
    apart = [{"CPU": 8.0}, {"CPU": 1.0, "GPU": 2.0}]
    assert place(nodes=apart).actors == 1  # the second GPU has no CPU beside it
    found = place(nodes=apart, device="cuda", num_cpus=2.0)
    assert (found.kind, found.actors) == ("cpu", 4)
    assert "no node has both" in found.warnings[0]
    assert place(nodes=[{"CPU": 4.0, "GPU": 1.0}] * 2, device="cuda", num_gpus=2.0).kind == "cpu"


def test_an_absent_accelerator_is_a_warning_too(monkeypatch):
    monkeypatch.setattr("model.device.mps_available", lambda: False)
    placed = place({"CPU": 2.0}, device="mps")
    assert placed.kind == "cpu"
    assert "'mps' was requested" in placed.warnings[0]


def place_beside_others(total, free, patience_s=5.0, actors=1, said=None, device="auto"):
    """free: what is left at each look; the last stays."""
    looks = iter(free)
    left = []

    def look():
        left[:] = [next(looks, left[0] if left else None)]
        return [left[0]]

    return place_when_free(
        [total],
        look,
        device=device,
        actors=actors,
        num_cpus=1.0,
        num_gpus=1.0,
        patience_s=patience_s,
        say=(said if said is not None else []).append,
    )


@pytest.mark.parametrize(
    ("total", "free", "kind"),
    [
        ({"CPU": 4.0}, [{"CPU": 0.0}, {"CPU": 0.0}, {"CPU": 1.0}], "cpu"),
        ({"CPU": 4.0, "GPU": 1.0}, [{"CPU": 3.0, "GPU": 0.0}, {"CPU": 4.0, "GPU": 1.0}], "cuda"),
    ],
)
def test_what_a_command_before_is_about_to_give_back_is_waited_for(total, free, kind):
    """Not refused, and not put on the CPU, because the last command's actors still hold what they had."""
    said = []
    placed = place_beside_others(total, free, said=said)
    assert (placed.kind, placed.actors, placed.warnings) == (kind, 1, ())
    assert len(said) == 1
    assert "waiting up to 5 s" in said[0]


def test_others_are_not_waited_for_without_an_end():
    with pytest.raises(InputError, match="wait until others have finished"):
        place_beside_others({"CPU": 4.0}, [{"CPU": 0.0}], patience_s=0.2)
    fewer = place_beside_others({"CPU": 4.0}, [{"CPU": 2.0}], patience_s=0.2, actors=3)
    assert fewer.actors == 2
    assert "3 actors were requested and 2 fit" in fewer.warnings[0]
    on_cpu = place_beside_others({"CPU": 4.0, "GPU": 1.0}, [{"CPU": 4.0, "GPU": 0.0}], patience_s=0.2)
    assert on_cpu.kind == "cpu"
    assert "using 'cpu'" in on_cpu.warnings[0]
    # Also beside another warning, that fewer actors fit there.
    fewer_on_cpu = place_beside_others({"CPU": 4.0, "GPU": 2.0}, [{"CPU": 1.0, "GPU": 0.0}], patience_s=0.2, actors=2)
    assert "2 actors were requested and 1 fit" in fewer_on_cpu.warnings[0]
    assert "using 'cpu'" in fewer_on_cpu.warnings[1]


def test_nothing_is_waited_for_that_the_cluster_does_not_have():
    said = []
    # With the patience of an hour: these return at once or not at all.
    assert place_beside_others({"CPU": 4.0}, [{"CPU": 4.0}], 3600.0, device="cuda", said=said).kind == "cpu"
    assert place_beside_others({"CPU": 2.0}, [{"CPU": 2.0}], 3600.0, actors=8, said=said).actors == 2
    assert place_beside_others({"CPU": 4.0}, [{"CPU": 1.0}], 3600.0, actors=None, said=said).actors == 1
    with pytest.raises(InputError, match=r"no node has more than 0\.5"):
        place_beside_others({"CPU": 0.5}, [{"CPU": 0.5}], 3600.0)
    assert said == []
