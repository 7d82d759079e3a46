"""One worker without Ray: it learns, its steps are a function of the seed, and a restart changes no bit."""

import json

import numpy as np
import pytest
import torch

from cluster.train import train
from cluster.training.config_file import parse_config
from cluster.training.worker import Worker
from model.errors import InputError
from model.kronos import Kronos
from model.tokenizer import KronosTokenizer
from tests.tiny_training import CPU, save_tokenizer, tiny_config, weights


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("stage", ["tokenizer", "predictor"])
def test_validation_loss_falls(stage, tokenizer_folder):
    worker = Worker(tiny_config(stage, steps=120), stage, tokenizer_folder, CPU)
    before = worker.validate()["validation_loss"]
    for _ in range(120):
        worker.train_step()
    assert worker.validate()["validation_loss"] < 0.9 * before


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("tokenizer", {}),
        ("predictor", {}),
        ("predictor", {"s2_conditioning": "sampled", "cross_attention": "published"}),
    ],
)
def test_a_restart_changes_no_bit(tmp_path, stage, options, tokenizer_folder):
    settings = tiny_config(stage, steps=12, dropout=0.2, **options)
    straight = Worker(settings, stage, tokenizer_folder, CPU)
    for _ in range(12):
        straight.train_step()

    first = Worker(settings, stage, tokenizer_folder, CPU)
    for _ in range(5):
        first.train_step()
    first.save(tmp_path)
    first.train_step()  # lost with the worker
    torch.manual_seed(99)
    second = Worker(settings, stage, tokenizer_folder, CPU)
    second.restore(tmp_path)
    assert second.step == 5
    while second.step < 12:
        second.train_step()
    assert torch.equal(weights(straight), weights(second))
    for a, b in zip(
        straight.optimizer.state_dict()["state"].values(), second.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(a["exp_avg"], b["exp_avg"])
        assert torch.equal(a["step"], b["step"])


def test_a_state_file_that_would_run_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ("ran",))

    worker = Worker(tiny_config("tokenizer"), "tokenizer", None, CPU)
    worker.save(tmp_path)
    torch.save({"step": Harmful()}, tmp_path / "state.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        worker.restore(tmp_path)


def test_two_half_batches_give_the_gradient_of_the_whole(tokenizer_folder):
    """What DDP averages: each rank's share weighted by its scored positions."""
    settings = tiny_config("predictor")
    whole = Worker(settings, "predictor", tokenizer_folder, CPU)
    batch = whole._stream(0)[0].batch(0)
    whole.task.loss(whole.network, batch, CPU).total.backward()
    expected = torch.cat([p.grad.flatten() for p in whole.network.parameters()])

    total = int(batch.scored[:, 1:].sum())
    found = torch.zeros_like(expected)
    for rank in (0, 1):
        worker = Worker(settings, "predictor", tokenizer_folder, CPU)
        loss = worker.task.loss(worker.network, worker._stream(0)[0].batch(0, rank, 2), CPU)
        (loss.total * (loss.weight * 2 / total)).backward()
        found += torch.cat([p.grad.flatten() for p in worker.network.parameters()]) / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_validation_between_two_steps_changes_nothing(tokenizer_folder):
    """Dropout is on in every step, off in every validation, and draws nothing that a step would."""
    plain, checked = (
        Worker(tiny_config("predictor", dropout=0.3), "predictor", tokenizer_folder, CPU) for _ in range(2)
    )
    for _ in range(5):
        plain.train_step()
        checked.validate()
        checked.train_step()
    assert torch.equal(weights(plain), weights(checked))
    without = Worker(tiny_config("predictor"), "predictor", tokenizer_folder, CPU)
    for _ in range(5):
        without.train_step()
    assert not torch.equal(weights(plain), weights(without))


@pytest.mark.parametrize("training", [True, False])
def test_validation_cannot_see_the_future(tokenizer_folder, training):
    worker = Worker(tiny_config("predictor"), "predictor", tokenizer_folder, CPU)
    network = worker.task.network.train(training)
    rng = np.random.default_rng(0)
    s1, s2 = (torch.from_numpy(rng.integers(16, size=(1, 20))) for _ in range(2))
    marks = torch.zeros(1, 20, 5, dtype=torch.int64)
    plain = network(s1, s2, marks, use_teacher_forcing=True, s1_targets=s1, rotate_cross=False)
    s1[:, 12:], s2[:, 12:], marks[:, 12:] = 3, 5, 1
    changed = network(s1, s2, marks, use_teacher_forcing=True, s1_targets=s1, rotate_cross=False)
    for a, b in zip(plain, changed, strict=True):
        assert torch.equal(a[:, :12], b[:, :12])
        assert not torch.equal(a[:, 12:], b[:, 12:])


def test_positions_of_the_context_are_not_scored(tokenizer_folder):
    worker = Worker(tiny_config("predictor"), "predictor", tokenizer_folder, CPU)
    batch = worker._stream(0)[0].batch(0)
    loss = worker.task.loss(worker.network, batch, CPU)
    assert loss.weight == sum(batch.x.shape[1] - batch.context)


def test_validation_without_a_position_to_score_is_an_error(tokenizer_folder):
    worker = Worker(tiny_config("predictor"), "predictor", tokenizer_folder, CPU)
    windows, batches = worker._validation
    late = np.datetime64("2100-01-01")
    object.__setattr__(windows.split, "begins", late)
    worker._validation = (windows, batches)
    with pytest.raises(InputError, match="no position to score") as caught:
        worker.validate()
    assert caught.value.code == "empty_validation"


def test_phases_follow_one_another(tokenizer_folder):
    phases = [{"steps": 2, "window": 24, "batch_size": 8}, {"steps": 3, "window": 48, "batch_size": 2}]
    worker = Worker(tiny_config("predictor", phases=phases), "predictor", tokenizer_folder, CPU)
    bars = [worker.train_step()[1] for _ in range(5)]
    assert bars == [8 * 25] * 2 + [2 * 49] * 3
    with pytest.raises(IndexError):
        worker.train_step()


def test_local_mode_trains_both_stages_without_ray(tmp_path, monkeypatch):
    """num_workers: 0, the same function in this process; the networks load and the record is there."""

    def forbidden(*args, **kwargs):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", forbidden)
    settings = tiny_config("tokenizer", steps=6, folder=tmp_path).model_dump(mode="json")
    predictor = tiny_config("predictor", steps=6).model_dump(mode="json")["predictor"]
    settings["predictor"] = predictor | {"tokenizer": None}
    made = train(parse_config(settings), command="test")
    assert KronosTokenizer.from_pretrained(made["tokenizer"]).s1_bits == 4
    assert Kronos.from_pretrained(made["predictor"]).s2_bits == 4
    record = json.loads((tmp_path / "out/training.json").read_text())
    assert {stage: entry["steps"] for stage, entry in record["stages"].items()} == {"tokenizer": 6, "predictor": 6}
    assert (tmp_path / "runs/t/tokenizer/metrics.jsonl").is_file()
