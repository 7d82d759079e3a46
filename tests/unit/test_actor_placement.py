"""Where actors run: never where nothing is free, and visibly if not where they were asked for."""

import pytest

from cluster.placement import place_actors
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
