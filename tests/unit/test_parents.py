"""What a finetune starts from, by each of the names that a model has."""

import json
import shutil

import pytest

from cluster.bundles.bundle import pair_sha256
from cluster.export import export
from cluster.train import train
from cluster.training.config_file import parse_config
from model.registry import CheckpointSource, load_checkpoint, network_source, sha256_of
from tests.tiny_training import save_parent, tiny_config


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return save_parent(tmp_path_factory.mktemp("parent"))


@pytest.fixture
def kronos_small(parent, tmp_path, monkeypatch):
    """The parent as the Hub's cache holds kronos-small; the Hub itself cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for part in ("model", "tokenizer"):
        repository, revision = network_source("kronos-small", part)
        shutil.copytree(
            parent / part, tmp_path / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / revision
        )
    return "kronos-small"


@pytest.mark.parametrize("form", ["alias", "bundle", "two_folders"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_parent_is_named_as_any_model_is(parent, tmp_path, kronos_small, form, method):
    """The weights decide, not the way in which they are named."""
    named = {
        "alias": {"init_from": kronos_small},
        "bundle": {"init_from": parent},
        "two_folders": {"init_from": parent / "model", "tokenizer": parent / "tokenizer"},
    }[form]
    config = tiny_config("predictor", folder=tmp_path, steps=4, method=method, **{"tokenizer": None} | named)
    train(config)
    train(config)  # resumed: it is the same run
    record = json.loads((tmp_path / "out/training.json").read_text())
    inputs = record["stages"]["predictor"]["inputs"]
    assert inputs["init_from"] == sha256_of(parent / "model" / "model.safetensors")
    assert inputs["tokenizer"] == sha256_of(parent / "tokenizer" / "model.safetensors")
    assert record["stages"]["predictor"]["parent"]["sha256"] == inputs["init_from"]
    shutil.rmtree(tmp_path / "out" / "tokenizer")
    export(tmp_path / "out", tmp_path / "mine")
    exported = json.loads((tmp_path / "mine/training.json").read_text())
    name = "kronos-small" if form == "alias" else parent.name
    assert exported["parent"] == {"name": name, "sha256": pair_sha256(parent / "model", parent / "tokenizer")}
    assert load_checkpoint(CheckpointSource("mine", str(tmp_path / "mine"))).tokenizer.s1_bits == 4


def test_both_networks_of_a_name_are_finetuned(parent, tmp_path, kronos_small):
    config = tiny_config("tokenizer", folder=tmp_path, steps=2, init_from=kronos_small).model_dump(mode="json")
    predictor = tiny_config("predictor", steps=2, init_from=kronos_small).model_dump(mode="json")["predictor"]
    train(parse_config(config | {"predictor": predictor | {"tokenizer": None}}))
    stages = json.loads((tmp_path / "out/training.json").read_text())["stages"]
    for stage, part in (("tokenizer", "tokenizer"), ("predictor", "model")):
        assert stages[stage]["parent"] == {
            "folder": kronos_small,
            "sha256": sha256_of(parent / part / "model.safetensors"),
        }
    export(tmp_path / "out", tmp_path / "mine")
    record = json.loads((tmp_path / "mine/training.json").read_text())
    assert record["parent"]["sha256"] == pair_sha256(parent / "model", parent / "tokenizer")
