"""What differs between training the tokenizer and the predictor: the network, the window, the loss. The loop is one.

A later feature that changes a network (LoRA, freezing) or an optimizer (schedules) belongs here; one that changes a
step (AMP, accumulation) belongs in cluster.loop.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from cluster.config import Optimisation, PredictorStage, Stage, TokenizerStage
from cluster.data import Batch
from model.kronos import Kronos
from model.losses import TokenizerLoss, predictor_loss, tokenizer_loss
from model.tokenizer import KronosTokenizer
from model.types import COLUMNS


class StepLoss(NamedTuple):
    """total: scalar mean over the batch's scored positions, with a gradient. weight: how many there are.

    parts: means over the same positions, for the log.
    """

    total: Tensor
    weight: int
    parts: dict[str, Tensor]


class Task(Protocol):
    """One stage's network and loss."""

    network: nn.Module
    extra_bars: int
    reach_back: bool

    def loss(self, network: nn.Module, batch: Batch, device: torch.device) -> StepLoss: ...
    def save(self, folder: Path) -> None: ...


class TokenizerTask:
    """Reconstructs every position of a window: all of them are what a forecast encodes or decodes."""

    extra_bars = 0
    # Reconstruction scores every bar, so no bar of an earlier split may be in the window.
    reach_back = False

    def __init__(self, stage: TokenizerStage) -> None:
        fresh = stage.init_from is None
        self.network: nn.Module = (
            KronosTokenizer(**stage.network.model_dump())
            if fresh
            else KronosTokenizer.from_pretrained(cast(Path, stage.init_from))
        )
        # None: the published loss, as it stands.
        self.column_weights = None
        if stage.column_weights is not None:
            weights = torch.tensor([getattr(stage.column_weights, name) for name in COLUMNS], dtype=torch.float32)
            self.column_weights = weights / weights.mean()

    def loss(self, network: nn.Module, batch: Batch, device: torch.device) -> StepLoss:
        x = torch.from_numpy(batch.x).to(device)
        if self.column_weights is None:
            loss = tokenizer_loss(cast(KronosTokenizer, network), x)
        else:
            loss = weighted_tokenizer_loss(network, x, self.column_weights.to(device))
        parts = {"reconstruction_s1": loss.reconstruction_s1, "reconstruction": loss.reconstruction, "bsq": loss.bsq}
        return StepLoss(loss.total, x.shape[0] * x.shape[1], parts)

    def save(self, folder: Path) -> None:
        cast(KronosTokenizer, self.network).save_pretrained(folder)


def weighted_tokenizer_loss(network: nn.Module, x: Tensor, weights: Tensor) -> TokenizerLoss:
    """model.losses.tokenizer_loss with columns that count differently; weights [6], mean 1 (all 1: the same loss)."""
    (from_s1, from_both), bsq, _, _ = network(x)
    reconstruction_s1 = ((from_s1 - x) ** 2 * weights).mean()
    reconstruction = ((from_both - x) ** 2 * weights).mean()
    return TokenizerLoss((reconstruction_s1 + reconstruction + bsq) / 2, reconstruction_s1, reconstruction, bsq)


class PredictorTask:
    """Predicts the next bar's two tokens at the positions that a forecaster could have stood at."""

    extra_bars = 1  # the bar after the window is the last position's target
    reach_back = True

    def __init__(self, stage: PredictorStage, tokenizer_folder: Path) -> None:
        self.tokenizer = KronosTokenizer.from_pretrained(tokenizer_folder)
        self.teacher = stage.s2_conditioning == "teacher"
        self.rotate_cross = stage.cross_attention == "published"
        if stage.init_from is not None:
            self.network: nn.Module = Kronos.from_pretrained(stage.init_from)
        else:
            self.network = Kronos(
                s1_bits=self.tokenizer.s1_bits, s2_bits=self.tokenizer.s2_bits, **stage.network.model_dump()
            )

    def loss(self, network: nn.Module, batch: Batch, device: torch.device) -> StepLoss:
        self.tokenizer.to(device)
        with torch.no_grad():
            s1, s2 = self.tokenizer.encode(torch.from_numpy(batch.x).to(device), half=True)
        marks = torch.from_numpy(batch.marks).to(device)
        scored = torch.from_numpy(batch.scored[:, 1:]).to(device)
        s1_targets, s2_targets = s1[:, 1:], s2[:, 1:]
        s1_logits, s2_logits = network(
            s1[:, :-1],
            s2[:, :-1],
            marks[:, :-1],
            use_teacher_forcing=self.teacher,
            s1_targets=s1_targets,
            rotate_cross=self.rotate_cross,
        )
        loss = predictor_loss(
            s1_logits, s2_logits, s1_targets.masked_fill(~scored, -100), s2_targets.masked_fill(~scored, -100)
        )
        return StepLoss(loss.total, int(scored.sum()), {"s1": loss.s1, "s2": loss.s2})

    def save(self, folder: Path) -> None:
        cast(Kronos, self.network).save_pretrained(folder)


def make_task(stage: Stage, tokenizer_folder: Path | None) -> Task:
    """tokenizer_folder: needed by a predictor stage."""
    if isinstance(stage, TokenizerStage):
        return TokenizerTask(stage)
    if isinstance(stage, PredictorStage) and tokenizer_folder is not None:
        return PredictorTask(stage, tokenizer_folder)
    raise TypeError(f"no task for {type(stage).__name__} with tokenizer folder {tokenizer_folder}")


def make_optimizer(network: nn.Module, options: Optimisation) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101). Weight decay shrinks the matrices of linear layers only:
    a norm's gain, a bias or an embedding row that is seldom seen has no reason to go to 0.
    """
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in network.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    rest = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
    )


def learning_rate(step: int, steps: int, options: Optimisation) -> float:
    """Linear warm-up from a tenth of the peak, then a cosine down to final_share of it. step counts from 0."""
    if step < options.warmup_steps:
        return options.learning_rate * (0.1 + 0.9 * (step + 1) / options.warmup_steps)
    progress = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return options.learning_rate * (options.final_share + (1 - options.final_share) * cosine)
