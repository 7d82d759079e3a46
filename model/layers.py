"""The building blocks that tokenizer and predictor share: RMSNorm, SwiGLU, rotary attention, the pre-norm block.

Shapes: B rows, T positions, D model width, H heads, d = D / H. Module and parameter names are the state-dict contract
of the published checkpoints; renaming one breaks loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RotaryTables = tuple[Tensor, Tensor]
"""(cos, sin), each [T, d], fp32; the first half of sin is negated, for rotate()."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v), each [B, H, T, d] → [B, H, T, d]: how a block attends. The engine puts its cache in here."""


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, back to x's dtype, times a learned weight (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        fp32 = x.float()
        normed = fp32 * torch.rsqrt(torch.mean(fp32 * fp32, dim=-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x), no bias (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, d_model: int, ff_dim: int, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.w1 = nn.Linear(d_model, ff_dim, bias=False)
        self.w3 = nn.Linear(d_model, ff_dim, bias=False)
        self.w2 = nn.Linear(ff_dim, d_model, bias=False)
        self.ffn_dropout = nn.Dropout(dropout_p)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Rotary(nn.Module):
    """Rotary position embedding over the two halves of a head (Su et al. 2021, arXiv 2104.09864), base 10000.

    The tables are computed anew for every forward: they cost microseconds, and a table kept in the module would have to
    be guarded against other threads, devices and lengths.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)))

    def tables(self, positions: Tensor) -> RotaryTables:
        """positions [T] → cos and sin, each [T, d]."""
        angles = torch.outer(positions.to(self.inv_freq.dtype), self.inv_freq)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, tables: RotaryTables) -> Tensor:
    """x [..., T, d], rotated position by position."""
    cos, sin = tables
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class Attention(nn.Module):
    """Multi-head attention with biased projections and a rotary table in its state dict."""

    def __init__(self, d_model: int, n_heads: int, attn_dropout_p: float = 0.0, resid_dropout_p: float = 0.0) -> None:
        super().__init__()
        if d_model % n_heads or (d_model // n_heads) % 2:
            raise ValueError(f"d_model={d_model} does not split into {n_heads} heads of even width")
        self.n_heads = n_heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.rotary = Rotary(d_model // n_heads)
        self.attn_dropout_p = attn_dropout_p
        self.resid_dropout = nn.Dropout(resid_dropout_p)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, H, T, d]."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        rotary: RotaryTables | None,
        *,
        causal: bool = True,
        attend: Attend | None = None,
    ) -> Tensor:
        """query [B, Tq, D] attends to memory [B, T, D]; Tq is T when causal or rotated.

        rotary None leaves query and keys as they are: position 0 for all of them. attend replaces the plain attention
        over memory, causal or not.
        """
        q, k, v = self.project(query, memory, rotary)
        if attend is not None:
            mixed = attend(q, k, v)
        else:
            dropout_p = self.attn_dropout_p if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal)
        return self.merge(mixed)

    def project(self, query: Tensor, memory: Tensor, rotary: RotaryTables | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, Tq, d] of query [B, Tq, D]; k and v [B, H, T, d] of memory [B, T, D]; q and k rotated."""
        q, k, v = (
            self.split_heads(self.q_proj(query)),
            self.split_heads(self.k_proj(memory)),
            self.split_heads(self.v_proj(memory)),
        )
        if rotary is not None:
            q, k = rotate(q, rotary).type_as(v), rotate(k, rotary).type_as(v)
        return q, k, v

    def merge(self, mixed: Tensor) -> Tensor:
        """What the heads have gathered, [B, H, T, d] → [B, T, D]."""
        return self.resid_dropout(self.out_proj(mixed.transpose(1, 2).flatten(2)))


class TransformerBlock(nn.Module):
    """Pre-norm causal block: x + attention(norm1(x)), then x + ffn(norm2(x))."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        ff_dim: int,
        ffn_dropout_p: float = 0.0,
        attn_dropout_p: float = 0.0,
        resid_dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(d_model)
        self.self_attn = Attention(d_model, n_heads, attn_dropout_p, resid_dropout_p)
        self.norm2 = RMSNorm(d_model)
        self.ffn = FeedForward(d_model, ff_dim, ffn_dropout_p)

    def forward(self, x: Tensor, rotary: RotaryTables, attend: Attend | None = None) -> Tensor:
        """x [B, T, D] → [B, T, D]; position t sees positions up to t, and what attend adds to them."""
        normed = self.norm1(x)
        x = x + self.self_attn(normed, normed, rotary, attend=attend)
        return x + self.ffn(self.norm2(x))


def run_blocks(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """x [B, T, D] through a stack of blocks, positions counted from 0."""
    for hidden in after_each_block(blocks, x):
        x = hidden
    return x


def after_each_block(blocks: nn.ModuleList, x: Tensor) -> Iterator[Tensor]:
    """x [B, T, D] as each block of a stack leaves it, positions counted from 0.

    All blocks of a network have equal heads, so one rotary table serves them all.
    """
    if len(blocks) == 0:
        return
    rotary = cast(TransformerBlock, blocks[0]).self_attn.rotary
    tables = rotary.tables(torch.arange(x.shape[1], device=x.device))
    for block in blocks:
        x = block(x, tables)
        yield x
