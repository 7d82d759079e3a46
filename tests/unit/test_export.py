"""From a run's output to a bundle that can be served."""

import json
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch

from cluster import export as export_module
from cluster import promote as promote_module
from cluster.bundles import bundle as bundle_module
from cluster.bundles.bundle import pair_sha256, verify_bundle
from cluster.export import export
from model.errors import CheckpointMismatchError, InputError
from model.kronos import Kronos
from model.registry import CheckpointSource, load_checkpoint, sha256_of
from model.tokenizer import KronosTokenizer
from serve_app.catalog import find
from tests.tiny_bundles import change_record, finetune, report_of, save, weights_of


@pytest.fixture
def parent(golden, tmp_path):
    """A bundle's folder with the golden pair."""
    for part in ("model", "tokenizer"):
        shutil.copytree(golden / part, tmp_path / "parent" / part)
    return tmp_path / "parent"


@pytest.fixture
def run_output(parent, tmp_path):
    return finetune(parent, tmp_path)


def test_a_bundle_is_complete_and_the_server_finds_it(run_output, parent, tmp_path):
    bundle = tmp_path / "models" / "mine"
    export(run_output, bundle)
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    networks = {f"{part}/{name}" for part in ("model", "tokenizer") for name in ("config.json", "model.safetensors")}
    assert files == networks | {"README.md", "training.json", "SHA256SUMS"}
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=bundle, capture_output=True, text=True, check=True)
    assert checked.stdout.count(": OK") == 5
    checkpoint = load_checkpoint(CheckpointSource(id="mine", model=str(bundle)))
    ran = Kronos.from_pretrained(run_output / "model").state_dict()
    assert weights_of(checkpoint) == {name: tensor.numpy().tobytes() for name, tensor in ran.items()}
    assert find(bundle.parent, "mine").settings.source == str(bundle)
    record = json.loads((bundle / "training.json").read_text())
    assert record["sha256"] == checkpoint.sha256
    assert record["parent"] == {
        "name": "parent",
        "sha256": load_checkpoint(CheckpointSource(id="p", model=str(parent))).sha256,
    }
    assert record["data"]["validation_from"] == "2024-07-03T12:00:00"
    assert record["data"]["test_from"] == "2024-07-04T08:00:00"
    card = (bundle / "README.md").read_text()
    for told in (
        record["sha256"],
        record["parent"]["sha256"],
        record["data"]["sha256"],
        "lora",
        "1.2500",
        "'cuda' was",
    ):
        assert told in card
    assert "Not evaluated" in card


