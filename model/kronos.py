"""Kronos: the autoregressive predictor over pairs of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.checkpoint import PretrainedMixin
from model.layers import Attention, RMSNorm, TransformerBlock, run_blocks
from model.types import MARK_SIZES

CROSS_ATTENTION_HEADS = 4
"""Of every published size, whatever n_heads is."""

Recall = Callable[[Tensor], Tensor]
"""q [B, H, 1, d] → what it finds among the cached keys and values of DependencyLayer.memory, [B, H, 1, d]."""


class TokenEmbedding(nn.Module):
    """Embeds both tokens of a bar and fuses them to one vector."""

    def __init__(self, s1_bits: int, s2_bits: int, d_model: int) -> None:
        super().__init__()
        self.emb_s1 = nn.Embedding(2**s1_bits, d_model)
        self.emb_s2 = nn.Embedding(2**s2_bits, d_model)
        self.fusion_proj = nn.Linear(2 * d_model, d_model)
        self.scale = math.sqrt(d_model)

    def forward(self, s1: Tensor, s2: Tensor) -> Tensor:
        """int64 [B, T] each → [B, T, D]."""
        return self.fusion_proj(torch.cat((self.emb_s1(s1) * self.scale, self.emb_s2(s2) * self.scale), dim=-1))


class SinusoidTable(nn.Module):
    """A fixed table of sinusoids that lies in the state dict like a learned one (learn_te=False)."""

    def __init__(self, size: int, d_model: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.arange(0, d_model, 2).float() * -(math.log(10000.0) / d_model))
        angles = torch.arange(size).float().unsqueeze(1) * frequencies
        self.emb = nn.Embedding(size, d_model)
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
        self.emb.weight = nn.Parameter(table, requires_grad=False)

    def forward(self, index: Tensor) -> Tensor:
        return self.emb(index)


class TimeEmbedding(nn.Module):
    """The sum of one embedding per time mark."""

    def __init__(self, d_model: int, learned: bool) -> None:
        super().__init__()
        table = nn.Embedding if learned else SinusoidTable
        minutes, hours, weekdays, days, months = MARK_SIZES
        self.minute_embed = table(minutes, d_model)
        self.hour_embed = table(hours, d_model)
        self.weekday_embed = table(weekdays, d_model)
        self.day_embed = table(days, d_model)
        self.month_embed = table(months, d_model)

    def forward(self, marks: Tensor) -> Tensor:
        """marks [B, T, 5] in the order of model.types.TIME_MARKS → [B, T, D]."""
        minute, hour, weekday, day, month = marks.long().unbind(-1)
        # The order of this sum is the published one: another order rounds differently.
        return (
            self.hour_embed(hour)
            + self.weekday_embed(weekday)
            + self.day_embed(day)
            + self.month_embed(month)
            + self.minute_embed(minute)
        )


class DependencyLayer(nn.Module):
    """Lets the fine token s2 depend on the coarse token s1 of the same bar: s1 asks, the context answers."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.cross_attn = Attention(d_model, CROSS_ATTENTION_HEADS)
        self.norm = RMSNorm(d_model)

    def forward(self, context: Tensor, s1_embedded: Tensor, *, rotated: bool) -> Tensor:
        """A whole sequence, causal: context and s1_embedded [B, T, D] → [B, T, D]."""
        tables = None
        if rotated:
            tables = self.cross_attn.rotary.tables(torch.arange(context.shape[1], device=context.device))
        return self.norm(context + self.cross_attn(s1_embedded, context, tables))

    def last(self, context: Tensor, s1_embedded: Tensor, recall: Recall | None = None) -> Tensor:
        """The newest position only: context [B, T, D], s1_embedded [B, 1, D] → [B, 1, D].

        With recall, context may be the newest position alone.
        Not rotated: the published weights are run with every key at position 0 (docs/parity.md, "cross-attention").
        """
        cross = self.cross_attn
        if recall is None:
            mixed = cross(s1_embedded, context, None, causal=False)
        else:
            mixed = cross.merge(recall(cross.split_heads(cross.q_proj(s1_embedded))))
        return self.norm(context[:, -1:] + mixed)

    def memory(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, d] that later bars ask; they depend on nothing later, so they can be cached."""
        cross = self.cross_attn
        return cross.split_heads(cross.k_proj(context)), cross.split_heads(cross.v_proj(context))


class DualHead(nn.Module):
    """One projection to logits per token."""

    def __init__(self, s1_bits: int, s2_bits: int, d_model: int) -> None:
        super().__init__()
        self.proj_s1 = nn.Linear(d_model, 2**s1_bits)
        self.proj_s2 = nn.Linear(d_model, 2**s2_bits)


class Kronos(PretrainedMixin, nn.Module):
    """Decoder-only transformer that predicts the next bar's s1, then its s2 given s1."""

    def __init__(
        self,
        s1_bits: int,
        s2_bits: int,
        n_layers: int,
        d_model: int,
        n_heads: int,
        ff_dim: int,
        ffn_dropout_p: float,
        attn_dropout_p: float,
        resid_dropout_p: float,
        token_dropout_p: float,
        learn_te: bool,
    ) -> None:
        super().__init__()
        self.s1_bits, self.s2_bits = s1_bits, s2_bits
        self.d_model = d_model
        self.token_drop = nn.Dropout(token_dropout_p)
        self.embedding = TokenEmbedding(s1_bits, s2_bits, d_model)
        self.time_emb = TimeEmbedding(d_model, learn_te)
        self.transformer = nn.ModuleList(
            TransformerBlock(d_model, n_heads, ff_dim, ffn_dropout_p, attn_dropout_p, resid_dropout_p)
            for _ in range(n_layers)
        )
        self.norm = RMSNorm(d_model)
        self.dep_layer = DependencyLayer(d_model)
        self.head = DualHead(s1_bits, s2_bits, d_model)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding) and module.weight.requires_grad:
            nn.init.normal_(module.weight, std=self.d_model**-0.5)

    def context(self, s1_ids: Tensor, s2_ids: Tensor, stamp: Tensor | None = None) -> Tensor:
        """Tokens int64 [B, T] and time marks [B, T, 5] → context [B, T, D]; position t sees bars up to t."""
        x = self.embedding(s1_ids, s2_ids)
        if stamp is not None:
            x = x + self.time_emb(stamp)
        return self.norm(run_blocks(self.transformer, self.token_drop(x)))

    def forward(
        self,
        s1_ids: Tensor,
        s2_ids: Tensor,
        stamp: Tensor | None = None,
        *,
        use_teacher_forcing: bool = False,
        s1_targets: Tensor | None = None,
        sampled_share: float = 0.0,
        rotate_cross: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """A whole sequence, for training and scoring: logits of s1 [B, T, 2^s1_bits] and s2 [B, T, 2^s2_bits].

        Position t predicts bar t + 1. s2 is conditioned on s1_targets [B, T] with use_teacher_forcing, else on an s1
        drawn from the model's own logits with torch's global generator; with sampled_share, that share of the positions
        has a drawn s1 in spite of use_teacher_forcing. Always causal, in training and evaluation.
        rotate_cross=True is how the published weights were trained; False is how they are run (DependencyLayer.last).
        """
        context = self.context(s1_ids, s2_ids, stamp)
        s1_logits = self.head.proj_s1(context)
        if use_teacher_forcing:
            if s1_targets is None:
                raise ValueError("use_teacher_forcing=True needs s1_targets")
            s1 = s1_targets
            if sampled_share > 0:
                drawn = torch.rand(s1.shape, device=s1.device) < sampled_share
                s1 = torch.where(drawn, self._draw_s1(s1_logits), s1)
        else:
            s1 = self._draw_s1(s1_logits)
        conditioned = self.dep_layer(context, self.embedding.emb_s1(s1), rotated=rotate_cross)
        return s1_logits, self.head.proj_s2(conditioned)

    @staticmethod
    def _draw_s1(s1_logits: Tensor) -> Tensor:
        """[B, T, 2^s1_bits] → int64 [B, T], with torch's global generator."""
        probabilities = s1_logits.detach().float().softmax(-1)
        return torch.multinomial(probabilities.flatten(0, 1), 1).view(s1_logits.shape[:2])

    def next_s1_logits(self, context: Tensor) -> Tensor:
        """context [B, T, D] → logits [B, 2^s1_bits] of the bar after the last one."""
        return self.head.proj_s1(context[:, -1])

    def next_s2_logits(self, context: Tensor, s1: Tensor, recall: Recall | None = None) -> Tensor:
        """context [B, T, D] and the chosen s1 [B] → logits [B, 2^s2_bits] of the same bar."""
        conditioned = self.dep_layer.last(context, self.embedding.emb_s1(s1.unsqueeze(1)), recall)
        return self.head.proj_s2(conditioned[:, -1])
