"""Binary spherical quantisation: a vector becomes a point on the unit sphere, and its signs become a token.

Source: Zhao et al. 2024, arXiv 2406.07548; weights and constants as the published Kronos tokenizers use them.
K = s1_bits + s2_bits code bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_FLOOR = 1e-8
"""Added inside the logarithm of every entropy, as the published loss does."""


def bits_to_index(signs: Tensor) -> Tensor:
    """signs [..., n] → int64 [...]; bit i, least significant first, is set where sign i is positive."""
    weights = 2 ** torch.arange(signs.shape[-1], device=signs.device)
    return ((signs > 0).long() * weights).sum(-1)


def index_to_bits(index: Tensor, n_bits: int) -> Tensor:
    """int64 [...] → float32 ±1 [..., n_bits], the inverse of bits_to_index."""
    weights = 2 ** torch.arange(n_bits, device=index.device)
    return ((index.unsqueeze(-1) & weights) != 0).float() * 2 - 1


def entropy(p: Tensor) -> Tensor:
    """−Σ p·log p over the last axis."""
    return -(p * torch.log(p + LOG_FLOOR)).sum(-1)


class BinarySphericalQuantizer(nn.Module):
    """Signs of a unit vector, scaled back to the unit sphere, with a straight-through gradient."""

    def __init__(self, bits: int, beta: float, gamma0: float, gamma: float, zeta: float, group_size: int) -> None:
        super().__init__()
        if bits % group_size:
            raise ValueError(f"group_size={group_size} does not divide the {bits} bits of the code")
        self.bits = bits
        self.beta, self.gamma0, self.gamma, self.zeta = beta, gamma0, gamma, zeta
        self.group_size = group_size
        self.scale = bits**-0.5
        # Nothing here reads these two; the published state dicts hold them.
        self.register_buffer("basis", 2 ** torch.arange(bits - 1, -1, -1))
        self.register_buffer("group_basis", 2 ** torch.arange(group_size - 1, -1, -1))

    def forward(self, z: Tensor) -> Tensor:
        """Unit vectors z [B, T, K] → quantised vectors of ±1/√K; the gradient is that of z/√K."""
        signs = torch.where(z > 0, 1.0, -1.0).type_as(z)
        return (z + (signs - z).detach()) * self.scale

    def loss(self, z: Tensor, quantized: Tensor) -> Tensor:
        """Commitment plus entropy penalty of unit vectors z [B, T, K] and their codes; a scalar.

        beta·mean‖zq − z‖² + zeta·(gamma0·H_sample − gamma·H_codebook): each code should be certain, and all codes used.
        """
        commitment = ((quantized.detach() - z) ** 2).sum(-1).mean()
        p = torch.sigmoid(-4 * z * self.scale)
        bit = torch.stack((p, 1 - p), dim=-1)
        per_sample = entropy(bit).sum(-1).mean()
        # Bit by bit, where the paper averages over groups of bits: so the published tokenizers were trained
        # (docs/parity.md, "codebook entropy").
        codebook = entropy(bit.flatten(0, -3).mean(0)).sum()
        return self.beta * commitment + self.zeta * (self.gamma0 * per_sample - self.gamma * codebook)


class TokenQuantizer(nn.Module):
    """Splits the code into the coarse token s1 (first bits) and the fine token s2 (the rest)."""

    def __init__(
        self, s1_bits: int, s2_bits: int, beta: float, gamma0: float, gamma: float, zeta: float, group_size: int
    ) -> None:
        super().__init__()
        self.s1_bits, self.s2_bits = s1_bits, s2_bits
        self.bsq = BinarySphericalQuantizer(s1_bits + s2_bits, beta, gamma0, gamma, zeta, group_size)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Any vectors z [B, T, K] → (unit vectors, quantised vectors), both [B, T, K]."""
        unit = F.normalize(z, dim=-1)
        return unit, self.bsq(unit)

    def tokens(self, quantized: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, K] → (s1, s2), each int64 [B, T]."""
        return bits_to_index(quantized[..., : self.s1_bits]), bits_to_index(quantized[..., self.s1_bits :])

    def vectors(self, s1: Tensor, s2: Tensor) -> Tensor:
        """(s1, s2), each int64 [B, T] → quantised vectors [B, T, K]."""
        signs = torch.cat((index_to_bits(s1, self.s1_bits), index_to_bits(s2, self.s2_bits)), dim=-1)
        return signs * self.bsq.scale
