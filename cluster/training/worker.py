"""One worker of one stage: network, optimizer, its share of every batch; a step, a validation, a checkpoint.

Why a restart changes nothing: the batch of a step is a function of (seed, step), torch's generator is seeded anew from
(seed, step, rank) before each step, and the rest (weights, optimizer, loss scale, counters) is in the checkpoint.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cluster.candles.bars import crooked_bars_warning
from cluster.data import Batch, SplitBars, WindowSet, WindowStream, fixed_subset, load_splits, split_moments
from cluster.training.config import Stage, TrainConfig
from cluster.training.freezing import trained_parameters
from cluster.training.group import Group
from cluster.training.precision import resolve_training_precision
from cluster.training.stages import Task, learning_rate, make_optimizer, make_task
from model.errors import InputError, KronosError

STATE_FILE = "state.pt"
VALIDATION_ROWS = 32
"""Windows validated at once where the batch size is still to be found."""


class DivergedError(KronosError, ArithmeticError):
    """Too many steps in a row had a gradient that is not finite."""


class Worker:
    """Everything it keeps between steps is an attribute."""

    def __init__(
        self,
        config: TrainConfig,
        stage_name: str,
        tokenizer_folder: Path | None,
        device: torch.device,
        group: Group | None = None,
    ) -> None:
        self.group = group or Group(device=device)
        self.config, self.name, self.device = config, stage_name, device
        self.stage: Stage = getattr(config, stage_name)
        torch.manual_seed(config.run.seed)  # the same first weights on every worker
        self.task: Task = make_task(self.stage, tokenizer_folder)
        self.task.network.to(device)
        self.precision = resolve_training_precision(config.training.precision, device)
        self.scaler = self.precision.scaler()
        self.optimizer = make_optimizer(self.task.network, self.stage.optimisation)
        self.batch_sizes = [phase.batch_size for phase in self.stage.phases]  # auto: training.memory replaces it
        self.micro_batch_size = config.training.micro_batch_size
        self.step = 0
        self.bars = 0  # read by all workers
        self.seconds = 0.0  # of training and validation, over all restarts
        self.skipped = self.skipped_in_a_row = 0
        self.best_loss: float | None = None
        self.validations_since_best = 0
        self._splits = load_splits(config.data)
        self._streams: dict[int, WindowStream] = {}
        self._validation = self._make_validation()
        # Wrapped when there is something to synchronise, bare otherwise.
        self.network: nn.Module = self.task.network
        if self.group.size > 1:
            self.network = nn.parallel.DistributedDataParallel(
                self.task.network, device_ids=[device] if device.type == "cuda" else None
            )

    def split_moments(self) -> dict[str, str]:
        """Where the data is split by time: validation_from, and test_from or else last_bar; in ISO 8601."""
        begins = [split.begins for split in self._splits.values() if split.begins is not None]
        return split_moments(begins, self._splits["validation"].series)

    def warnings(self) -> list[str]:
        """What the run's record must say of how it was computed and of its bars."""
        series = list(self._splits.values())[-1].series  # the last split's windows reach back: it has all bars
        return [text for text in (self.precision.warning, crooked_bars_warning(series)) if text]

    def windows(self, split: str, bars: int) -> WindowSet:
        return self._windows(self._splits[split], bars)

    def _windows(self, split: SplitBars, bars: int) -> WindowSet:
        data = self.config.data
        return WindowSet(
            split,
            bars + self.task.extra_bars,
            stride=data.stride,
            clip=data.clip,
            min_context=max(2, int(bars * data.min_context_share)),
            reach_back=self.task.reach_back,
        )

    def _make_validation(self) -> tuple[WindowSet, list[tuple[np.ndarray, np.ndarray]]]:
        last = self.stage.phases[-1]
        windows = self.windows("validation", last.window)
        at_once = self.micro_batch_size or last.batch_size
        rows = at_once if isinstance(at_once, int) else VALIDATION_ROWS
        return windows, fixed_subset(windows, self.stage.validation_windows, self.config.run.seed, rows)

    def _stream(self, step: int) -> tuple[WindowStream, int]:
        """The stream of the phase that a step belongs to, and the step's number in it."""
        for number, phase in enumerate(self.stage.phases):
            if step < phase.steps:
                if number not in self._streams:
                    size = self.batch_sizes[number]
                    if not isinstance(size, int):
                        raise TypeError(f"the batch size of phase {number} has not been found yet")
                    windows = self.windows("train", phase.window)
                    self._streams = {number: WindowStream(windows, self.config.run.seed, size)}
                return self._streams[number], step
            step -= phase.steps
        raise IndexError("the step lies after the last phase")

    def seed_step(self, step: int) -> None:
        seed = np.random.SeedSequence([self.config.run.seed, step, self.group.rank]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed) >> 1)

    def train_step(self) -> tuple[dict[str, float], int]:
        """One step of the optimizer. Returns this worker's losses and the number of bars all workers read.

        A gradient that is not finite changes no weight: the step is skipped and counted (losses has "skipped"). Raises
        DivergedError, on every worker, when that has happened more than max_skipped times in a row.
        """
        stream, local_step = self._stream(self.step)
        batch = stream.batch(local_step, self.group.rank, self.group.size)
        rate = learning_rate(self.step, self.stage.steps, self.stage.optimisation)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.seed_step(self.step)
        losses = self.add_gradients(batch)
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.task.network.parameters(), self.stage.optimisation.clip_norm))
        self._update(norm)
        self.step += 1
        bars = stream.batch_size * stream.windows.length
        self.bars += bars
        losses |= {"grad_norm": norm, "learning_rate": rate}
        return losses | ({"skipped": float(self.skipped)} if self.skipped else {}), bars

    def add_gradients(self, batch: Batch) -> dict[str, float]:
        """Forward and backward over this worker's share of a batch, some windows at a time. Returns the mean losses.

        Whatever the pieces, the gradient is that of the mean over all positions that all workers score: each piece
        counts by its number of them. Only the last piece's backward exchanges gradients.
        """
        mine = self.task.weight(batch)
        total = self.group.sums(float(mine))[0]
        self.optimizer.zero_grad(set_to_none=True)
        self.network.train()
        pieces = self._pieces(batch)
        means: dict[str, float] = {}
        for number, piece in enumerate(pieces):
            with self._exchange(number == len(pieces) - 1):
                with self.precision.autocast():
                    loss = self.task.loss(self.network, piece, self.device)
                # DDP averages over workers: a piece's share is its positions of all, not 1 / workers.
                share = loss.weight * self.group.size / total
                self.scaler.scale(loss.total * share).backward()
            for name, value in {"loss": loss.total, **loss.parts}.items():
                means[name] = means.get(name, 0.0) + float(value.detach()) * (loss.weight / max(1, mine))
        return means

    def _pieces(self, batch: Batch) -> list[Batch]:
        rows, size = len(batch.x), self.micro_batch_size
        if not isinstance(size, int) or size >= rows:
            return [batch]
        return [
            Batch(**{field.name: getattr(batch, field.name)[first : first + size] for field in fields(batch)})
            for first in range(0, rows, size)
        ]

    def _exchange(self, last: bool) -> AbstractContextManager[None]:
        if isinstance(self.network, nn.parallel.DistributedDataParallel) and not last:
            return self.network.no_sync()
        return nullcontext()

    def _update(self, norm: float) -> None:
        if np.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.scaler.update()
        if self.skipped_in_a_row > self.stage.optimisation.max_skipped:
            raise DivergedError(
                f"{self.name} step {self.step}: the gradient is {norm}, as in {self.skipped_in_a_row} steps in a row, "
                "more than optimisation.max_skipped; lower optimisation.learning_rate, or look for broken bars"
            )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Means over all scored positions of the fixed validation windows. Causal: forward() has no other mode."""
        windows, batches = self._validation
        self.task.network.eval()
        sums: dict[str, float] = {}
        weight = 0
        for number, (ids, contexts) in enumerate(batches[self.group.rank :: self.group.size]):
            self.seed_step(number)  # a sampled s1 is the same one at every validation
            with self.precision.autocast():
                loss = self.task.loss(self.task.network, windows.batch(ids, contexts), self.device)
            if loss.weight == 0:  # windows whose own bars all lie in their context
                continue
            weight += loss.weight
            for name, value in {"loss": loss.total, **loss.parts}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * loss.weight
        names = ["loss", *self.task.parts]
        total, *values = self.group.sums(float(weight), *(sums.get(name, 0.0) for name in names))
        if total == 0:
            raise InputError(
                f"{self.name}: validation has no position to score; give the validation split more bars",
                code="empty_validation",
            )
        if not np.isfinite(values[0]):
            raise DivergedError(f"{self.name} step {self.step}: the validation loss is {values[0]}; lower the rate")
        return {f"validation_{name}": value / total for name, value in zip(names, values, strict=True)}

    def note_validation(self, loss: float) -> None:
        """For early stopping: is this the best so far, by min_delta?"""
        least = self.stage.early_stopping.min_delta if self.stage.early_stopping else 0.0
        if self.best_loss is None or loss < self.best_loss - least:
            self.best_loss, self.validations_since_best = loss, 0
        else:
            self.validations_since_best += 1

    @property
    def stopped_early(self) -> bool:
        rule = self.stage.early_stopping
        return rule is not None and self.validations_since_best >= rule.patience

    @property
    def finished(self) -> bool:
        return self.step >= self.stage.steps or self.stopped_early

    def weights(self) -> tuple[int, int]:
        """(weights in all, weights that are trained)."""
        everything = sum(parameter.numel() for parameter in self.task.network.parameters())
        return everything, sum(parameter.numel() for parameter in trained_parameters(self.task.network))

    def save(self, folder: Path) -> None:
        """Weights as safetensors, the rest as a file of tensors and plain values."""
        self.task.save(folder)
        state = {name: getattr(self, name) for name in _COUNTERS}
        state |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        torch.save(state, folder / STATE_FILE)

    def restore(self, folder: Path) -> None:
        """Takes up what save wrote; whether it belongs to this run, cluster.training.checkpoints has found out."""
        # weights_only: tensors and plain values, no code.
        state = torch.load(folder / STATE_FILE, map_location=self.device, weights_only=True)
        self.task.load(folder)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in _COUNTERS:
            setattr(self, name, state[name])


_COUNTERS = ("step", "bars", "seconds", "skipped", "skipped_in_a_row", "best_loss", "validations_since_best")
