"""How many replicas a group should have."""

from types import SimpleNamespace

import pytest
import ray

from serve_app.scaling import GroupScaling


class Controller:
    """Asks a policy as Serve does, at times that the test chooses; what it says is what there is then."""

    def __init__(self, monkeypatch, gpus=0.0, **policy):
        self.now, self.gpus, self.replicas = 0.0, gpus, 0
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": self.gpus})
        self.policy = GroupScaling(**policy, clock=lambda: self.now)

    def __call__(self, now, *work, queued=0):
        self.now = now
        series = {f"r{i}": [SimpleNamespace(value=value)] for i, value in enumerate(work)}
        ctx = SimpleNamespace(
            raw_metrics={"work": series}, total_queued_requests=queued, target_num_replicas=self.replicas
        )
        self.replicas, state = self.policy(ctx)
        assert state == {}
        return self.replicas


@pytest.fixture
def controller(monkeypatch):
    return lambda **policy: Controller(monkeypatch, **policy)


def test_a_group_of_fixed_size_follows_the_gpus(controller):
    ask = controller(minimum=4, maximum=4, num_gpus=1)
    assert ask(0) == 0
    ask.gpus = 2.0
    assert ask(1.1) == 2
    ask.gpus = 8.0
    assert ask(2.2) == 4
    ask.gpus = 0.0
    assert ask(3.3) == 0


def test_the_cluster_is_asked_at_most_once_a_second(controller):
    ask = controller(minimum=1, maximum=1, num_gpus=1)
    assert ask(0) == 0
    ask.gpus = 1.0
    assert [ask(0.5), ask(1.0)] == [0, 1]


def test_work_decides_below_the_gpus(controller):
    ask = controller(minimum=1, maximum=8, target_work=100, num_gpus=0.5, gpus=2.0)
    assert ask(0) == 1
    assert ask(1, 250) == 3
    assert ask(2, 900, 900) == 4
    ask.gpus = 1.0
    assert ask(3, 900, 900) == 2


def test_more_replicas_only_if_the_work_stays(controller):
    ask = controller(minimum=1, maximum=8, target_work=100, upscale_delay_s=10, downscale_delay_s=30)
    assert ask(0, 50) == 1
    assert [ask(1, 300), ask(5, 100), ask(6, 300), ask(12, 300)] == [1, 1, 1, 1]
    assert ask(16, 300) == 3


def test_fewer_replicas_only_if_the_work_stays_away(controller):
    ask = controller(minimum=0, maximum=8, target_work=100, downscale_delay_s=30)
    assert [ask(0, 300), ask(10), ask(29)] == [3, 3, 3]
    assert ask(41, 150) == 2
    assert [ask(42), ask(70)] == [2, 2]
    assert ask(73) == 0


def test_somebody_who_waits_wakes_a_group_at_once(controller):
    ask = controller(minimum=0, maximum=8, target_work=100, upscale_delay_s=60, downscale_delay_s=30)
    assert [ask(0), ask(1)] == [0, 0]
    assert ask(2, queued=0.2) == 1
    assert ask(3, 50) == 1
