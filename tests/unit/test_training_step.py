"""A step in pieces, in mixed precision, and with a gradient that is no number."""

import itertools

import pytest
import torch

from cluster.training import memory, precision
from cluster.training.loop import run_stage
from cluster.training.memory import saved_bytes, settle_batch_sizes, windows_that_fit
from cluster.training.precision import resolve_training_precision
from cluster.training.worker import DivergedError, Worker
from model.errors import InputError
from tests.tiny_training import CPU, gradients, largest_relative, save_tokenizer, tiny_config, weights


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_worker(tokenizer_folder, stage="predictor", training=None, **options):
    return Worker(tiny_config(stage, training=training, **options), stage, tokenizer_folder, CPU)


@pytest.mark.verify("V4")
@pytest.mark.parametrize("pieces", [4, 3, 1])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(tokenizer_folder, figure, pieces):
    """16 windows with contexts, and so numbers of scored positions, of their own: 4 × 4, 5 × 3 + 1 and 16 × 1."""
    phases = [{"steps": 20, "window": 24, "batch_size": 16}]
    found = {}
    for size in (None, pieces):
        worker = make_worker(tokenizer_folder, training={"micro_batch_size": size}, phases=phases)
        batch = worker._stream(0)[0].batch(0)
        assert len(set(batch.scored.sum(axis=1))) > 1
        losses = worker.add_gradients(batch)
        found[size] = gradients(worker), losses["loss"]
    difference = largest_relative(found[pieces][0], found[None][0])
    figure(f"16 windows in pieces of {pieces}: largest gradient difference {difference:.1e}", "at most 1e-5")
    assert difference <= 1e-5
    assert found[pieces][1] == pytest.approx(found[None][1], rel=1e-5)


@pytest.mark.verify("V4")
def test_a_tokenizer_batch_in_pieces_has_the_reconstruction_of_the_whole(figure):
    """All but the codebook's entropy, which is a statistic of what is computed at once (docs/training.md)."""
    found = {}
    for size in (None, 4):
        worker = make_worker(None, "tokenizer", training={"micro_batch_size": size})
        worker.task.network.tokenizer.bsq.zeta = 0.0
        worker.add_gradients(worker._stream(0)[0].batch(0))
        found[size] = gradients(worker)
    difference = largest_relative(found[4], found[None])
    figure(f"tokenizer without the entropy term: largest gradient difference {difference:.1e}", "at most 1e-5")
    assert difference <= 1e-5


def test_steps_in_pieces_end_at_the_weights_of_whole_ones(tokenizer_folder):
    rates = {"learning_rate": 1e-3, "warmup_steps": 5}
    whole, pieces = (
        make_worker(tokenizer_folder, training={"micro_batch_size": size}, optimisation=rates) for size in (None, 3)
    )
    for _ in range(10):
        whole.train_step()
        pieces.train_step()
    assert largest_relative(weights(pieces), weights(whole)) < 1e-4


@pytest.mark.verify("V19")
@pytest.mark.parametrize(("stage", "runs"), [("predictor", 1), ("tokenizer", 5)])
def test_bf16_ends_where_fp32_does(tokenizer_folder, monkeypatch, figure, stage, runs):
    """On average over runs: where codes flip, a last bit moves the end of one tokenizer by up to 0.03 either way."""
    # A CPU without the instructions computes the same, only slower: what is tested here are the numbers.
    monkeypatch.setattr(precision, "precision_obstacle", lambda name, device: None)
    losses = {"fp32": 0.0, "bf16": 0.0}
    for name, seed in itertools.product(losses, range(runs)):
        worker = make_worker(tokenizer_folder, stage, training={"precision": name}, steps=200, seed=seed)
        before = worker.validate()["validation_loss"]
        for _ in range(200):
            worker.train_step()
        after = worker.validate()["validation_loss"]
        losses[name] += after / runs
        assert after < before - 0.02
        assert {p.dtype for p in worker.task.network.parameters()} == {torch.float32}
    gap = abs(losses["bf16"] - losses["fp32"])
    figure(f"{stage}: loss after 200 steps fp32 {losses['fp32']:.4f}, bf16 {losses['bf16']:.4f}", "within 0.02")
    assert gap <= 0.02


def test_what_a_device_cannot_compute_falls_back_with_a_warning(monkeypatch):
    assert resolve_training_precision("fp32", CPU).warning is None
    monkeypatch.setattr(precision, "precision_obstacle", lambda name, device: None)
    found = resolve_training_precision("fp16", CPU)
    assert (found.name, "CUDA only" in found.warning) == ("bf16", True)
    monkeypatch.setattr(precision, "precision_obstacle", lambda name, device: "it is too old")
    for asked in ("bf16", "fp16"):
        found = resolve_training_precision(asked, CPU)
        assert found.name == "fp32"
        assert asked in found.warning


