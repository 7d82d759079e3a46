"""A step of our trainer against the public loop's, on the same windows; and two workers against one. CPU.

    make train-bench ARGS="--reference PATH_OF_A_PUBLIC_CHECKOUT [--steps 8] [--repeat 5] [--threads 2] [--quick]"

Kronos-small's shapes, windows of 101 bars, batches of 8. Both sides encode, predict, go back, clip and step AdamW; ours
also cuts and scales its windows, which the public side is given ready. The public side runs as published: fp32, dropout
.25/.1/.25/.1 (feed-forward, attention, residual, tokens), s1 sampled. Ours runs

- published: the same dropout and the same objective;
- default: as cluster.train does unless told otherwise: no dropout, s1 given (teacher forcing);
- each in fp32 and, where the processor computes it, in bf16 (autocast).

Both sides alternate; figures are medians of samples a second; ratio = ours / public. Without --reference only ours is
measured. Results go to benchmarks/results/DATE-training-cpu.json; a quick run only prints.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.records import table, write
from benchmarks.service import free_port
from benchmarks.shapes import BITS, MODELS, TOKENIZER
from cluster.candles.simulate import simulate
from cluster.data import SplitBars, WindowSet, WindowStream
from cluster.training.config import Optimisation, Phase, PredictorStage
from cluster.training.stages import make_optimizer, make_task
from model.device import precision_obstacle
from model.kronos import Kronos
from model.tokenizer import KronosTokenizer

BARS, BATCH = 101, 8
DROPOUT = {"ffn_dropout_p": 0.25, "attn_dropout_p": 0.1, "resid_dropout_p": 0.25, "token_dropout_p": 0.1}
NONE = dict.fromkeys(DROPOUT, 0.0)
SIDES: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "published": (DROPOUT, {"s2_conditioning": "sampled", "cross_attention": "published"}),
    "default": (NONE, {}),
}


def save_small(folder: Path, dropout: dict[str, float]) -> None:
    """Kronos-small and its tokenizer with random weights."""
    torch.manual_seed(0)
    Kronos(**BITS, **MODELS["small"], **dropout, learn_te=True).save_pretrained(folder / "model")
    KronosTokenizer(**BITS, **TOKENIZER, ffn_dropout_p=0.0, attn_dropout_p=0.0, resid_dropout_p=0.0).save_pretrained(
        folder / "tokenizer"
    )


def stream() -> WindowStream:
    windows = WindowSet(SplitBars("train", simulate(0, 16, 1000)), BARS, min_context=25)
    return WindowStream(windows, 0, BATCH)


class Trainer:
    """The steps of cluster.train's worker, without what surrounds them."""

    def __init__(self, folder: Path, side: str, *, bf16: bool = False, ranks: int = 1) -> None:
        save_small(folder, SIDES[side][0])
        stage = PredictorStage(
            phases=(Phase(steps=1000, window=BARS - 1, batch_size=BATCH),),
            init_from=folder / "model",
            tokenizer=folder / "tokenizer",
            **SIDES[side][1],
        )
        self._task = make_task(stage, folder / "tokenizer")
        self._task.network.train()
        self._network = nn.parallel.DistributedDataParallel(self._task.network) if ranks > 1 else self._task.network
        self._optimizer = make_optimizer(self._task.network, Optimisation(learning_rate=4e-5))
        self._stream, self._bf16, self._number = stream(), bf16, 0

    def seconds(self, steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            batch = self._stream.batch(self._number)
            self._number += 1
            with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
                loss = self._task.loss(self._network, batch, torch.device("cpu"))
            self._optimizer.zero_grad(set_to_none=True)
            loss.total.backward()
            nn.utils.clip_grad_norm_(self._task.network.parameters(), 1.0)
            self._optimizer.step()
        return time.perf_counter() - started


class PublicLoop:
    """The public loop in a process of its own."""

    def __init__(self, checkout: str, folder: Path, threads: int) -> None:
        save_small(folder, DROPOUT)
        batches = [stream().batch(number) for number in range(8)]
        path = folder / "batches.npz"
        np.savez(path, x=np.stack([b.x for b in batches]), marks=np.stack([b.marks for b in batches]))
        command = [sys.executable, str(Path(__file__).with_name("training_worker.py")), checkout, str(folder)]
        self._process = subprocess.Popen(
            [*command, str(path), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self, steps: int) -> float:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the worker has no pipes")
        stdin.write(f"{steps}\n")
        stdin.flush()
        return float(stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def compare(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Samples a second of every side, in turn."""
    runs: dict[str, Callable[[int], float]] = {}
    public = None
    if options.reference:
        public = PublicLoop(options.reference, folder / "public", options.threads)
        runs["public, fp32"] = public.seconds
    slow_bf16 = precision_obstacle("bf16", torch.device("cpu"))
    for side in SIDES:
        for bf16 in (False, True):
            if bf16 and slow_bf16:
                print(f"{side}, bf16 is left out, and the trainer would fall back to fp32: {slow_bf16}", flush=True)
                continue
            name = f"{side}, {'bf16' if bf16 else 'fp32'}"
            runs[name] = Trainer(folder / name.replace(", ", "-"), side, bf16=bf16).seconds
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(1)
    for _ in range(options.repeat):
        for name, run in runs.items():
            rates[name].append(options.steps * BATCH / run(options.steps))
    if public is not None:
        public.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = []
    for name, rate in medians.items():
        row: dict[str, Any] = {"case": name, "samples/s": round(rate, 2)}
        if "public, fp32" in medians and name != "public, fp32":
            row["ratio"] = round(rate / medians["public, fp32"], 3)
        rows.append(row)
        print(row, flush=True)
    return rows


def worker(rank: int, ranks: int, port: int, steps: int, repeat: int, folder: str) -> None:
    """One of `ranks` workers of one thread; the first writes the seconds of its best turn."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    trainer = Trainer(Path(folder) / f"rank-{rank}", "default", ranks=ranks)
    trainer.seconds(1)
    seconds = []
    for _ in range(repeat):
        dist.barrier()
        seconds.append(trainer.seconds(steps))
    if rank == 0:
        (Path(folder) / f"seconds-{ranks}").write_text(str(statistics.median(seconds)))
    dist.destroy_process_group()


def scaling(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """DDP with gloo: one and two workers of one thread, 8 windows each."""
    rates = {}
    for ranks in (1, 2):
        arguments = (ranks, free_port(), options.steps, options.repeat, str(folder))
        torch.multiprocessing.spawn(worker, arguments, nprocs=ranks)
        rates[ranks] = options.steps * BATCH * ranks / float((folder / f"seconds-{ranks}").read_text())
    row = {"case": "DDP, 1 → 2 workers of one thread, default, fp32", "samples/s": round(rates[2], 2)}
    return [row | {"1 worker samples/s": round(rates[1], 2), "ratio": round(rates[2] / rates[1], 3)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="checkout of the public implementation")
    parser.add_argument("--steps", type=int, default=8, help="a turn")
    parser.add_argument("--repeat", type=int, default=5, help="turns of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one step a turn, two turns")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.repeat = 1, 2
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = [*compare(options, Path(folder)), *scaling(options, Path(folder))]
    print(table(rows))
    if not options.quick:
        facts = {"torch": torch.__version__, "threads": options.threads, "batch": BATCH, "bars": BARS}
        print(f"written to {write('training-cpu', rows, **facts, steps=options.steps, repeat=options.repeat)}")


if __name__ == "__main__":
    main()
