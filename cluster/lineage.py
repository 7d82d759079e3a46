"""Where a network comes from: what went in, by sha256, and what a finetune did to the tokenizer's codes."""

from __future__ import annotations

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.config import DataConfig, Stage, TokenizerStage, TrainConfig
from cluster.data import WindowSet, fixed_subset, load_splits
from cluster.files import sha256_of
from model.checkpoint import WEIGHTS_FILE, resolve_folder
from model.tokenizer import KronosTokenizer


def data_files(data: DataConfig) -> list[Path]:
    """The files that a configured source reads, sorted; none for simulated series."""
    given = getattr(data.source, "path", None)
    if given is None:
        return []
    found: set[Path] = set()
    for item in (given,) if isinstance(given, str | Path) else given:
        for path in [Path(item)] if Path(item).exists() else [Path(p) for p in glob.glob(str(item), recursive=True)]:
            found |= {p for p in path.rglob("*") if p.is_file()} if path.is_dir() else {path}
    return sorted(found)


def data_sha256(data: DataConfig) -> str:
    """Of the names and contents of the input files; of the settings of a simulated source, which are all it is."""
    digest = hashlib.sha256()
    files = data_files(data)
    for path in files:
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    if not files:
        digest.update(json.dumps(data.source.model_dump(mode="json"), sort_keys=True).encode())
    return digest.hexdigest()


def weights_sha256(source: Path | None) -> str | None:
    return sha256_of(resolve_folder(source) / WEIGHTS_FILE) if source is not None else None


def inputs_of(config: TrainConfig, stage: Stage, tokenizer: Path | None) -> dict[str, Any]:
    """Hashes of all that a stage reads."""
    return {
        "data": data_sha256(config.data),
        "init_from": weights_sha256(stage.init_from),
        "tokenizer": weights_sha256(tokenizer),
    }


def parent_of(stage: Stage, inputs: dict[str, Any]) -> dict[str, str] | None:
    """The folder whose weights a stage started from, and their sha256; None for one from scratch."""
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
    windows = WindowSet(split, last.window, stride=config.data.stride, clip=config.data.clip, reach_back=False)
    before, after = (KronosTokenizer.from_pretrained(folder) for folder in (stage.init_from or tuned, tuned))
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
