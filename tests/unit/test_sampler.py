"""The exponential race and its noise: equal to torch.multinomial, exact filters, seeded draws that stand alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine import sampler as engine_sampler
from model.engine.sampler import RowSettings, SeededNoise, race, sample_rows, sample_sorted
from model.errors import InputError
from model.sampler import check_sampling, filtered, global_noise, philox, philox_noise, sample, seeded_noise, split_seed
from model.types import Sampling

CPU = torch.device("cpu")


def words(*values):
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, seed, expected):
    """The vectors that the authors' Random123 library publishes for philox4x32-10."""
    assert tuple(int(word) for word in philox(words(*counter), split_seed(seed))) == expected


def test_race_is_torch_multinomial():
    """The same generator state gives the same token as torch.multinomial, draw after draw."""
    logits = torch.randn(50, 1024, generator=torch.Generator().manual_seed(0)) * 3
    torch.manual_seed(9)
    expected = [torch.multinomial(logits.softmax(-1), 1).squeeze(1) for _ in range(40)]
    torch.manual_seed(9)
    noise = global_noise(CPU)
    actual = [sample(logits, Sampling(top_p=1.0), noise, step, 0) for step in range(40)]
    assert torch.equal(torch.stack(actual), torch.stack(expected))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), rows=st.integers(1, 9), step=st.integers(0, 4000), head=st.integers(0, 1))
def test_seeded_noise_depends_on_seed_path_step_and_head_alone(seed, rows, step, head):
    noise = seeded_noise(seed, CPU)
    alone = noise(rows, 61, step, head)
    noise(3, 61, step + 1, head)
    assert torch.equal(noise(rows + 5, 61, step, head)[:rows], alone)
    assert torch.equal(seeded_noise(seed, CPU)(rows, 64, step, head)[:, :61], alone)
    assert not torch.equal(noise(rows, 61, step, 1 - head), alone)
    assert not torch.equal(noise(rows, 61, step + 1, head), alone)
    assert not torch.equal(seeded_noise(seed ^ 1, CPU)(rows, 61, step, head), alone)
    assert not torch.equal(seeded_noise(seed ^ (1 << 63), CPU)(rows, 61, step, head), alone)


def test_seeded_noise_is_exponential():
    draws = torch.cat([seeded_noise(seed, CPU)(64, 1024, 0, 0).flatten() for seed in range(8)]).double()
    assert draws.min() > 0
    n = len(draws)
    assert abs(draws.mean() - 1) < 5 / n**0.5
    assert abs(draws.var() - 1) < 5 * 8**0.5 / n**0.5
    # Kolmogorov distance to 1 − exp(−x); 1.95/√n is exceeded once in a thousand.
    empirical = torch.arange(1, n + 1) / n
    assert (empirical - (1 - torch.exp(-draws.sort().values))).abs().max() < 1.95 / n**0.5


def test_seeded_draws_follow_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))
    tokens = sample(logits.expand(40_000, -1), Sampling(top_p=1.0), seeded_noise(3, CPU), 0, 0)
    shares = np.bincount(tokens.numpy(), minlength=4) / 40_000
    assert np.abs(shares - [0.5, 0.25, 0.15, 0.1]).max() < 0.01


def test_temperature_zero_is_greedy_and_draws_nothing():
    def no_noise(*arguments):
        raise AssertionError("noise was drawn")

    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    assert sample(logits, Sampling(temperature=0), no_noise, 0, 0).tolist() == [1, 0]


def test_top_p_keeps_through_the_token_that_crosses():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))
    kept = {p: filtered(logits, 0, p).isfinite()[0].tolist() for p in (0.0, 0.4, 0.6, 0.8, 0.95, 1.0)}
    assert kept == {
        0.0: [False, True, False, False],
        0.4: [False, True, False, False],
        0.6: [False, True, False, True],
        0.8: [False, True, True, True],
        0.95: [True, True, True, True],
        1.0: [True, True, True, True],
    }


def test_top_k_keeps_ties_and_ignores_top_p():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    assert filtered(logits, 2, 0.01).isfinite()[0].tolist() == [True, False, True, True, False]
    assert filtered(logits, 99, 0.01).isfinite().all()
    assert filtered(logits, 1, 1.0).isfinite().sum() == 1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sampling=st.lists(
        st.builds(
            Sampling,
            temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
            top_k=st.sampled_from([0, 0, 1, 3, 200]),
            top_p=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
            samples=st.integers(1, 3),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_the_samplers_of_a_batch_give_each_request_its_own_tokens(seed, sampling):
    """Both of the engine's, with and without a sort, against the published one row by row."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(one.samples for one in sampling)
    logits = torch.randn(rows, 61, generator=generator) * 3
    noise = torch.empty(rows, 61).exponential_(generator=generator)
    parts = zip(sampling, *(t.split([one.samples for one in sampling]) for t in (logits, noise)), strict=True)
    expected = torch.cat([sample(some, one, lambda *_, e=e: e, 0, 0) for one, some, e in parts])
    rows_of = RowSettings.of([SimpleNamespace(sampling=one, rows=one.samples) for one in sampling], CPU)
    assert torch.equal(sample_rows(logits, rows_of, noise), expected)
    assert torch.equal(sample_sorted(logits, rows_of, noise), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e-40),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", 2**31),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("top_p", float("nan")),
        ("samples", 0),
        ("samples", 1.5),
        ("seed", -1),
        ("seed", 0.5),
        ("seed", 2**64),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(InputError, match=field) as error:
        check_sampling(Sampling(**{field: value}))
    assert error.value.column == field


def test_a_small_nucleus_of_a_flat_distribution_takes_few_rounds(monkeypatch):
    """Struck out one by one, it would take hundreds, and everybody in the batch would wait."""
    generator = torch.Generator().manual_seed(0)
    probabilities = (torch.randn(64, 1024, generator=generator) * 0.01).softmax(-1)
    noise = torch.empty(64, 1024).exponential_(generator=generator)
    rounds, argmax = [], torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda *some, **named: rounds.append(1) or argmax(*some, **named))
    tokens = race(probabilities, noise, torch.zeros(64, 1))
    assert len(rounds) < 50
    assert torch.equal(tokens, argmax(probabilities, -1))


@pytest.mark.parametrize(("rows", "step"), [(1, 17), (100, 7), (1500, 3)])
def test_noise_made_ahead_is_bounded_and_the_same(monkeypatch, rows, step):
    """However many paths there are: of each row and step made at once, the makers hold a megabyte for a moment."""
    made = []

    def counted(seed, paths, positions, vocabulary):
        made.append(len(paths) * len(positions))
        return philox_noise(seed, paths, positions, vocabulary)

    monkeypatch.setattr(engine_sampler, "philox_noise", counted)
    ahead = SeededNoise(5, rows, 40, torch.device("cpu"))
    paths = torch.arange(rows)
    for head in (0, 1):
        noise = philox_noise(5, paths, torch.full_like(paths, 2 * step + head), 40)
        assert torch.equal(ahead.draw(step, head, 40), noise)
    assert max(made) <= 2 * SeededNoise.ROWS
