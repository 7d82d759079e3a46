"""What a run says while it works: lines on stdout, which Ray shows at the driver, and records for the loggers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from cluster.files import write_atomically
from cluster.training.loggers import METRICS_FILE, RunLoggers, make_loggers
from cluster.training.worker import Worker


def forget_after(folder: Path, step: int) -> None:
    """Drops the records of steps that will be made again: a resumed run's log is that of one without a break."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the process died while it wrote
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


class Progress:
    """Rank 0 speaks, the others keep still."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self.worker = worker
        self.loggers: RunLoggers | None = None
        self.started = self.since = time.monotonic()
        self.first_step = worker.step
        self.bars = 0
        if worker.group.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            forget_after(folder, worker.step)
            config = worker.config
            self.loggers = make_loggers(config.logging, folder, config.model_dump(mode="json"))

    def begin(self) -> None:
        if self.loggers is None:
            return
        worker = self.worker
        everything, trained = worker.weights()
        how = f"resumed at step {worker.step}" if worker.step else "from step 0"
        print(
            f"{worker.name}: {everything:,} weights, {trained:,} of them trained ({worker.stage.method}), "
            f"{worker.stage.steps} steps {how}, {worker.group.size} worker(s) on {worker.device} in "
            f"{worker.precision.name}, {torch.get_num_threads()} thread(s) each",
            flush=True,
        )

    def step(self, losses: dict[str, float], bars: int) -> None:
        self.bars += bars
        step, steps = self.worker.step, self.worker.stage.steps
        if self.loggers is None or (step % self.worker.stage.log_every and step != steps):
            return
        now = time.monotonic()
        per_step = (now - self.started) / max(1, step - self.first_step)
        rate, self.bars, self.since = self.bars / max(1e-9, now - self.since), 0, now
        shown = " ".join(f"{name} {value:.4f}" for name, value in losses.items() if name != "learning_rate")
        print(
            f"{self.worker.name} {_bar(step / steps)} step {step}/{steps} {shown} lr {losses['learning_rate']:.2e} "
            f"{rate:,.0f} bars/s {per_step * (steps - step) / 60:.1f} min left",
            flush=True,
        )
        self._log(self.loggers, {**losses, "bars_per_second": round(rate)})

    def validation(self, metrics: dict[str, float]) -> None:
        if self.loggers is None:
            return
        shown = " ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        print(f"{self.worker.name} step {self.worker.step} {shown}", flush=True)
        self._log(self.loggers, metrics)

    def _log(self, loggers: RunLoggers, record: dict[str, float]) -> None:
        loggers.log(self.worker.step, record | {"seconds": round(time.monotonic() - self.started, 2)})

    def close(self) -> None:
        if self.loggers is not None:
            self.loggers.close()


def _bar(share: float, width: int = 20) -> str:
    done = round(share * width)
    return f"[{'#' * done}{'-' * (width - done)}]"
