"""Where a network comes from: what went in, by sha256, and what a finetune did to the tokenizer's codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.candles.sources import describe_source
from cluster.data import WindowSet, fixed_subset, load_splits
from cluster.training.config import STAGES, Stage, TokenizerStage, TrainConfig
from model.checkpoint import WEIGHTS_FILE
from model.registry import Part, network_folder, sha256_of
from model.tokenizer import KronosTokenizer


def weights_sha256(source: Path | None, part: Part) -> str | None:
    return sha256_of(network_folder(source, part) / WEIGHTS_FILE) if source is not None else None


def inputs_of(config: TrainConfig, stage: str, tokenizer: Path | None) -> dict[str, Any]:
    """Hashes of all that a stage reads."""
    return {
        "data": describe_source(config.data.source)["sha256"],
        "init_from": weights_sha256(getattr(config, stage).init_from, STAGES[stage]),
        "tokenizer": weights_sha256(tokenizer, "tokenizer"),
    }


def parent_of(stage: Stage, inputs: dict[str, Any]) -> dict[str, str] | None:
    """What the weights that a stage started from are called, and their sha256; None for one from scratch."""
    if stage.init_from is None:
        return None
    return {"folder": stage.init_from.as_posix(), "sha256": inputs["init_from"]}


@torch.no_grad()
def code_drift(config: TrainConfig, stage: TokenizerStage, tuned: Path) -> dict[str, float]:
    """Percent of the validation bars whose s1, and whose s1 or s2, is another than the parent's.

    A predictor that was trained on the parent's codes reads the changed ones wrongly until it is trained again.
    """
    last = stage.phases[-1]
    split = load_splits(config.data)["validation"]
    data = config.data
    windows = WindowSet(split, last.window, stride=data.stride, clip=data.clip, min_context=2, reach_back=False)
    before, after = (
        KronosTokenizer.from_pretrained(network_folder(name, "tokenizer")) for name in (stage.init_from or tuned, tuned)
    )
    changed_s1, changed = [], []
    for ids, contexts in fixed_subset(windows, stage.validation_windows, config.run.seed, 16):
        x = torch.from_numpy(windows.batch(ids, contexts).x)
        (old_s1, old_s2), (new_s1, new_s2) = before.encode(x, half=True), after.encode(x, half=True)
        changed_s1.append((old_s1 != new_s1).numpy().ravel())
        changed.append(((old_s1 != new_s1) | (old_s2 != new_s2)).numpy().ravel())
    return {
        "s1_percent": round(100 * float(np.concatenate(changed_s1).mean()), 2),
        "percent": round(100 * float(np.concatenate(changed).mean()), 2),
    }
