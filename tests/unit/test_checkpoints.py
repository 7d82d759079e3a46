"""Checkpoints: whole or not there, damaged ones refused by name, the right few kept."""

import json
import os
import shutil

import pytest
import torch

from cluster.files import write_atomically
from cluster.training import checkpoints as module
from cluster.training.checkpoints import INDEX_FILE, MANIFEST_FILE, Checkpoints
from model.errors import CheckpointMismatchError


def write(content):
    def into(folder):
        (folder / "network").mkdir()
        (folder / "network/model.safetensors").write_bytes(content * 1000)
        torch.save({"step": len(content)}, folder / "state.pt")

    return into


def save(store, step, loss=None):
    return store.save(step, write(f"{step}".encode()), {} if loss is None else {"validation_loss": loss})


@pytest.fixture
def store(tmp_path):
    return Checkpoints(tmp_path / "run", "mine", keep=2)


def names(store):
    return sorted(path.name for path in store.folder.iterdir() if path.is_dir())


@pytest.mark.verify("V18")
def test_the_best_few_and_the_last_are_kept(store, figure):
    kept = []
    for step, loss in enumerate([3.0, 1.0, 2.0, 1.5, 4.0, 5.0], start=1):
        save(store, step, loss)
        kept.append([int(name[5:]) for name in names(store)])
    assert kept == [[1], [1, 2], [2, 3], [2, 4], [2, 4, 5], [2, 4, 6]]
    assert (store.best().step, store.latest().step) == (2, 6)
    index = json.loads((store.folder / INDEX_FILE).read_text())
    assert index == {"best": "step_0000002", "last": "step_0000006", "kept": [f"step_000000{n}" for n in (2, 4, 6)]}
    figure("losses 3 1 2 1.5 4 5, keep 2: steps 2, 4 (best) and 6 (last) are on the disk", "exactly these")


def test_one_without_a_validation_is_last_but_never_best(store):
    save(store, 1, 2.0)
    save(store, 2)
    assert (store.best().step, store.latest().step) == (1, 2)
    save(store, 3, 2.5)
    assert names(store) == ["step_0000001", "step_0000003"]


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "flipped bit in the weights": (lambda f: flip_bit(f / "network/model.safetensors"), "model.safetensors .* sha256"),
    "flipped bit in the state": (lambda f: flip_bit(f / "state.pt"), "state.pt .* sha256"),
    "truncated weights": (lambda f: truncate(f / "network/model.safetensors"), "1999 bytes, not 2000|bytes, not"),
    "empty state": (lambda f: (f / "state.pt").write_bytes(b""), "state.pt has 0 bytes"),
    "missing weights": (lambda f: (f / "network/model.safetensors").unlink(), "model.safetensors is missing"),
    "missing manifest": (lambda f: (f / MANIFEST_FILE).unlink(), "manifest.json is missing, cut off or changed"),
    "flipped bit in the manifest": (lambda f: flip_bit(f / MANIFEST_FILE), "manifest.json is missing, cut off or"),
    "truncated manifest": (lambda f: truncate_to_half(f / MANIFEST_FILE), "manifest.json is missing, cut off or"),
    "foreign file": (lambda f: (f / "extra.pt").write_bytes(b"x"), "extra.pt is not in its manifest"),
    "empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "manifest.json is missing"),
}


def truncate_to_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.verify("V12")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(store, figure, caplog, damage):
    save(store, 10, 2.0)
    last = save(store, 20, 1.0)
    how, reason = DAMAGE[damage]
    how(last)
    with pytest.raises(CheckpointMismatchError, match=reason):
        store.check(last)
    assert store.latest().step == 10
    assert store.best().step == 10
    assert len(store.refused) == 1
    assert store.refused[0].startswith("checkpoint step_0000020 is refused: ")
    assert store.refused[0] in caplog.text
    figure(f"{damage}: refused, step 10 used", "refused by name, the previous used")
    save(store, 20, 1.0)  # the run goes on, comes to that step again, and is trusted again
    assert store.latest().step == 20


@pytest.mark.verify("V12")
def test_a_checkpoint_of_another_run_is_refused(store, tmp_path, figure):
    save(store, 10, 2.0)
    foreign = save(Checkpoints(tmp_path / "other", "theirs"), 20, 1.0)
    shutil.copytree(foreign, store.folder / foreign.name)
    assert store.latest().step == 10
    assert "another configuration" in store.refused[0]
    renamed = store.folder / "step_0000030"
    shutil.copytree(store.folder / "step_0000010", renamed)
    assert store.latest().step == 10
    assert "manifest is of step 10" in store.refused[-1]
    save(store, 15, 3.0)  # neither of the two takes the place of the last one
    assert store.latest().step == 15
    figure("a checkpoint of another configuration and one under another name: both refused", "refused by name")


class Killed(BaseException):
    """The process dies here."""


def kill_at(monkeypatch, count):
    """The process dies at the count-th touch of the disk after the files are written: a flush, a rename, a removal."""
    left = iter(range(count))

    def dying(real):
        def call(*arguments, **options):
            if next(left, None) is None:
                raise Killed
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(module, "_flush", dying(module._flush))
    monkeypatch.setattr(module.os, "rename", dying(os.rename))
    monkeypatch.setattr(module.shutil, "rmtree", dying(shutil.rmtree))
    monkeypatch.setattr(module, "write_atomically", dying(write_atomically))


@pytest.mark.verify("V12")
def test_a_save_that_is_killed_anywhere_leaves_a_whole_checkpoint_as_latest(tmp_path, figure):
    outcomes = {}
    for count in range(25):
        store = Checkpoints(tmp_path / str(count), "mine", keep=1)
        save(store, 10, 3.0)
        save(store, 20, 2.0)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, count)
            try:
                save(store, 30, 1.0)
                finished = True
            except Killed:
                finished = False
        fresh = Checkpoints(store.folder, "mine", keep=1)
        latest = fresh.latest()
        outcomes[latest.step, finished] = outcomes.get((latest.step, finished), 0) + 1
        assert fresh.refused == []  # half of it never had the name
        save(fresh, 30, 1.0)
        assert names(fresh) == ["step_0000030"]
    assert set(outcomes) == {(20, False), (30, False), (30, True)}
    figure(f"killed at {sum(n for (_, done), n in outcomes.items() if not done)} points of a save: 0 half", "0")


def test_nothing_there_is_nothing(tmp_path):
    store = Checkpoints(tmp_path / "absent", "mine")
    assert store.latest() is None
    assert store.best() is None
    assert store.refused == []
