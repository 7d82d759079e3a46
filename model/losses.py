"""Training losses of both networks."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from model.tokenizer import KronosTokenizer


class TokenizerLoss(NamedTuple):
    """Scalars. total = (reconstruction_s1 + reconstruction + bsq) / 2."""

    total: Tensor
    reconstruction_s1: Tensor
    reconstruction: Tensor
    bsq: Tensor


class PredictorLoss(NamedTuple):
    """Scalars in nats per token. total = (s1 + s2) / 2."""

    total: Tensor
    s1: Tensor
    s2: Tensor


def tokenizer_loss(tokenizer: KronosTokenizer, x: Tensor) -> TokenizerLoss:
    """x: normalised candles [B, T, d_in]. Mean squared errors from s1 alone and from both, and the code's loss."""
    (from_s1, from_both), bsq, _, _ = tokenizer(x)
    reconstruction_s1 = F.mse_loss(from_s1, x)
    reconstruction = F.mse_loss(from_both, x)
    return TokenizerLoss((reconstruction_s1 + reconstruction + bsq) / 2, reconstruction_s1, reconstruction, bsq)


def predictor_loss(s1_logits: Tensor, s2_logits: Tensor, s1_targets: Tensor, s2_targets: Tensor) -> PredictorLoss:
    """Mean cross-entropies. Logits [B, T, V]; targets int64 [B, T], −100 where a position is not to be scored."""
    s1 = F.cross_entropy(s1_logits.flatten(0, -2), s1_targets.flatten())
    s2 = F.cross_entropy(s2_logits.flatten(0, -2), s2_targets.flatten())
    return PredictorLoss((s1 + s2) / 2, s1, s2)