def spoil(worker, *steps):
    """From these steps a loss of NaN comes back."""
    real, count = worker.task.loss, itertools.count()

    def loss(*arguments):
        found = real(*arguments)
        return found._replace(total=found.total * float("nan")) if next(count) in steps else found

    worker.task.loss = loss


@pytest.mark.verify("V19")
def test_a_gradient_that_is_no_number_is_skipped_and_counted(tokenizer_folder, figure):
    worker = make_worker(tokenizer_folder)
    spoil(worker, 1, 2, 4)
    kept = []
    for _ in range(6):
        before = weights(worker)
        losses, _ = worker.train_step()
        kept.append(torch.equal(before, weights(worker)))
    figure(f"3 of 6 batches are NaN: {worker.skipped} steps skipped", "3, and no weight changes in them")
    assert kept == [False, True, True, False, True, False]
    assert (worker.skipped, worker.skipped_in_a_row, worker.step) == (3, 0, 6)
    assert losses["skipped"] == 3
    assert torch.isfinite(weights(worker)).all()


@pytest.mark.verify("V19")
def test_a_run_of_bad_steps_ends_by_name(tokenizer_folder, figure):
    worker = make_worker(tokenizer_folder, optimisation={"max_skipped": 3})
    spoil(worker, *range(100))
    for _ in range(3):
        worker.train_step()
    with pytest.raises(DivergedError, match=r"predictor step 3: the gradient is nan, as in 4 steps in a row") as caught:
        worker.train_step()
    figure(f"max_skipped 3: ended after {worker.skipped} bad steps", "4")
    assert "optimisation.max_skipped" in str(caught.value)


def stage_settings(config, folder, tokenizer_folder):
    return {
        "config": config.model_dump(mode="json"),
        "stage": "predictor",
        "tokenizer_folder": str(tokenizer_folder),
        "device": "cpu",
        "run_folder": str(folder),
        "fingerprint": "f",
    }


def memory_for(rows, monkeypatch):
    """A worker whose memory ends at so many windows: PyTorch's own error, from the place where it comes."""
    from cluster.training.stages import PredictorTask

    real = PredictorTask.loss

    def loss(self, network, batch, device):
        if len(batch.x) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, network, batch, device)

    monkeypatch.setattr(PredictorTask, "loss", loss)


@pytest.mark.parametrize(("rows", "given", "advice"), [(4, None, 4), (7, None, 4), (2, 4, 2), (0, 1, None)], ids=str)
def test_out_of_memory_names_the_size_to_try(tmp_path, tokenizer_folder, monkeypatch, rows, given, advice):
    memory_for(rows, monkeypatch)
    config = tiny_config("predictor", steps=2, training={"micro_batch_size": given})
    from cluster.training.group import Group

    outcome = run_stage(stage_settings(config, tmp_path, tokenizer_folder), Group(), print)
    assert isinstance(outcome["error"], InputError)
    assert outcome["error"].code == "out_of_memory"
    wanted = f"training.micro_batch_size={advice}" if advice else "shorter window"
    assert wanted in str(outcome["error"])


def test_auto_sizes_fit_and_are_the_same_after_a_restart(tmp_path, tokenizer_folder, monkeypatch):
    phases = [{"steps": 2, "window": 24, "batch_size": "auto"}, {"steps": 2, "window": 48, "batch_size": 4}]
    worker = make_worker(tokenizer_folder, phases=phases)
    each = saved_bytes(worker, 0)
    assert 0.8 < saved_bytes(worker, 0) / each < 1.25
    room = 3 * 4 * worker.weights()[1]
    monkeypatch.setattr(memory, "free_memory", lambda: 2 * (9 * each + room))
    assert windows_that_fit(worker, 0, 64) == 8
    settle_batch_sizes(worker, tmp_path)
    assert worker.batch_sizes == [8, 4]
    assert worker.micro_batch_size <= 8
    found = worker.batch_sizes, worker.micro_batch_size
    for _ in range(4):
        worker.train_step()

    monkeypatch.setattr(memory, "free_memory", lambda: 2 * (64 * each + room))
    again = make_worker(tokenizer_folder, phases=phases)
    settle_batch_sizes(again, tmp_path)
    assert (again.batch_sizes, again.micro_batch_size) == found
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(InputError, match="shorter window"):
        settle_batch_sizes(make_worker(tokenizer_folder, phases=phases), tmp_path / "new")
