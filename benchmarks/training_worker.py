"""Steps of the public training loop, from a checkout given by path. A process of its own: its package is `model` too.

    python benchmarks/training_worker.py CHECKOUT WEIGHTS_FOLDER BATCHES.npz THREADS

Reads a number of steps a line and answers with the seconds that they took: what its finetuning script does for a batch
that lies in memory: encode, forward, loss, backward, clip, AdamW, the schedule.
"""

import sys
import time

import numpy as np
import torch
from public_checkout import load  # the folder of this script comes first in sys.path


def main(checkout: str, weights: str, batches: str, threads: str) -> None:
    _, model, tokenizer = load(checkout, weights)
    torch.set_num_threads(int(threads))
    stored = np.load(batches)
    x, marks = torch.from_numpy(stored["x"]), torch.from_numpy(stored["marks"]).float()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-5, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-5, total_steps=1_000_000, pct_start=0.03, div_factor=10
    )

    def step(number: int) -> None:
        with torch.no_grad():
            s1, s2 = tokenizer.encode(x[number], half=True)
        s1_logits, s2_logits = model(s1[:, :-1], s2[:, :-1], marks[number][:, :-1])
        loss, _, _ = model.head.compute_loss(s1_logits, s2_logits, s1[:, 1:], s2[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=3.0)
        optimizer.step()
        schedule.step()

    for line in sys.stdin:
        started = time.perf_counter()
        for number in range(int(line)):
            step(number % len(x))
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