def test_a_relative_parent_that_is_gone_is_a_missing_folder_and_not_looked_up_at_the_hub(
    run_output, tmp_path, monkeypatch, caplog
):
    """Who owns a repository of that name is a stranger."""

    def download(*arguments, **options):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("model.checkpoint.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    record = json.loads((run_output / "training.json").read_text())
    record["config"]["predictor"] = {"init_from": "models/gone", "tokenizer": "models/gone"}
    save(record, run_output / "training.json")
    export(run_output, tmp_path / "models" / "mine")
    assert "there is no folder models/gone, and it is none of the known names" in caplog.text
    shutil.rmtree(run_output / "tokenizer")
    with pytest.raises(
        InputError, match=r"has no tokenizer/, and models/gone is not there \(there is no folder models/"
    ):
        export(run_output, tmp_path / "models" / "again")


def calibration_of(sha256):
    entry = {"symbol": None, "bar_seconds": None, "n": 50, "first_bars": [1], "factors": [1.25]}
    fitted = {"from": "2024-01-01", "to": "2024-02-01", "horizon": 12}
    return {
        "version": 1,
        "method": "scale",
        "model_sha256": sha256,
        "fitted_on": fitted | {"sampling": {"temperature": 1.0, "top_k": 0, "top_p": 1.0}},
        "entries": [entry | {"raw_coverage": {"0.8": 0.6}, "calibrated_coverage": {"0.8": 0.8}}],
    }


def test_a_calibration_of_other_weights_is_not_taken_along(run_output, tmp_path):
    save(calibration_of("0" * 64), run_output / "calibration.json")
    with pytest.raises(CheckpointMismatchError, match="fitted for other weights"):
        export(run_output, tmp_path / "models" / "mine")
    assert list((tmp_path / "models").iterdir()) == []


def test_report_and_calibration_go_along_and_are_in_the_manifest(run_output, bundle, tmp_path):
    save(report_of(bundle), run_output / "report.json")
    calibration = calibration_of(report_of(bundle)["model"]["sha256"])
    save(calibration, tmp_path / "elsewhere.json")
    made = tmp_path / "candidates" / "second"
    export(run_output, made, name="Second", calibration=tmp_path / "elsewhere.json")
    manifest = (made / "SHA256SUMS").read_text()
    assert "report.json" in manifest
    assert "calibration.json" in manifest
    card = (made / "README.md").read_text()
    assert card.startswith("# Second\n")
    assert "| last price | crps | 0.900 (0.850–0.950) | 0.010 | beats |" in card
    (made / "calibration.json").write_text("{}")
    with pytest.raises(CheckpointMismatchError, match=r"calibration\.json is not the file"):
        verify_bundle(made)


def test_a_report_of_other_weights_is_not_taken_along(run_output, bundle, tmp_path):
    save(report_of(bundle, model={"sha256": "0" * 64}), run_output / "report.json")
    with pytest.raises(InputError, match="about weights 000000000000") as caught:
        export(run_output, tmp_path / "candidates" / "other")
    assert caught.value.code == "other_weights"
    assert [path.name for path in (tmp_path / "candidates").iterdir()] == ["mine"]


def spoil_weights(folder):
    (folder / "model" / "model.safetensors").write_bytes(b"\0" * 100)


def not_finite(folder):
    network = Kronos.from_pretrained(folder / "model")
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    network.save_pretrained(folder / "model")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weights, "cannot be read as safetensors"),
        (not_finite, "NaN or infinite"),
        (lambda folder: (folder / "model" / "config.json").unlink(), "holds no config.json"),
        (lambda folder: shutil.rmtree(folder / "model"), "holds no config.json"),
        (lambda folder: (folder / "training.json").unlink(), "give run.output of a training run"),
        (lambda folder: (folder / "training.json").write_text("{"), "is not JSON"),
    ],
)
def test_a_run_that_makes_no_bundle_leaves_nothing_behind(run_output, tmp_path, capsys, spoil, message):
    spoil(run_output)
    target = tmp_path / "models" / "mine"
    assert export_module.main([str(run_output), str(target)]) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()
    assert not target.parent.exists() or list(target.parent.iterdir()) == []


def test_the_tokenizer_that_was_used_is_taken_where_the_run_made_none(run_output, parent, tmp_path):
    shutil.rmtree(run_output / "tokenizer")
    made = export(run_output, tmp_path / "models" / "mine")
    assert made.tokenizer.config == load_checkpoint(CheckpointSource(id="p", model=str(parent))).tokenizer.config
    shutil.rmtree(parent)
    with pytest.raises(InputError, match=r"has no tokenizer/, and .* is not there"):
        export(run_output, tmp_path / "models" / "again")


def test_a_parent_that_is_gone_is_said_to_be_gone(run_output, parent, tmp_path):
    shutil.rmtree(parent)
    export(run_output, tmp_path / "models" / "mine")
    record = json.loads((tmp_path / "models/mine/training.json").read_text())
    assert record["parent"] == {"name": "parent", "sha256": None}
    assert "the weights are gone" in (tmp_path / "models/mine/README.md").read_text()


@pytest.mark.parametrize("fate", ["gone", "replaced"])
def test_a_parent_that_is_another_by_now_is_known_by_the_record(run_output, parent, tmp_path, fate):
    """Whoever promotes to the folder that a finetune began from changes no lineage; nor does another current folder."""
    expected = pair_sha256(parent / "model", parent / "tokenizer")
    digests = {part: sha256_of(parent / part / "model.safetensors") for part in ("model", "tokenizer")}
    inputs = {"data": "0" * 64, "init_from": digests["model"], "tokenizer": digests["tokenizer"]}
    change_record(run_output, lambda record: record["stages"]["predictor"].update(inputs=inputs))
    shutil.rmtree(parent)
    if fate == "replaced":
        shutil.copytree(run_output, parent)
    export(run_output, tmp_path / "mine")
    record = json.loads((tmp_path / "mine/training.json").read_text())
    assert record["parent"] == {"name": "parent", "sha256": expected}


