"""Models that appear in a folder."""

import os
import shutil

import pytest

from serve_app.catalog import Catalog
from serve_app.config import AppConfig


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def put(golden, folder):
    for part in ("model", "tokenizer"):
        shutil.copytree(golden / part, folder / part)


def catalog(root, **config):
    """Reads the file system at every call."""
    ticks = iter(range(10**6))
    return Catalog(AppConfig(models_root=str(root), **config), clock=lambda: 2.0 * next(ticks))


def test_a_folder_is_a_model_from_when_it_is_complete(golden, root):
    models = catalog(root)
    assert models.get("mine") is None
    put(golden, root / "mine")
    assert models.get("mine").settings.source == str(root / "mine")
    assert models.get("mine").settings.repo == "local"
    assert list(models.all()) == ["kronos-bundled", "mine"]
    (root / "mine" / "tokenizer" / "config.json").unlink()
    assert models.get("mine") is None
    assert list(models.all()) == ["kronos-bundled"]


def test_a_folder_whose_files_change_is_another_model(golden, root):
    put(golden, root / "mine")
    models = catalog(root)
    before = models.get("mine")
    assert models.get("mine") == before
    os.utime(root / "mine" / "model" / "model.safetensors", ns=(1, 1))
    assert models.get("mine") != before


def test_a_listed_model_wins_and_always_on_does_not_make_another(golden, root):
    put(golden, root / "mine")
    listed = {"mine": {"source": "bundled", "always_on": True}}
    models = catalog(root, models=listed, default_model="mine")
    assert models.get("mine").settings.source == "bundled"
    assert models.get("mine") == catalog(root, models={"mine": {"source": "bundled"}}, default_model="mine").get("mine")


@pytest.mark.parametrize(
    "name", ["../outside", "..", ".", "", "/etc/passwd", "../../etc/passwd", "x/y", "linked", "inner", "a\0b", "x" * 65]
)
def test_nothing_leads_out_of_the_root(golden, root, name):
    put(golden, root.parent / "outside")
    put(golden, root / "x" / "y")
    (root / "linked").symlink_to(root.parent / "outside")
    put(golden, root / "inner")
    weights = root / "inner" / "model" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(root.parent / "outside" / "model" / "model.safetensors")
    assert catalog(root).get(name) is None
    assert list(catalog(root).all()) == ["kronos-bundled"]


def test_a_link_within_the_root_is_fine(golden, root):
    put(golden, root / "v2")
    (root / "latest").symlink_to(root / "v2")
    assert catalog(root).get("latest").settings.source == str(root / "v2")


def test_a_root_that_does_not_exist(tmp_path):
    models = catalog(tmp_path / "absent")
    assert models.get("x") is None
    assert list(models.all()) == ["kronos-bundled"]


def test_a_calibration_that_comes_later_is_taken_over(golden, root, tmp_path):
    put(golden, root / "mine")
    models = catalog(root)
    before = models.get("mine")
    (root / "mine" / "calibration.json").write_text("{}")
    after = models.get("mine")
    assert after != before
    # A link that leads out of the root is not followed, whatever it is for.
    (tmp_path / "outside.json").write_text("{}")
    (root / "mine" / "calibration.json").unlink()
    (root / "mine" / "calibration.json").symlink_to(tmp_path / "outside.json")
    assert models.get("mine") is None
