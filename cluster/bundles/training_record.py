"""What a bundle's training.json says about the time its weights were trained on."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cluster.candles.data_config import DataConfig
from cluster.data import describe_splits
from model.errors import InputError

TRAINING_FILE = "training.json"
"""In run.output and in a bundle: what cluster.train did, per stage."""

logger = logging.getLogger(__name__)


class TrainingPeriod(NamedTuple):
    """train_ends: where validation begins; no bar from there on was trained on. test_from: where validation ends.

    last_bar: of validation, where nothing was kept for a test and the record says it.
    """

    train_ends: np.datetime64 | None
    test_from: np.datetime64 | None
    last_bar: np.datetime64 | None = None


def training_period(bundle: Path) -> TrainingPeriod | None:
    """None without a training.json, or where the data was simulated. Raises InputError for a file that is not one."""
    path = bundle / TRAINING_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        source = record["config"]["data"]["source"]
        if source["kind"] == "simulated":
            return None
        known: dict[str, Any] = (record.get("splits") or {}) | (record.get("data") or {})
        if "validation_from" not in known:
            known = _splits(record["config"]["data"])
        moments = [known.get(key) for key in ("validation_from", "test_from", "last_bar")]
        return TrainingPeriod(*(None if moment is None else utc_moment(moment) for moment in moments))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a record of cluster.train: {error!r}", code="bad_record") from error


def _splits(config: dict[str, Any]) -> dict[str, str | None]:
    """The moments of a run that did not record them: as configured, or what its shares of the data come to."""
    try:
        return describe_splits(DataConfig.model_validate(config))
    except (InputError, OSError) as error:
        logger.warning("the data that the model was trained on cannot be read any more: %s", error)
        return {}


def utc_moment(text: str) -> np.datetime64:
    """An ISO 8601 date or time, in UTC if it has a time zone. Raises ValueError."""
    datetime.fromisoformat(text)  # pandas reads 07/01/2024, too: as July 1, whoever wrote it
    stamp = pd.Timestamp(text)
    return (stamp.tz_convert("UTC").tz_localize(None) if stamp.tz is not None else stamp).to_datetime64()


def overlap_warning(bundle: Path, first: np.datetime64, last: np.datetime64) -> str | None:
    """For a test period whose forecast bars lie from first to last: whether training has seen some of them."""
    period = training_period(bundle)
    if period is None or period.train_ends is None:
        return None
    if first < period.train_ends:
        return (
            f"the test period starts at {first.astype('datetime64[s]')}, but the model was trained on bars up to "
            f"{period.train_ends.astype('datetime64[s]')} ({TRAINING_FILE}): these scores are not out of sample"
        )
    if period.test_from is not None and first < period.test_from:
        return (
            f"the test period starts at {first.astype('datetime64[s]')}, inside the validation period that the "
            f"checkpoint was chosen on (it ends at {period.test_from.astype('datetime64[s]')}): scores may be a little "
            "too good"
        )
    if period.test_from is None and (period.last_bar is None or first <= period.last_bar):
        until = "" if period.last_bar is None else f" to {period.last_bar.astype('datetime64[s]')}"
        return (
            f"nothing was kept for a test: the checkpoint was chosen on the bars from "
            f"{period.train_ends.astype('datetime64[s]')}{until or ' on'}, and the period starts at "
            f"{first.astype('datetime64[s]')}: scores may be a little too good; take later bars, or train with "
            "data.source.test_share"
        )
    return None
