"""Which replica groups run on which cluster."""

import pytest

from cluster.plan import GroupRequest, Scale, gpu_slots, plan_groups

CPU = GroupRequest(num_cpus=1.0)
GPU = GroupRequest(num_cpus=1.0, num_gpus=1.0)


def plan(resources, gpu=GPU, cpu=CPU, **options):
    return plan_groups(resources, gpu=gpu, cpu=cpu, **options)


def names(result):
    return [group.name for group in result.groups]


def test_a_gpu_is_used_alone_or_with_the_cpu_beside_it():
    result = plan({"CPU": 8, "GPU": 1})
    assert names(result) == ["gpu"]
    assert result.groups[0].num_gpus == 1.0
    assert (result.device_warning, result.warnings) == (None, ())
    assert names(plan({"CPU": 8, "GPU": 1}, hybrid=True)) == ["gpu", "cpu"]


def test_without_a_gpu_the_cpu_group_says_so():
    result = plan({"CPU": 2})
    assert names(result) == ["cpu"]
    assert result.groups[0].num_gpus == 0
    assert "no GPU" in result.device_warning
    assert result.warnings == (result.device_warning,)
    assert names(plan({"CPU": 2}, hybrid=True)) == ["cpu"]


def test_off_asks_for_no_gpu_and_misses_none():
    result = plan({"CPU": 2, "GPU": 4}, gpu_mode="off")
    assert (names(result), result.device_warning) == (["cpu"], None)


def test_fixed_shows_its_demand_and_is_served_by_the_cpu_meanwhile():
    result = plan({"CPU": 2}, gpu_mode="fixed")
    assert names(result) == ["gpu", "cpu"]
    assert result.device_warning is not None
    assert names(plan({"CPU": 2, "GPU": 1}, gpu_mode="fixed")) == ["gpu"]


def test_a_cluster_that_was_not_asked():
    result = plan(None)
    assert names(result) == ["cpu"]
    assert "not asked" in result.device_warning


def test_more_gpus_per_replica_than_there_are():
    result = plan({"CPU": 8, "GPU": 1}, gpu=GroupRequest(1.0, 2.0))
    assert names(result) == ["cpu"]
    assert "fewer than the 2" in result.device_warning


def test_replicas_are_cut_to_the_gpus():
    result = plan({"CPU": 8, "GPU": 2}, gpu=GroupRequest(1.0, 1.0, Scale(4, 4)))
    assert result.groups[0].scale == Scale(2, 2)
    assert "cut to 2" in result.warnings[0]
    assert result.device_warning is None
    growing = plan({"CPU": 8, "GPU": 2}, gpu=GroupRequest(1.0, 1.0, Scale(1, 4)))
    assert growing.groups[0].scale == Scale(1, 2)
    kept = plan({"CPU": 8, "GPU": 2}, gpu=GroupRequest(1.0, 0.5, Scale(4, 4)))
    assert (kept.groups[0].scale, kept.warnings) == (Scale(4, 4), ())


def test_too_few_cpus_is_a_warning():
    result = plan({"CPU": 2}, cpu=GroupRequest(1.0, scale=Scale(2, 2)), gpu_mode="off", reserved_cpus=0.1)
    assert "2.1 CPUs" in result.warnings[0]
    assert names(result) == ["cpu"]


@pytest.mark.parametrize(
    ("gpus", "each", "slots"),
    [(0, 1, 0), (1, 1, 1), (1, 0.5, 2), (2, 0.4, 4), (1, 0.1, 10), (1, 0.3, 3), (4, 2, 2), (3, 2, 1), (1, 2, 0)],
)
def test_slots(gpus, each, slots):
    assert gpu_slots(gpus, each) == slots


def test_a_gpu_group_without_gpus_is_a_mistake():
    with pytest.raises(ValueError, match="num_gpus > 0"):
        gpu_slots(1, 0)
