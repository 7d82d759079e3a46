"""Nothing sees what lies after it, and the network that is trained is the network that forecasts."""

import dataclasses

import numpy as np
import pytest
import torch

from model.engine.engine import Engine
from model.engine.types import EngineConfig, Request
from model.frames import series_from_frame
from model.kronos import Kronos
from model.types import Sampling

CUT, LENGTH = 12, 20


def sequence(network, seed):
    rng = np.random.default_rng(seed)
    s1 = torch.from_numpy(rng.integers(2**network.s1_bits, size=(2, LENGTH)))
    s2 = torch.from_numpy(rng.integers(2**network.s2_bits, size=(2, LENGTH)))
    marks = torch.from_numpy(rng.integers(1, 7, size=(2, LENGTH, 5)))
    return s1, s2, marks


@pytest.mark.verify("V6")
@pytest.mark.parametrize("rotated", [True, False], ids=["published", "consistent"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_logits_do_not_see_later_tokens_and_stamps(tiny, figure, training, rotated):
    """The published attention does in evaluation: its s2 logits move by up to 0.5."""
    without_dropout = {name: 0.0 for name in tiny[0].config if name.endswith("dropout_p")}
    network = Kronos(**tiny[0].config | without_dropout).train(training)
    network.load_state_dict(tiny[0].state_dict())
    first, second = sequence(network, 0), sequence(network, 1)
    mixed = [torch.cat((a[:, :CUT], b[:, CUT:]), dim=1) for a, b in zip(first, second, strict=True)]
    options = {"use_teacher_forcing": True, "rotate_cross": rotated}
    with torch.no_grad():
        plain = network(*first, s1_targets=first[0], **options)
        changed = network(*mixed, s1_targets=mixed[0], **options)
    moved = max(float((a[:, :CUT] - b[:, :CUT]).abs().max()) for a, b in zip(plain, changed, strict=True))
    figure(f"{'train' if training else 'eval'}, rotated {rotated}: logits before the change move by {moved}", "0")
    assert moved == 0
    assert not torch.equal(plain[0][:, CUT:], changed[0][:, CUT:])


@pytest.mark.verify("V6")
def test_codes_do_not_see_later_bars(tiny, figure):
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, 6)
    changed = torch.cat((x[:, :CUT], torch.randn(2, LENGTH - CUT, 6)), dim=1)
    with torch.no_grad():
        plain, other = (tiny[1].encode(bars, half=True) for bars in (x, changed))
    different = sum(int((a[:, :CUT] != b[:, :CUT]).sum()) for a, b in zip(plain, other, strict=True))
    figure(f"later bars change {different} earlier codes", "0")
    assert different == 0
    assert any(not torch.equal(a[:, CUT:], b[:, CUT:]) for a, b in zip(plain, other, strict=True))


@pytest.mark.verify("V6")
def test_a_cached_forecast_does_not_see_later_stamps(tiny, bars, figure):
    """Marks of the bars from the fifth on are changed: the tokens up to that bar stay."""
    times = bars.timestamps
    series = series_from_frame(bars[:40], times[:40], times[40:52])
    marks = series.future_marks.copy()
    marks[4:] = (marks[4:] + 3) % 7 + 1
    tokens = []
    for future in (series.future_marks, marks):
        request = Request(dataclasses.replace(series, future_marks=future), Sampling(samples=3, seed=1))
        Engine(*tiny, EngineConfig(cache_bytes=2**23)).run([request])
        tokens.append(request.tokens)
    same = int((tokens[0][:, :5] == tokens[1][:, :5]).all())
    figure(f"later stamps: the first five bars' tokens are {'equal' if same else 'changed'}", "equal")
    assert same
    assert not np.array_equal(tokens[0], tokens[1])


@pytest.mark.verify("V7")
def test_the_train_path_is_the_decode_path(tiny, figure):
    """Teacher-forced logits of a whole sequence against those of the generation loop, position by position."""
    network = tiny[0].eval()
    s1, s2, marks = sequence(network, 2)
    targets = torch.roll(s1, -1, dims=1)
    with torch.no_grad():
        s1_logits, s2_logits = network(s1, s2, marks, use_teacher_forcing=True, s1_targets=targets, rotate_cross=False)
        largest = 0.0
        for t in range(LENGTH):
            context = network.context(s1[:, : t + 1], s2[:, : t + 1], marks[:, : t + 1])
            for whole, step in (
                (s1_logits, network.next_s1_logits(context)),
                (s2_logits, network.next_s2_logits(context, targets[:, t])),
            ):
                largest = max(largest, float((whole[:, t] - step).abs().max()))
    figure(f"consistent: largest logit difference {largest:.1e}", "at most 1e-5")
    assert largest <= 1e-5
