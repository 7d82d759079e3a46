"""Makes a bundle of what a training run wrote: verified, described, and served by its folder's name.

    python -m cluster.export runs/mine/output models/mine

Under the server's models_root it is listed and served at once, without a restart.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.bundles.bundle import (
    CARD_FILE,
    REPORT_FILE,
    check_name,
    copy_networks,
    digest_of_pair,
    new_folder,
    open_bundle,
    pair_sha256,
    read_json,
    verify_bundle,
    write_json,
    write_manifest,
)
from cluster.bundles.bundle_card import bundle_card
from cluster.bundles.training_record import TRAINING_FILE
from cluster.candles.data_config import DataConfig
from cluster.candles.sources import describe_source
from cluster.data import describe_splits
from cluster.redact import redact
from model.calibration import CALIBRATION_FILE
from model.checkpoint import WEIGHTS_FILE
from model.errors import CheckpointError, CheckpointMismatchError, CheckpointNotFoundError, InputError, KronosError
from model.registry import Checkpoint, brings_tokenizer, network_folder, sha256_of

logger = logging.getLogger(__name__)


def export(
    run_output: Path,
    destination: Path,
    *,
    name: str | None = None,
    report: Path | None = None,
    calibration: Path | None = None,
    replace: bool = False,
) -> Checkpoint:
    """Writes the bundle and returns it as the server would load it.

    run_output: run.output of the training run: model/, training.json, and tokenizer/ or a record of where it is.
    name: in the card; default: the folder's. report, calibration: files to take along; default: those in run_output.
    Atomic: destination is not there, or is what it was, until all is written and verified. Raises InputError, or a
    CheckpointError for weights that do not make a working model.
    """
    check_name(destination.name)
    if not (run_output / TRAINING_FILE).is_file():
        text = f"there is no {run_output / TRAINING_FILE}: give run.output of a training run"
        raise InputError(text, code="no_such_file")
    training = read_json(run_output / TRAINING_FILE)
    if (training.get("config") or {}).get("predictor") and "predictor" not in training.get("stages", {}):
        text = f"{run_output} is of a run whose predictor is not finished: the command that began it goes on"
        raise InputError(text, code="unfinished")
    networks = {"model": run_output / "model", "tokenizer": _tokenizer_of(run_output, training)}
    with new_folder(destination, replace=replace) as folder:
        copy_networks(networks, folder)
        sha256 = pair_sha256(folder / "model", folder / "tokenizer")
        record = redact(training) | {
            "sha256": sha256,
            "data": _data_of(training),
            "parent": parent_of(training, networks["tokenizer"]),
        }
        write_json(folder / TRAINING_FILE, record)
        for file, given in ((REPORT_FILE, report), (CALIBRATION_FILE, calibration)):
            source = given or run_output / file
            if given is not None or source.is_file():
                read_json(source)
                shutil.copyfile(source, folder / file)
        numbers = read_json(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else None
        if numbers is not None:
            require_same_weights(numbers, sha256)
        card = bundle_card(name or destination.name, folder, record, numbers)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        write_manifest(folder)
        verify_bundle(folder)
    return open_bundle(destination)


def require_same_weights(report: dict[str, Any], sha256: str) -> None:
    """Raises InputError if a report is about other weights."""
    measured = (report.get("model") or {}).get("sha256")
    if measured != sha256:
        raise InputError(
            f"the report is about weights {str(measured)[:12]}, and these are {sha256[:12]}: evaluate these",
            code="other_weights",
        )


def _tokenizer_of(run_output: Path, training: dict[str, Any]) -> Path:
    """The run's own tokenizer, else the one that it was trained with."""
    if (run_output / "tokenizer").is_dir():
        return run_output / "tokenizer"
    used = ((training.get("config") or {}).get("predictor") or {}).get("tokenizer")
    fault, remedy = f"{run_output} has no tokenizer/", "put the tokenizer that the model was trained with there"
    if used is None:
        raise InputError(f"{fault}: {remedy}", code="no_such_file")
    try:
        return network_folder(used, "tokenizer")
    except CheckpointNotFoundError as error:
        raise InputError(f"{fault}, and {used} is not there ({error}): {remedy}", code="no_such_file") from error


