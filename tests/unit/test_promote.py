"""From a bundle to its place, if it has earned it."""

import json

import numpy as np
import pytest

from cluster import promote as promote_module
from cluster.bundles.bundle import verify_bundle
from cluster.bundles.training_record import overlap_warning
from cluster.export import export
from cluster.promote import promote
from model.errors import CheckpointMismatchError, InputError
from model.registry import sha256_of
from tests.tiny_bundles import change_record, finetune, report_of, save, weights_of


@pytest.fixture
def run_output(golden, tmp_path):
    return finetune(golden, tmp_path)


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
