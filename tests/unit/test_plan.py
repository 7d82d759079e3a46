"""Which replica groups exist on which cluster."""

import pytest

from cluster.plan import GroupRequest, Scale, gpu_slots, plan_groups, why_no_gpu

CPU = GroupRequest(num_cpus=1.0)
GPU = GroupRequest(num_cpus=1.0, num_gpus=1.0)


def plan(resources, gpu=GPU, cpu=CPU, **options):
    return plan_groups(resources, gpu=gpu, cpu=cpu, **options)


def names(result):
    return [group.name for group in result.groups]


@pytest.mark.parametrize("resources", [None, {"CPU": 8}, {"CPU": 8, "GPU": 1}])
@pytest.mark.parametrize("mode", ["auto", "fixed"])
def test_both_groups_exist_whatever_the_cluster_has_now(resources, mode):
    result = plan(resources, gpu_mode=mode)
    assert names(result) == ["gpu", "cpu"]
    assert result.group("gpu").follows_gpus is (mode == "auto")
    assert (result.group("gpu").num_gpus, result.group("cpu").num_gpus) == (1.0, 0.0)
    assert result.warnings == ()


def test_off_asks_for_no_gpu():
    assert names(plan({"CPU": 2, "GPU": 4}, gpu_mode="off")) == ["cpu"]


def test_what_is_said_where_no_gpu_replica_answers():
    assert why_no_gpu({"CPU": 2}, 1) == "the cluster has no GPU: forecasts run on the CPU"
    assert "fewer than the 2" in why_no_gpu({"GPU": 1}, 2)
    assert "no live replica" in why_no_gpu({"GPU": 1}, 0.5)
    assert "not known" in why_no_gpu(None, 1)


def test_too_few_cpus_is_a_warning():
    cpu = GroupRequest(1.0, scale=Scale(2, 2))
    assert "2.1 CPUs" in plan({"CPU": 2}, cpu=cpu, reserved_cpus=0.1).warnings[0]
    # What sleeps, or waits for a GPU, takes none; what shows its demand does.
    assert plan({"CPU": 2}, cpu=cpu).warnings == ()
    assert plan({"CPU": 1}, cpu=GroupRequest(2.0, scale=Scale(0, 4))).warnings == ()
    assert "3 CPUs" in plan({"CPU": 2}, cpu=cpu, gpu_mode="fixed").warnings[0]
    assert "3 CPUs" in plan({"CPU": 2, "GPU": 1}, cpu=cpu).warnings[0]


@pytest.mark.parametrize(
    ("gpus", "each", "slots"),
    [(0, 1, 0), (1, 1, 1), (1, 0.5, 2), (2, 0.4, 4), (1, 0.1, 10), (1, 0.3, 3), (4, 2, 2), (3, 2, 1), (1, 2, 0)],
)
def test_slots(gpus, each, slots):
    assert gpu_slots(gpus, each) == slots


def test_a_gpu_group_without_gpus_is_a_mistake():
    with pytest.raises(ValueError, match="num_gpus > 0"):
        gpu_slots(1, 0)
