"""Known answers of the public implementation: tokens equal, numbers within the tolerance that floats allow."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model import KronosPredictor
from model.losses import predictor_loss, tokenizer_loss

GOLDEN = Path(__file__).parents[1] / "golden"
CORE, *FORECASTS = json.loads((GOLDEN / "cases.json").read_text())


@pytest.fixture(scope="module")
def answers():
    return np.load(GOLDEN / "cases.npz")


@pytest.fixture(scope="module")
def core(answers):
    return {name.removeprefix("core/"): torch.from_numpy(answers[name]) for name in answers if name.startswith("core/")}


def close(actual, expected, tolerance=1e-4):
    np.testing.assert_allclose(actual.detach().numpy(), expected.numpy(), rtol=tolerance, atol=tolerance)


def test_tokenizer_encodes_and_decodes(tiny, core):
    _, tokenizer = tiny
    with torch.no_grad():
        s1, s2 = tokenizer.encode(core["x"], half=True)
        assert torch.equal(s1, core["s1"])
        assert torch.equal(s2, core["s2"])
        assert torch.equal(tokenizer.encode(core["x"]), core["index"])
        close(tokenizer.decode((s1, s2), half=True), core["decoded"])
        close(tokenizer.decode(core["index"]), core["decoded"])
        (from_s1, from_both), bsq_loss, quantized, index = tokenizer(core["x"])
    close(from_s1, core["z_pre"])
    close(from_both, core["z"])
    close(quantized, core["quantized"])
    assert torch.equal(index, core["index"])
    assert bsq_loss.item() == pytest.approx(CORE["bsq_loss"], rel=1e-4)


def test_model_context_and_logits(tiny, core):
    model, _ = tiny
    with torch.no_grad():
        context = model.context(core["s1"], core["s2"], core["stamp"])
        close(context, core["context"])
        close(model.head.proj_s1(context), core["s1_logits"])
        close(model.next_s1_logits(context), core["s1_logits"][:, -1])
        close(model.next_s2_logits(context, core["next_s1"][:, 0]), core["s2_logits_last"])


def test_predictor_loss_and_gradients(tiny, core):
    model, _ = tiny
    model.zero_grad()
    s1, s2 = core["s1"], core["s2"]
    s1_logits, s2_logits = model(
        s1[:, :-1], s2[:, :-1], core["stamp"][:, :-1], use_teacher_forcing=True, s1_targets=s1[:, 1:]
    )
    close(s1_logits, core["train_s1_logits"])
    close(s2_logits, core["train_s2_logits"])
    loss = predictor_loss(s1_logits, s2_logits, s1[:, 1:], s2[:, 1:])
    assert loss.total.item() == pytest.approx(CORE["train_loss"], rel=1e-4)
    assert loss.s1.item() == pytest.approx(CORE["train_loss_s1"], rel=1e-4)
    assert loss.s2.item() == pytest.approx(CORE["train_loss_s2"], rel=1e-4)
    loss.total.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(CORE["grad_norms"], rel=1e-4)
    model.zero_grad()


def test_tokenizer_loss_and_gradients(tiny, core):
    _, tokenizer = tiny
    tokenizer.zero_grad()
    loss = tokenizer_loss(tokenizer, core["x"])
    assert loss.total.item() == pytest.approx(CORE["tokenizer_train_loss"], rel=1e-4)
    assert loss.bsq.item() == pytest.approx(CORE["tokenizer_bsq_train_loss"], rel=1e-4)
    loss.total.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in tokenizer.named_parameters()}
    assert norms == pytest.approx(CORE["tokenizer_grad_norms"], rel=1e-4)
    tokenizer.zero_grad()


@pytest.mark.parametrize("case", FORECASTS, ids=lambda case: case["name"])
def test_forecast(case, tiny, bars, answers):
    predictor = KronosPredictor(*tiny, device="cpu", max_context=case["max_context"])
    ends = [start + case["lookback"] for start in case["starts"]]
    histories = [bars[start:end] for start, end in zip(case["starts"], ends, strict=True)]
    if case["seed"] is not None:
        torch.manual_seed(case["seed"])
    frames = predictor.predict_batch(
        [history[case["columns"]] for history in histories],
        [history.timestamps for history in histories],
        [bars.timestamps[end : end + case["horizon"]] for end in ends],
        case["horizon"],
        T=case["T"],
        top_k=case["top_k"],
        top_p=case["top_p"],
        sample_count=case["sample_count"],
        verbose=False,
    )
    expected = answers[f"forecast/{case['name']}"]
    for frame, known, history in zip(frames, expected, histories, strict=True):
        spread = history[["open", "high", "low", "close", "volume", "amount"]].std().to_numpy()
        tolerance = 1e-4 * np.abs(known) + 1e-4 * spread
        assert (np.abs(frame.to_numpy() - known) <= tolerance).all()