def test_a_tokenizer_that_was_finetuned_too_is_not_the_parents(run_output, parent, tmp_path):
    """Without one beside the parent's model: the parent is the pair that both finetunes began from."""
    expected = pair_sha256(parent / "model", parent / "tokenizer")
    (parent / "tokenizer").rename(tmp_path / "began")
    change_record(run_output, lambda record: record["config"].update(tokenizer={"init_from": str(tmp_path / "began")}))
    tuned = run_output / "tokenizer" / "model.safetensors"
    network = KronosTokenizer.from_pretrained(tuned.parent)
    with torch.no_grad():
        network.head.bias.add_(0.001)
    network.save_pretrained(tuned.parent)
    export(run_output, tmp_path / "models" / "mine")
    record = json.loads((tmp_path / "models/mine/training.json").read_text())
    assert record["parent"]["sha256"] == expected


def test_a_run_whose_predictor_is_not_finished_is_no_bundle(run_output, tmp_path):
    """What lies in model/ may be of an earlier run, and no pair with the new tokenizer."""
    change_record(run_output, lambda record: record.update(stages={"tokenizer": record["stages"]["predictor"]}))
    with pytest.raises(InputError, match="whose predictor is not finished"):
        export(run_output, tmp_path / "models" / "mine")


@pytest.mark.parametrize("in_one_step", [True, False])
def test_what_is_there_is_replaced_only_on_request_and_only_by_something_whole(
    run_output, bundle, monkeypatch, in_one_step
):
    if not in_one_step:
        monkeypatch.setattr(bundle_module, "_exchange", lambda one, other: False)
    before = (bundle / "SHA256SUMS").read_bytes()
    with pytest.raises(InputError, match="--replace"):
        export(run_output, bundle)
    not_finite(run_output)
    with pytest.raises(CheckpointMismatchError):
        export(run_output, bundle, replace=True)
    assert (bundle / "SHA256SUMS").read_bytes() == before
    verify_bundle(bundle)
    Kronos.from_pretrained(bundle / "model").save_pretrained(run_output / "model")
    export(run_output, bundle, replace=True, name="Again")
    assert (bundle / "README.md").read_text().startswith("# Again")
    assert [path.name for path in bundle.parent.iterdir()] == ["mine"]


def test_a_folder_of_bundles_is_not_replaced_by_one(run_output, bundle, capsys):
    """models for models/mine: all of them would be lost."""
    root = bundle.parent
    report = save(report_of(bundle), root.parent / "report.json")
    for command in (
        lambda: export_module.main([str(run_output), str(root), "--replace"]),
        lambda: promote_module.main([str(bundle), "--report", str(report), "--to", str(root)]),
    ):
        assert command() == 2
        assert f"{root} is no bundle and is not replaced" in capsys.readouterr().err
        verify_bundle(bundle)


def test_nobody_finds_nothing_while_a_bundle_is_replaced(run_output, bundle):
    """As a server that looks all the time."""
    missing, over = [], threading.Event()

    def look():
        while not over.is_set():
            if find(bundle.parent, "mine") is None:
                missing.append(True)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(3):
            export(run_output, bundle, replace=True)
    finally:
        over.set()
        watcher.join()
    assert not missing


@pytest.mark.parametrize("name", ["-x", ".hidden", "a b", "ä", "x" * 65])
def test_names_that_no_server_serves_are_refused(run_output, tmp_path, name):
    with pytest.raises(InputError, match="cannot be served"):
        export(run_output, tmp_path / name)


def test_keys_stay_out_of_the_record(run_output, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "canary-1234567")
    record = json.loads((run_output / "training.json").read_text())
    record["command"] += " logging.note=canary-1234567"
    record["config"]["logging"] = {"mlflow_uri": "https://me:canary-2@host", "api_key": "canary-3"}
    save(record, run_output / "training.json")
    export(run_output, tmp_path / "models" / "mine")
    for path in (tmp_path / "models" / "mine").rglob("*"):
        assert not path.is_file() or b"canary" not in path.read_bytes(), path


def test_the_sha256_is_the_servers(golden):
    checkpoint = load_checkpoint(CheckpointSource(id="golden", model=str(golden)))
    assert pair_sha256(golden / "model", golden / "tokenizer") == checkpoint.sha256
    assert np.isfinite(checkpoint.parameters)
