"""What differs between training the tokenizer and the predictor: the network, the window, the loss. The loop is one.

What changes a network (LoRA, freezing) or an optimizer (schedules) is here; what changes a step (precision,
accumulation) is in cluster.training.worker.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cluster.data import Batch
from cluster.training.adapters import ADAPTERS_FILE, add_adapters, load_adapters, merge_adapters, save_adapters
from cluster.training.config import (
    Lora,
    Optimisation,
    PredictorShape,
    PredictorStage,
    Stage,
    TokenizerShape,
    TokenizerStage,
)
from cluster.training.freezing import freeze
from model.checkpoint import WEIGHTS_FILE, PretrainedMixin
from model.errors import CheckpointMismatchError
from model.kronos import Kronos
from model.losses import TokenizerLoss, predictor_loss, tokenizer_loss
from model.registry import network_folder, sha256_of
from model.tokenizer import KronosTokenizer
from model.types import COLUMNS

NETWORK_FOLDER = "network"
"""In a checkpoint: config.json and model.safetensors."""


class StepLoss(NamedTuple):
    """total: scalar mean over the batch's scored positions, with a gradient. weight: how many there are.

    parts: means over the same positions, for the log.
    """

    total: Tensor
    weight: int
    parts: dict[str, Tensor]


class Task(ABC):
    """One stage's network, what of it is trained, and its loss. parts: names of the loss's parts, as in StepLoss."""

    network: nn.Module
    extra_bars: int
    reach_back: bool
    parts: tuple[str, ...]

    def __init__(self, stage: Stage, network: nn.Module, parent: Path | None) -> None:
        """parent: local folder of the weights that network was loaded from."""
        self.network = network
        self.lora = (stage.lora or Lora()) if stage.method == "lora" else None
        self.base_sha256 = ""
        if self.lora is not None:
            self.base_sha256 = sha256_of(cast(Path, parent) / WEIGHTS_FILE)
            add_adapters(network, self.lora)
        else:
            freeze(network, stage.depth or 5)

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch, device: torch.device) -> StepLoss: ...

    @abstractmethod
    def weight(self, batch: Batch) -> int:
        """The weight that the loss of this batch will have."""

    def save(self, folder: Path) -> None:
        """The weights as they are trained: the network, or the adapters alone."""
        if self.lora is None:
            cast(PretrainedMixin, self.network).save_pretrained(folder / NETWORK_FOLDER)
        else:
            save_adapters(self.network, self.lora, self.base_sha256, folder / ADAPTERS_FILE)

    def load(self, folder: Path) -> None:
        """What save wrote. Raises CheckpointMismatchError for adapters of other weights."""
        if self.lora is None:
            self.network.load_state_dict(load_file(folder / NETWORK_FOLDER / WEIGHTS_FILE))
        else:
            load_adapters(self.network, folder / ADAPTERS_FILE, self.base_sha256)

    def export(self, folder: Path) -> None:
        """The network as others load it: adapters merged."""
        network = self.network if self.lora is None else merge_adapters(self.network)
        cast(PretrainedMixin, network).save_pretrained(folder)


class TokenizerTask(Task):
    """Reconstructs every position of a window: all of them are what a forecast encodes or decodes."""

    extra_bars = 0
    parts = ("bsq", "reconstruction", "reconstruction_s1")
    # Reconstruction scores every bar, so no bar of an earlier split may be in the window.
    reach_back = False

    def __init__(self, stage: TokenizerStage) -> None:
        parent = network_folder(stage.init_from, "tokenizer") if stage.init_from is not None else None
        if parent is not None:
            network = KronosTokenizer.from_pretrained(parent)
        else:
            network = KronosTokenizer(**(stage.network or TokenizerShape()).model_dump())
        super().__init__(stage, network, parent)
        # Unit vectors and their entropies stay fp32 in mixed precision.
        network.tokenizer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
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
        return StepLoss(loss.total, self.weight(batch), parts)

    def weight(self, batch: Batch) -> int:
        return batch.x.shape[0] * batch.x.shape[1]


def weighted_tokenizer_loss(network: nn.Module, x: Tensor, weights: Tensor) -> TokenizerLoss:
    """model.losses.tokenizer_loss with columns that count differently; weights [6], mean 1 (all 1: the same loss)."""
    (from_s1, from_both), bsq, _, _ = network(x)
    reconstruction_s1 = ((from_s1 - x) ** 2 * weights).mean()
    reconstruction = ((from_both - x) ** 2 * weights).mean()
    return TokenizerLoss((reconstruction_s1 + reconstruction + bsq) / 2, reconstruction_s1, reconstruction, bsq)


class PredictorTask(Task):
    """Predicts the next bar's two tokens at the positions that a forecaster could have stood at."""

    extra_bars = 1  # the bar after the window is the last position's target
    reach_back = True
    parts = ("s1", "s2")

    def __init__(self, stage: PredictorStage, tokenizer_folder: Path) -> None:
        self.tokenizer = KronosTokenizer.from_pretrained(network_folder(tokenizer_folder, "tokenizer"))
        self.sampled_share = {"teacher": 0.0, "sampled": 1.0, "mixed": stage.mixed_share}[stage.s2_conditioning]
        self.rotate_cross = stage.cross_attention == "published"
        bits = (self.tokenizer.s1_bits, self.tokenizer.s2_bits)
        parent = network_folder(stage.init_from, "model") if stage.init_from is not None else None
        if parent is not None:
            network = Kronos.from_pretrained(parent)
            if (network.s1_bits, network.s2_bits) != bits:
                raise CheckpointMismatchError(
                    f"the predictor in {stage.init_from} has tokens of {network.s1_bits} + {network.s2_bits} bits, the "
                    f"tokenizer in {tokenizer_folder} makes {bits[0]} + {bits[1]}: they are no pair"
                )
        else:
            network = Kronos(*bits, **(stage.network or PredictorShape()).model_dump())
        super().__init__(stage, network, parent)

    def loss(self, network: nn.Module, batch: Batch, device: torch.device) -> StepLoss:
        self.tokenizer.to(device)
        # The codes are those that a forecast is made with, whatever the training's precision.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            s1, s2 = self.tokenizer.encode(torch.from_numpy(batch.x).to(device), half=True)
        marks = torch.from_numpy(batch.marks).to(device)
        scored = torch.from_numpy(batch.scored[:, 1:]).to(device)
        s1_targets, s2_targets = s1[:, 1:], s2[:, 1:]
        s1_logits, s2_logits = network(
            s1[:, :-1],
            s2[:, :-1],
            marks[:, :-1],
            use_teacher_forcing=self.sampled_share < 1,
            s1_targets=s1_targets,
            sampled_share=self.sampled_share,
            rotate_cross=self.rotate_cross,
        )
        weight = self.weight(batch)
        if weight == 0:  # nothing to take the mean of, but every worker must have a gradient to share
            nothing = (s1_logits.sum() + s2_logits.sum()) * 0.0
            return StepLoss(nothing, 0, {"s1": nothing, "s2": nothing})
        loss = predictor_loss(
            s1_logits.float(),
            s2_logits.float(),
            s1_targets.masked_fill(~scored, -100),
            s2_targets.masked_fill(~scored, -100),
        )
        return StepLoss(loss.total, weight, {"s1": loss.s1, "s2": loss.s2})

    def weight(self, batch: Batch) -> int:
        return int(batch.scored[:, 1:].sum())


def make_task(stage: Stage, tokenizer_folder: Path | None) -> Task:
    """tokenizer_folder: needed by a predictor stage; named as predictor.tokenizer is."""
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
        fused=True,  # one pass over the weights: 31 instead of 205 ms a step of Kronos-small on a CPU
    )


def learning_rate(step: int, steps: int, options: Optimisation) -> float:
    """Linear warm-up from a tenth of the peak, then a cosine down to final_share of it. step counts from 0."""
    if step < options.warmup_steps:
        return options.learning_rate * (0.1 + 0.9 * (step + 1) / options.warmup_steps)
    progress = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return options.learning_rate * (options.final_share + (1 - options.final_share) * cosine)
