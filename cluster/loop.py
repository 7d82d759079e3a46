"""The training loop that runs in every Ray Train worker: one for both stages, one worker or many, CPU or GPU.

Why a restart changes nothing: the batch of a step is a function of (seed, step), torch's generator is seeded anew from
(seed, step, rank) before each step, and weights, optimizer and step come from the checkpoint. There is no other state.
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from safetensors.torch import load_file
from torch import nn

from cluster.config import Stage, TrainConfig, parse_config
from cluster.data import SplitBars, WindowSet, WindowStream, fixed_subset, load_splits
from cluster.stages import Task, learning_rate, make_optimizer, make_task
from model.checkpoint import WEIGHTS_FILE
from model.device import resolve_device
from model.errors import CheckpointMismatchError

NETWORK_FOLDER = "network"
STATE_FILE = "state.pt"


def fingerprint(config: TrainConfig, stage_name: str) -> str:
    """What a checkpoint's run must have in common with the run that resumes it: all that decides the numbers."""
    return json.dumps(
        {
            "seed": config.run.seed,
            "data": config.data.model_dump(mode="json"),
            stage_name: getattr(config, stage_name).model_dump(mode="json"),
        },
        sort_keys=True,
    )


class Worker:
    """One worker's part of one stage. Everything it keeps between steps is an attribute."""

    def __init__(
        self, config: TrainConfig, stage_name: str, tokenizer_folder: Path | None, device: torch.device
    ) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.config, self.name = config, stage_name
        self.stage: Stage = getattr(config, stage_name)
        self.device = device
        torch.manual_seed(config.run.seed)  # the same first weights on every worker
        self.task: Task = make_task(self.stage, tokenizer_folder)
        self.task.network.to(device)
        self.optimizer = make_optimizer(self.task.network, self.stage.optimisation)
        self.step = 0
        self.seconds = 0.0  # of training and validation, over all restarts
        self._splits = load_splits(config.data)
        self._streams: dict[int, WindowStream] = {}
        self._validation = self._make_validation()
        # Wrapped when there is something to synchronise, bare otherwise.
        self.network: nn.Module = self.task.network
        if self.world_size > 1:
            self.network = nn.parallel.DistributedDataParallel(
                self.task.network, device_ids=[device] if device.type == "cuda" else None
            )

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
        windows = self._windows(self._splits["validation"], last.window)
        return windows, fixed_subset(windows, self.stage.validation_windows, self.config.run.seed, last.batch_size)

    def _stream(self, step: int) -> tuple[WindowStream, int]:
        """The stream of the phase that a step belongs to, and the step's number in it."""
        for number, phase in enumerate(self.stage.phases):
            if step < phase.steps:
                if number not in self._streams:
                    windows = self._windows(self._splits["train"], phase.window)
                    self._streams = {number: WindowStream(windows, self.config.run.seed, phase.batch_size)}
                return self._streams[number], step
            step -= phase.steps
        raise IndexError("the step lies after the last phase")

    def seed_step(self, step: int) -> None:
        seed = np.random.SeedSequence([self.config.run.seed, step, self.rank]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed) >> 1)

    def train_step(self) -> tuple[dict[str, float], int]:
        """One step of the optimizer. Returns this worker's losses and the number of bars all workers read."""
        stream, local_step = self._stream(self.step)
        batch = stream.batch(local_step, self.rank, self.world_size)
        rate = learning_rate(self.step, self.stage.steps, self.stage.optimisation)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.seed_step(self.step)
        self.network.train()
        loss = self.task.loss(self.network, batch, self.device)
        # DDP averages gradients over workers; each one's share is its number of scored positions, not 1 / workers.
        share = loss.weight * self.world_size / self._sum(float(loss.weight))
        self.optimizer.zero_grad(set_to_none=True)
        (loss.total * share).backward()
        norm = nn.utils.clip_grad_norm_(self.task.network.parameters(), self.stage.optimisation.clip_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"{self.name} step {self.step}: the gradient is {float(norm)}; lower optimisation.learning_rate"
            )
        self.optimizer.step()
        self.step += 1
        bars = stream.batch_size * stream.windows.length
        values = {name: float(part.detach()) for name, part in loss.parts.items()}
        return {"loss": float(loss.total.detach()), **values, "grad_norm": float(norm), "learning_rate": rate}, bars

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Means over all scored positions of the fixed validation windows. Causal: forward() has no other mode."""
        windows, batches = self._validation
        self.task.network.eval()
        sums: dict[str, float] = {}
        weight = 0
        for number, (ids, contexts) in enumerate(batches[self.rank :: self.world_size]):
            self.seed_step(number)  # a sampled s1 is the same one at every validation
            loss = self.task.loss(self.task.network, windows.batch(ids, contexts), self.device)
            if loss.weight == 0:  # windows whose own bars all lie in their context
                continue
            weight += loss.weight
            for name, value in {"loss": loss.total, **loss.parts}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * loss.weight
        total = self._sum(float(weight))
        if total == 0:
            raise ValueError(f"{self.name}: validation has no position to score; give the validation split more bars")
        names = sorted(["loss", *self._part_names(sums)])
        return {f"validation_{name}": self._sum(sums.get(name, 0.0)) / total for name in names}

    def _part_names(self, sums: dict[str, float]) -> list[str]:
        """The same names on every worker, also on one that had no batch, so that their sums match up."""
        known = ("s1", "s2") if self.name == "predictor" else ("bsq", "reconstruction", "reconstruction_s1")
        return [name for name in known if name in sums or self.world_size > 1]

    def _sum(self, value: float) -> float:
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor)

    def save(self, folder: Path) -> None:
        self.task.save(folder / NETWORK_FOLDER)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "fingerprint": fingerprint(self.config, self.name),
        }
        torch.save(state, folder / STATE_FILE)

    def restore(self, folder: Path) -> None:
        """Takes up a checkpoint of the same run. Raises CheckpointMismatchError if its configuration was another."""
        # weights_only: tensors and plain values, no code.
        state = torch.load(folder / STATE_FILE, map_location=self.device, weights_only=True)
        if state["fingerprint"] != fingerprint(self.config, self.name):
            raise CheckpointMismatchError(
                f"the checkpoint in {folder} was made with another configuration: use another run.name, or the old one"
            )
        self.task.network.load_state_dict(load_file(folder / NETWORK_FOLDER / WEIGHTS_FILE, device=str(self.device)))
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def train_loop(settings: dict[str, Any]) -> None:
    """What Ray Train calls. settings: config (a nested dict), stage, tokenizer_folder, device, run_folder, local."""
    config = parse_config(settings["config"])
    torch.set_num_threads(config.run.threads or max(1, int(config.run.cpus_per_worker)))
    device = ray.train.torch.get_device() if settings["use_gpu"] else resolve_device(settings["device"])[0]
    tokenizer_folder = settings["tokenizer_folder"]
    worker = Worker(config, settings["stage"], Path(tokenizer_folder) if tokenizer_folder else None, device)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            worker.restore(Path(folder))
    log = _Log(worker, Path(settings["run_folder"]))
    log.begin(resumed=checkpoint is not None)
    since = time.monotonic()
    while worker.step < worker.stage.steps:
        losses, bars = worker.train_step()
        log.step(losses, bars)
        if worker.step % worker.stage.validate_every == 0 or worker.step == worker.stage.steps:
            metrics = worker.validate()
            worker.seconds, since = worker.seconds + time.monotonic() - since, time.monotonic()
            log.validation(metrics)
            _report(worker, metrics, settings)


def _report(worker: Worker, metrics: dict[str, float], settings: dict[str, Any]) -> None:
    """Hands metrics and a checkpoint to Ray Train. All workers call it; rank 0 writes."""
    name = f"step_{worker.step:07d}"
    weights = sum(parameter.numel() for parameter in worker.task.network.parameters())
    report = {
        "step": worker.step,
        "weights": weights,
        "device": str(worker.device),
        "seconds": worker.seconds,
        **metrics,
    }
    if worker.rank != 0:
        ray.train.report(report, checkpoint_dir_name=name)
        return
    # Local mode keeps the path it is given; a cluster copies the folder to the run's storage before report returns.
    place = Path(settings["run_folder"]) / name if settings["local"] else None
    with nullcontext(place) if place is not None else tempfile.TemporaryDirectory() as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        worker.save(Path(folder))
        checkpoint = Checkpoint.from_directory(str(folder))
        ray.train.report(report, checkpoint=checkpoint, checkpoint_dir_name=name)


class _Log:
    """Progress of rank 0: a line now and then on stdout, which Ray shows at the driver, and in metrics.jsonl."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self.worker, self.folder = worker, folder
        self.active = worker.rank == 0
        self.started = self.since = time.monotonic()
        self.first_step = worker.step
        self.bars = 0

    def begin(self, *, resumed: bool) -> None:
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = sum(p.numel() for p in self.worker.task.network.parameters())
        how = f"resumed at step {self.worker.step}" if resumed else "from step 0"
        print(
            f"{self.worker.name}: {weights:,} weights, {self.worker.stage.steps} steps {how}, {self.worker.world_size} "
            f"worker(s) on {self.worker.device}, {torch.get_num_threads()} thread(s) each",
            flush=True,
        )

    def step(self, losses: dict[str, float], bars: int) -> None:
        self.bars += bars
        step, steps = self.worker.step, self.worker.stage.steps
        if not self.active or (step % self.worker.stage.log_every and step != steps):
            return
        now = time.monotonic()
        per_step = (now - self.started) / max(1, step - self.first_step)
        rate, self.bars, self.since = self.bars / max(1e-9, now - self.since), 0, now
        shown = " ".join(f"{name} {value:.4f}" for name, value in losses.items() if name != "learning_rate")
        print(
            f"{self.worker.name} step {step}/{steps} {shown} lr {losses['learning_rate']:.2e} "
            f"{rate:,.0f} bars/s {per_step * (steps - step) / 60:.1f} min left",
            flush=True,
        )
        self._write({"step": step, **losses, "bars_per_second": round(rate)})

    def validation(self, metrics: dict[str, float]) -> None:
        if not self.active:
            return
        shown = " ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        print(f"{self.worker.name} step {self.worker.step} {shown}", flush=True)
        self._write({"step": self.worker.step, **metrics})

    def _write(self, record: dict[str, Any]) -> None:
        record["seconds"] = round(time.monotonic() - self.started, 2)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