def parent_of(training: dict[str, Any], tokenizer: Path) -> dict[str, Any] | None:
    """{"name", "sha256"} of what training began from; None if it began from nothing.

    sha256 is that of the pair: the parent's model with the tokenizer that its name brings or that lies beside it, else
    with the one that the run's tokenizer began from, else with the one that was trained with. Where those weights are
    not there any more, or are others by now, it comes from what the run recorded; it is None without such a record.
    """
    config, stages = training.get("config") or {}, training.get("stages") or {}
    began = (config.get("predictor") or {}).get("init_from")
    if began is None:
        return None
    # A tokenizer that was finetuned as well is not the one that the parent had.
    tuned = (config.get("tokenizer") or {}).get("init_from")
    of_predictor, of_tokenizer = ((stages.get(stage) or {}).get("inputs") or {} for stage in ("predictor", "tokenizer"))
    known = of_predictor.get("init_from")
    known_tokenizer = of_predictor.get("tokenizer") if tuned is None else of_tokenizer.get("init_from")
    name = _name_of(Path(began))
    beside = Path(began).parent / "tokenizer"
    try:
        found = network_folder(began, "model")
        if known is not None and sha256_of(found / WEIGHTS_FILE) != known:
            raise CheckpointMismatchError(f"{began} has other weights now")
        if brings_tokenizer(began):
            beside = network_folder(began, "tokenizer")
        elif not beside.is_dir():
            beside = network_folder(tuned, "tokenizer") if tuned is not None else tokenizer
        return {"name": name, "sha256": pair_sha256(found, beside)}
    except (CheckpointError, OSError) as error:
        if known and known_tokenizer:
            return {"name": name, "sha256": digest_of_pair(known, known_tokenizer)}
        logger.warning("the parent %s is not there any more, its sha256 is not recorded: %s", began, error)
        return {"name": name, "sha256": None}


def _name_of(began: Path) -> str:
    """What the card calls a parent: a bundle as its folder, whichever of the two was named."""
    if began.name == "model":
        return began.parent.name
    return began.name if (began / "model").is_dir() else began.as_posix()


def _data_of(training: dict[str, Any]) -> dict[str, Any] | None:
    """{"sha256", "validation_from", "test_from", …} of the data; what the run did not record is looked up now.

    None where neither the record nor the files are there.
    """
    raw = (training.get("config") or {}).get("data")
    known = None
    if "data_sha256" in training:
        known = {"sha256": training["data_sha256"], "hashed": "in training", **training.get("splits", {})}
    if raw is None:
        return known
    try:
        config = DataConfig.model_validate(raw)
        now = describe_source(config.source)
        if known is not None and known["sha256"] != now["sha256"]:
            raise InputError("its files have changed since", code="changed")
        return now | {"hashed": "at export"} | (known or {}) | describe_splits(config)
    except (InputError, ValidationError, OSError) as error:
        logger.warning("the data of the run cannot be read any more, its description is shorter: %s", error)
        return known


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.export",
        description="Make a bundle of a training run: a folder that the server serves by its name as soon as it lies "
        "under models_root.",
    )
    parser.add_argument("run_output", type=Path, metavar="RUN_OUTPUT", help="run.output of the training run")
    parser.add_argument("destination", type=Path, metavar="DESTINATION", help="the bundle's folder, MODELS_ROOT/NAME")
    parser.add_argument("--name", help="in the card; default: the destination's name")
    parser.add_argument("--report", type=Path, help="report.json of cluster.evaluate; default: RUN_OUTPUT's, if any")
    parser.add_argument("--calibration", type=Path, help="calibration.json; default: RUN_OUTPUT's, if any")
    parser.add_argument("--replace", action="store_true", help="replace a bundle that is there")
    given = parser.parse_args(arguments)
    try:
        made = export(
            given.run_output,
            given.destination,
            name=given.name,
            report=given.report,
            calibration=given.calibration,
            replace=given.replace,
        )
    except (KronosError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.destination}: {made.parameters:,} weights, sha256 {made.sha256}, loaded and forecast once")
    return 0


if __name__ == "__main__":
    sys.exit(main())
