"""One sampler, the exponential race, and the two sources of its noise.

A token is drawn as argmax(p / e) with e ~ Exp(1), one e per vocabulary entry: that is a draw from p, and it is what
torch.multinomial(p, 1) computes. R rows, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

from model.errors import InputError
from model.types import Sampling

S1_HEAD, S2_HEAD = 0, 1

LOWEST_TEMPERATURE = 1e-6
"""Below this and above 0, logits / temperature nears the end of float32, past which no token has a probability."""

Noise = Callable[[int, int, int, int], Tensor]
"""(rows, vocabulary, step, head) → Exp(1) noise, float32 [rows, vocabulary]."""

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF


def check_sampling(sampling: Sampling) -> None:
    """Raises InputError, naming the field, for settings that do not describe a distribution."""
    temperature, top_k, samples, seed = sampling.temperature, sampling.top_k, sampling.samples, sampling.seed
    problems = {
        "temperature": not (temperature == 0 or LOWEST_TEMPERATURE <= temperature < float("inf"))
        and f"must be 0 (greedy), or at least {LOWEST_TEMPERATURE:g} and finite",
        "top_k": not (isinstance(top_k, Integral) and 0 <= top_k < 2**31)
        and "must be a whole number from 0 (off) to 2**31 - 1",
        "top_p": not 0 <= sampling.top_p <= 1 and "must lie between 0 and 1 (1 is off)",
        "samples": not (isinstance(samples, Integral) and samples >= 1) and "must be a whole number, at least 1",
        "seed": not (seed is None or (isinstance(seed, Integral) and 0 <= seed < 2**64))
        and "must be a whole number from 0 to 2**64 - 1",
    }
    for name, problem in problems.items():
        if problem:
            raise InputError(f"{name}={getattr(sampling, name)} {problem}", code=f"invalid_{name}", column=name)


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [R, V] with −inf where a token is cut off.

    top_k > 0 keeps the k largest, ties with the k-th included, and top_p is then ignored, as in the published sampler.
    Else top_p < 1 keeps the most likely tokens up to and including the one with which their mass passes top_p.
    """
    if top_k > 0:
        kth = torch.topk(logits, min(top_k, logits.shape[-1])).values[:, -1:]
        return logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = torch.sort(logits, descending=True)
        mass_through = torch.softmax(ordered, dim=-1).cumsum(-1)
        cut = torch.zeros_like(ordered, dtype=torch.bool)
        cut[:, 1:] = mass_through[:, :-1] > top_p
        return logits.masked_fill(cut.scatter(1, order, cut), -torch.inf)
    return logits


def sample(logits: Tensor, sampling: Sampling, noise: Noise, step: int, head: int) -> Tensor:
    """Logits [R, V] → tokens int64 [R]. Temperature 0 is argmax and draws no noise."""
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = filtered(logits / sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1)
    rows, vocabulary = logits.shape
    e = noise(rows, vocabulary, step, head)
    return (probabilities / e.to(logits.device)).argmax(-1)


def global_noise(device: torch.device) -> Noise:
    """Noise from torch's global generator of the device, in the order in which the published sampler draws it.

    After torch.manual_seed(s) on the CPU, the tokens are those of the published implementation.
    """

    def draw(rows: int, vocabulary: int, step: int, head: int) -> Tensor:
        return torch.empty(rows, vocabulary, device=device).exponential_()

    return draw


def seeded_noise(seed: int, device: torch.device) -> Noise:
    """Noise that depends on (seed, row, step, head) alone: not on other rows, on order, or on earlier draws.

    Counter-based Philox4x32-10; row i of a request is its path i. The logarithm is taken in float64, so that its last
    bit does not depend on a vector library.
    """

    def draw(rows: int, vocabulary: int, step: int, head: int) -> Tensor:
        paths = torch.arange(rows, device=device)
        return philox_noise(seed, paths, torch.full_like(paths, 2 * step + head), vocabulary)

    return draw


def split_seed(seed: int) -> tuple[int, int]:
    """The 64-bit key as two 32-bit words, the lower one first."""
    return int(seed) & _LOW_32, int(seed) >> 32


def philox_noise(seed: int, path: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """Exp(1) noise float32 [..., V] of paths and positions (2 * step + head), int64 [...]; their shapes broadcast."""
    device = path.device
    # MPS has no float64; the noise is then made on the CPU and moved.
    where = torch.device("cpu") if device.type == "mps" else device
    path, position = path.to(where), position.to(where)
    block = torch.arange((vocabulary + 3) // 4, device=where)
    counter = (block, path.unsqueeze(-1), position.unsqueeze(-1), torch.zeros_like(block))
    words = philox(counter, split_seed(seed))
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :vocabulary]
    uniform = (bits.double() + 0.5) * 2.0**-32
    return -torch.log(uniform).float().to(device)


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    counter: four int64 tensors of 32-bit words, whose shapes broadcast; key: two words. Returns four such tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words needs 64 bits unsigned. In int64 it wraps to the same bits; the masks undo the
        # sign that the shift drags in.
        product0, product1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW_32) ^ c1 ^ k0,
            product1 & _LOW_32,
            ((product0 >> 32) & _LOW_32) ^ c3 ^ k1,
            product0 & _LOW_32,
        )
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _LOW_32, (k1 + _PHILOX_WEYL[1]) & _LOW_32
    return c0, c1, c2, c3
