"""The output folder: what makes it another run's, what is finished, and that a part is whole or not there."""

import json

import pyarrow as pa
import pytest

from cluster import batch
from cluster.batching.store import OWNER_FILE, RUN_FILE, Finished, Part, Store, part_name, schema
from model.errors import InputError

RUN = {"settings": {"horizon": 24, "seed": 0}, "model": {"sha256": "a" * 64}}
INPUTS = {"/data/a.csv": (10, 1), "/data/b.csv": (20, 2)}


def table():
    form = schema((0.5,), False)
    return pa.Table.from_arrays([pa.nulls(1, field.type) for field in form], schema=form)


def begun(folder, *parts):
    store = Store(folder)
    store.claim(RUN, INPUTS)
    for part in parts:
        store.write(table(), part)
    return store


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"settings": {"horizon": 48, "seed": 0}}, r"horizon \(24, now 48\)"),
        ({"settings": {"horizon": 24, "seed": 1}}, r"seed \(0, now 1\)"),
        ({"model": {"sha256": "b" * 64}}, "sha256"),
    ],
)
def test_another_runs_folder_is_refused_by_the_name_of_what_differs(tmp_path, change, told):
    begun(tmp_path / "out")
    for refuse in (lambda store: store.claim(RUN | change, INPUTS), lambda store: store.finished(RUN | change, INPUTS)):
        with pytest.raises(InputError, match=told) as caught:
            refuse(Store(tmp_path / "out"))
        assert caught.value.code == "run_exists"


@pytest.mark.parametrize("inputs", [{"/data/a.csv": (10, 1)}, INPUTS | {"/data/b.csv": (21, 2)}])
def test_changed_and_missing_input_files_are_refused_by_name(tmp_path, inputs):
    begun(tmp_path / "out")
    with pytest.raises(InputError, match=r"/data/b\.csv") as caught:
        Store(tmp_path / "out").claim(RUN, inputs)
    assert caught.value.code == "input_changed"


def test_files_may_be_added(tmp_path):
    store = begun(tmp_path / "out", Part(("A",), {}))
    store.complete(1, 0)
    assert store.finished(RUN, INPUTS) == Finished(1, 0)
    assert store.finished(RUN, INPUTS | {"/data/c.csv": (1, 1)}) is None
    Store(tmp_path / "out").claim(RUN, INPUTS | {"/data/c.csv": (1, 1)})
    assert len(store.input_files()) == 3


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(InputError) as caught:
        Store(tmp_path).claim(RUN, INPUTS)
    assert caught.value.code == "output_not_empty"


def test_parts_say_what_they_hold_and_a_deleted_one_is_not_finished(tmp_path):
    parts = [Part(("A", "B"), {"B": "too_short"}), Part(("C",), {})]
    store = begun(tmp_path, *parts)
    assert sorted(store.parts()) == sorted(parts)
    assert store.read(("B", "A")) == parts[0]
    assert store.read(("A",)) is None
    store.complete(3, 1)
    assert store.finished(RUN, INPUTS) == Finished(3, 1)
    (tmp_path / part_name(("C",))).unlink()
    assert store.finished(RUN, INPUTS) is None


def test_a_damaged_part_is_named(tmp_path):
    store = begun(tmp_path, Part(("A",), {}))
    path = tmp_path / part_name(("A",))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=path.name):
        store.parts()


def test_a_run_that_was_taken_over_writes_no_more(tmp_path):
    first = begun(tmp_path)
    second = begun(tmp_path)
    with pytest.raises(RuntimeError, match="another run"):
        first.write(table(), Part(("A",), {}))
    second.write(table(), Part(("A",), {}))
    assert json.loads((tmp_path / RUN_FILE).read_text())["settings"] == RUN["settings"]
    assert (tmp_path / OWNER_FILE).read_text() == second.token
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("below", ["", "out"])
def test_an_output_that_is_a_file_is_refused_before_any_work(tmp_path, capsys, monkeypatch, below):
    file = tmp_path / "out.parquet"
    file.write_text("mine")
    for work in ("load_checkpoint", "find_files", "ray_session"):
        monkeypatch.setattr(batch, work, None)
    given = ["--input", "bars.csv", "--output", str(file / below), "--horizon", "4"]
    assert batch.main(given) == 2
    said = f"error: --output {file / below} cannot be written to, because {file} is a file: name another folder\n"
    assert capsys.readouterr().err == said
    assert file.read_text() == "mine"
