"""From a run's output to a bundle that can be served, and from a bundle to its place, if it has earned it."""

import json
import shutil
import subprocess
import threading

import numpy as np
import pandas as pd
import pytest
import torch

from cluster import export as export_module
from cluster import promote as promote_module
from cluster.bundles import bundle as bundle_module
from cluster.bundles.bundle import pair_sha256, verify_bundle
from cluster.bundles.training_record import overlap_warning
from cluster.export import export
from cluster.promote import promote
from model.errors import CheckpointMismatchError, InputError
from model.kronos import Kronos
from model.registry import CheckpointSource, load_checkpoint, sha256_of
from model.tokenizer import KronosTokenizer
from serve_app.catalog import find

BASELINES = ("last_price", "drift", "historical_volatility", "seasonal_naive")


@pytest.fixture
def parent(golden, tmp_path):
    """A bundle's folder with the golden pair."""
    for part in ("model", "tokenizer"):
        shutil.copytree(golden / part, tmp_path / "parent" / part)
    return tmp_path / "parent"


def finetune(parent, folder):
    """What a finetune of the parent leaves in folder/run: other weights, a record of it, real bars in a file."""
    run = folder / "run"
    network = Kronos.from_pretrained(parent / "model")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.001)
    network.save_pretrained(run / "model")
    shutil.copytree(parent / "tokenizer", run / "tokenizer")
    bars = pd.DataFrame({"timestamps": pd.date_range("2024-07-01", periods=100, freq="h")})
    bars = bars.assign(open=1.0, high=1.0, low=1.0, close=1.0)
    bars.to_csv(folder / "bars.csv", index=False)
    source = {"kind": "file", "path": str(folder / "bars.csv"), "validation_share": 0.2, "test_share": 0.2}
    record = {
        "command": "python -m cluster.train --config finetune.yaml",
        "device": "cpu",
        "warnings": ["device 'cuda' was requested; using 'cpu'"],
        "stages": {"predictor": {"steps": 10, "minutes": 0.1, "validation_loss": 1.25, "method": "lora"}},
        "config": {
            "run": {"seed": 0},
            "data": {"source": source},
            "predictor": {"init_from": str(parent / "model"), "tokenizer": str(parent / "tokenizer")},
        },
    }
    (run / "training.json").write_text(json.dumps(record))
    return run


@pytest.fixture
def run_output(parent, tmp_path):
    return finetune(parent, tmp_path)


def report_of(bundle, **changes):
    """As cluster.evaluate writes it, of a model that beats everything in the test period."""
    training = json.loads((bundle / "training.json").read_text())
    comparisons = [
        {
            "against": name,
            "metric": "crps",
            "ratio": 0.9,
            "low": 0.85,
            "high": 0.95,
            "p_value": 0.01,
            "verdict": "beats",
        }
        for name in ("parent", *BASELINES)
    ]
    report = {
        "model": {"sha256": training["sha256"]},
        "parent": {"sha256": training["parent"]["sha256"]},
        "period": {"from": training["data"].get("test_from"), "to": None},
        "comparisons": comparisons,
        "verdict": "beats",
    }
    return report | changes


@pytest.fixture(scope="module")
def exported(golden, tmp_path_factory):
    """A run's output and the bundle made of it. Not to be changed."""
    folder = tmp_path_factory.mktemp("exported")
    run = finetune(golden, folder)
    export(run, folder / "candidates" / "mine")
    return run, folder / "candidates" / "mine"


@pytest.fixture
def bundle(exported, tmp_path):
    shutil.copytree(exported[1], tmp_path / "candidates" / "mine")
    return tmp_path / "candidates" / "mine"


def save(report, path):
    path.write_text(json.dumps(report))
    return path


def weights_of(checkpoint):
    return {name: tensor.numpy().tobytes() for name, tensor in checkpoint.model.state_dict().items()}


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


def change_record(run_output, change):
    path = run_output / "training.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_run_whose_predictor_is_not_finished_is_no_bundle(run_output, tmp_path):
    """What lies in model/ may be of an earlier run, and no pair with the new tokenizer."""
    change_record(run_output, lambda record: record.update(stages={"tokenizer": record["stages"]["predictor"]}))
    with pytest.raises(InputError, match="whose predictor is not finished"):
        export(run_output, tmp_path / "models" / "mine")


def test_what_was_held_out_is_known_also_when_the_data_is_gone(run_output, tmp_path):
    """Recorded in training; and without any record of it nothing is promoted, unless by force."""
    (tmp_path / "bars.csv").unlink()
    splits = {"validation_from": "2024-07-03T12:00:00", "test_from": "2024-07-04T08:00:00"}
    for name, known in (("with", {"data_sha256": "0" * 64, "splits": splits}), ("without", {"data_sha256": "0" * 64})):
        change_record(run_output, lambda record, known=known: (record.pop("splits", None), record.update(known)))
        export(run_output, tmp_path / "candidates" / name)
    record = json.loads((tmp_path / "candidates/with/training.json").read_text())
    assert record["data"] | splits == record["data"]
    begins = {"from": "2024-07-04T08:00:00"}
    report = report_of(tmp_path / "candidates/with", period=begins)
    promote(tmp_path / "candidates/with", save(report, tmp_path / "report.json"), tmp_path / "models" / "with")
    with pytest.raises(InputError, match="does not say which bars were held out"):
        promote(tmp_path / "candidates/without", tmp_path / "report.json", tmp_path / "models" / "without")


