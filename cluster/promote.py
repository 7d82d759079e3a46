"""Puts a bundle where the server finds it, if it beats its parent and the baselines on held-out data.

python -m cluster.promote models/candidates/mine --report report.json --to models/mine
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.bundles.bundle import (
    CARD_FILE,
    NETWORKS,
    REPORT_FILE,
    check_name,
    copy_networks,
    new_folder,
    open_bundle,
    read_json,
    verify_bundle,
    write_json,
    write_manifest,
)
from cluster.bundles.bundle_card import bundle_card, promotion_section
from cluster.bundles.training_record import TRAINING_FILE, utc_moment
from cluster.export import require_same_weights
from model.calibration import CALIBRATION_FILE
from model.errors import InputError, KronosError
from model.registry import Checkpoint

logger = logging.getLogger(__name__)

BASELINES = ("last_price", "drift", "historical_volatility", "seasonal_naive")
METRIC = "crps"
"""The comparisons that count; a report may hold others."""


def promote(bundle: Path, report_path: Path, target: Path, *, force: str | None = None) -> Checkpoint:
    """Copies the bundle to target, in the place of what is there, with the report in it and the promotion in its card.

    force: the reason why it is promoted although the report says that it has not earned it.
    Atomic, as export is. Raises InputError with every objection, and without a way around it for a report of other
    weights; a CheckpointError for a bundle that does not load.
    """
    check_name(target.name)
    if force is not None and len(force.split()) < 2:
        raise InputError("--force needs the reason in words", code="no_reason")
    checkpoint = open_bundle(bundle)
    training, report = read_json(bundle / TRAINING_FILE), read_json(report_path)
    if "sha256" not in training:
        raise InputError(f"{bundle} was not made by cluster.export: export the run first", code="bad_record")
    require_same_weights(report, checkpoint.sha256)
    faults = objections(report, training)
    if faults and force is None:
        raise InputError(
            f"{bundle} is not promoted: {'; '.join(faults)}. Or give --force and the reason in words",
            code="not_better",
        )
    if faults:
        logger.warning("%s is promoted by force: %s", bundle, "; ".join(faults))
    with new_folder(target, replace=True) as folder:
        copy_networks({part: bundle / part for part in NETWORKS}, folder)
        for name in (TRAINING_FILE, CALIBRATION_FILE):
            if (bundle / name).is_file():
                shutil.copyfile(bundle / name, folder / name)
        write_json(folder / REPORT_FILE, report)
        when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        verdict = "; ".join(faults) if faults else "beats"
        card = bundle_card(target.name, folder, training, report)
        card += promotion_section(when, verdict, force if faults else None)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        write_manifest(folder)
        verify_bundle(folder)
    return open_bundle(target)


def objections(report: dict[str, Any], training: dict[str, Any]) -> list[str]:
    """Why a report is no reason to promote; empty if it is one. training: the bundle's training.json."""
    comparisons = report.get("comparisons")
    if not isinstance(comparisons, list) or not all(isinstance(c, dict) for c in comparisons):
        raise InputError("the report has no list of comparisons: make it with cluster.evaluate", code="bad_report")
    verdicts = {c.get("against"): c.get("verdict") for c in comparisons if c.get("metric") == METRIC}
    parent = training.get("parent")
    found = []
    for against in ([] if parent is None else ["parent"]) + list(BASELINES):
        if against not in verdicts:
            found.append(f"the report does not compare it with {_name(against)}")
        elif verdicts[against] != "beats":
            found.append(f"it {verdicts[against]} {_name(against)}")
    if not found and report.get("verdict") != "beats":
        found.append(f"the report's verdict is {report.get('verdict')!r}")
    return [*found, *_wrong_parent(report, parent), *_not_held_out(report, training)]


def _name(against: str) -> str:
    return "its parent" if against == "parent" else against.replace("_", " ")


def _wrong_parent(report: dict[str, Any], parent: dict[str, Any] | None) -> list[str]:
    compared = (report.get("parent") or {}).get("sha256")
    expected = (parent or {}).get("sha256")
    if compared is None or expected is None or compared == expected:
        return []
    return [f"the report compares it with {compared[:12]}, and its parent is {expected[:12]}"]


def _not_held_out(report: dict[str, Any], training: dict[str, Any]) -> list[str]:
    """Whether the report's period begins before the last moment that training, or the choice of a checkpoint, saw."""
    data = training.get("data") or {}
    chosen_on, held_out = data.get("validation_from"), data.get("test_from")
    if chosen_on is None and held_out is None:
        source = ((training.get("config") or {}).get("data") or {}).get("source") or {}
        if source.get("kind") == "simulated":
            return []
        return ["its training.json does not say which bars were held out of training"]
    period = report.get("period") or {}
    begins = period.get("from") or period.get("first_origin")
    if begins is None:
        return ["the report does not say when its period begins"]
    if held_out is not None:
        if utc_moment(begins) >= utc_moment(held_out):
            return []
        return [f"the report's period begins at {begins}, and only bars from {held_out} on were held out of training"]
    # Without a test period the checkpoint is the best of many on all that came after training: only what came later
    # still is held out.
    last = data.get("last_bar")
    if last is not None and utc_moment(begins) > utc_moment(last):
        return []
    seen = f"from {chosen_on} on" if last is None else f"from {chosen_on} to {last}"
    remedy = "" if last is None else f"evaluate bars after {last}, or "
    return [
        f"no bars were kept for a test: its checkpoint was chosen on those {seen}, and the report's period begins at "
        f"{begins}: {remedy}train with data.source.test_share or test_from"
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.promote",
        description="Copy a bundle to the folder that the server serves, if its report says that it beats its parent "
        "and the baselines on held-out data.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="made by cluster.export")
    parser.add_argument("--report", type=Path, required=True, help="report.json of cluster.evaluate for these weights")
    parser.add_argument("--to", type=Path, required=True, metavar="MODELS_ROOT/NAME", help="what is there is replaced")
    parser.add_argument("--force", metavar="REASON", help="promote it all the same; the reason goes into the card")
    given = parser.parse_args(arguments)
    try:
        made = promote(given.bundle, given.report, given.to, force=given.force)
    except (KronosError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.to}: promoted, sha256 {made.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