@pytest.mark.parametrize(
    ("last_bar", "begins", "message"),
    [
        (
            None,
            "2024-07-03T12:00:00",
            "no bars were kept for a test: .* from 2024-07-03T12:00:00 on, and .*test_share",
        ),
        (None, "2031-01-01", "train with data.source.test_share or test_from"),
        ("2024-07-05T03:00:00", "2024-07-05T03:00:00", "evaluate bars after 2024-07-05T03:00:00, or train with"),
        ("2024-07-05T03:00:00", "2024-07-05T04:00:00", None),
    ],
)
def test_bars_that_the_checkpoint_was_chosen_on_are_not_held_out(bundle, tmp_path, last_bar, begins, message):
    """A run without a test period: only bars after its last one can speak for it."""
    path = bundle / "training.json"
    change_record(bundle, lambda record: record["data"].update(test_from=None, last_bar=last_bar))
    manifest = (bundle / "SHA256SUMS").read_text().splitlines()
    lines = [line for line in manifest if not line.endswith(path.name)]
    (bundle / "SHA256SUMS").write_text("\n".join([*lines, f"{sha256_of(path)}  {path.name}"]) + "\n")
    report = save(report_of(bundle, period={"from": begins}), tmp_path / "report.json")
    warned = overlap_warning(bundle, np.datetime64(begins), np.datetime64("2032-01-01"))
    if message is None:
        promote(bundle, report, tmp_path / "models" / "mine")
        assert warned is None
    else:
        with pytest.raises(InputError, match=message):
            promote(bundle, report, tmp_path / "models" / "mine")
        assert "nothing was kept for a test" in warned


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


# --- promotion --------------------------------------------------------------------------------------------------------


def test_what_beats_everything_is_promoted(bundle, tmp_path):
    report = save(report_of(bundle), tmp_path / "report.json")
    target = tmp_path / "models" / "best"
    made = promote(bundle, report, target)
    assert weights_of(made) == weights_of(verify_bundle(bundle))
    card = (target / "README.md").read_text()
    assert card.startswith("# best\n")
    assert "## Promoted\n" in card
    assert json.loads((target / "report.json").read_text())["verdict"] == "beats"
    assert "report.json" in (target / "SHA256SUMS").read_text()


def changed(index, **values):
    def change(report):
        report["comparisons"][index] |= values
        return report

    return change


def without(index):
    def change(report):
        del report["comparisons"][index]
        return report

    return change


REFUSED = {
    "parent": (changed(0, verdict="ties"), "it ties its parent"),
    "last price": (changed(1, verdict="loses"), "it loses last price"),
    "drift": (changed(2, verdict="ties"), "it ties drift"),
    "missing": (without(3), "does not compare it with historical volatility"),
    "other metric": (changed(4, metric="mae"), "does not compare it with seasonal naive"),
    "in all": (lambda r: r | {"verdict": "ties"}, "the report's verdict is 'ties'"),
    "other parent": (lambda r: r | {"parent": {"sha256": "f" * 64}}, "compares it with ffffffffffff, and its parent"),
    "seen bars": (lambda r: r | {"period": {"from": "2024-07-04T07:00:00"}}, "only bars from 2024-07-04T08:00:00"),
    "no period": (lambda r: r | {"period": {}}, "does not say when its period begins"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_is_refused_and_forced_only_in_words(bundle, tmp_path, capsys, name):
    change, message = REFUSED[name]
    report = save(change(report_of(bundle)), tmp_path / "report.json")
    target = tmp_path / "models" / "best"
    command = [str(bundle), "--report", str(report), "--to", str(target)]
    assert promote_module.main(command) == 2
    assert message in capsys.readouterr().err
    for empty in ("", "  ", "because"):
        assert promote_module.main([*command, "--force", empty]) == 2
        assert "reason in words" in capsys.readouterr().err
    assert not target.exists()
    assert promote_module.main([*command, "--force", "the demo is on Friday"]) == 0
    card = (target / "README.md").read_text()
    assert "> the demo is on Friday" in card
    assert message in card
    verify_bundle(target)


def test_every_objection_is_told_at_once(bundle, tmp_path):
    report = changed(0, verdict="loses")(changed(1, verdict="ties")(report_of(bundle)))
    with pytest.raises(InputError, match="it loses its parent; it ties last price"):
        promote(bundle, save(report, tmp_path / "report.json"), tmp_path / "models" / "best")


def test_a_report_of_other_weights_cannot_be_forced(bundle, tmp_path):
    report = save(report_of(bundle, model={"sha256": "0" * 64}), tmp_path / "report.json")
    with pytest.raises(InputError, match="evaluate these"):
        promote(bundle, report, tmp_path / "models" / "best", force="I want it anyway")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("content", ["[]", "{", '{"comparisons": 3}'])
def test_files_that_are_no_report(bundle, tmp_path, content, capsys):
    (tmp_path / "report.json").write_text(content)
    assert (
        promote_module.main([str(bundle), "--report", str(tmp_path / "report.json"), "--to", str(tmp_path / "x")]) == 2
    )
    assert capsys.readouterr().err.startswith("error: ")


def test_a_bundle_that_was_changed_is_refused(bundle, tmp_path):
    report = save(report_of(bundle), tmp_path / "report.json")
    weights = bundle / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointMismatchError, match="is not the file that SHA256SUMS lists"):
        promote(bundle, report, tmp_path / "models" / "best")


def test_the_sha256_is_the_servers(golden):
    checkpoint = load_checkpoint(CheckpointSource(id="golden", model=str(golden)))
    assert pair_sha256(golden / "model", golden / "tokenizer") == checkpoint.sha256
    assert np.isfinite(checkpoint.parameters)
