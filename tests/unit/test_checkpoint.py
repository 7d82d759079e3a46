"""Loading and saving: what is accepted, what is refused by name, and that nothing is ever unpickled."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import Kronos, KronosTokenizer
from model.errors import CheckpointMismatchError, CheckpointNotFoundError, UnsafeCheckpointError
from model.registry import PUBLISHED, CheckpointSource, load_checkpoint


@pytest.fixture
def pair(golden, tmp_path):
    """A private copy of the golden pair: a folder with model/ and tokenizer/."""
    for name in ("model", "tokenizer"):
        shutil.copytree(golden / name, tmp_path / "pair" / name)
    return tmp_path / "pair"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("network", [Kronos, KronosTokenizer])
def test_round_trip(network, tiny, tmp_path):
    original = next(n for n in tiny if isinstance(n, network))
    original.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = network.from_pretrained(tmp_path)
    assert loaded.config == original.config
    assert not loaded.training
    for name, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_config_holds_exactly_the_constructor_arguments(golden, tiny, tmp_path):
    for network, name in zip(tiny, ("model", "tokenizer"), strict=True):
        network.save_pretrained(tmp_path / name)
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written == json.loads((golden / name / "config.json").read_text())


def test_loading_leaves_the_global_generator_alone(golden):
    before = torch.get_rng_state()
    Kronos.from_pretrained(golden / "model")
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_imports_no_compiler(golden):
    """A replica starts two seconds sooner without torch's."""
    load = "import sys; from model import Kronos; Kronos.from_pretrained(sys.argv[1])"
    code = f"{load}; print('torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code, str(golden / "model")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


def test_weights_survive_the_removal_of_their_file(pair):
    model = Kronos.from_pretrained(pair / "model")
    before = model.head.proj_s1.weight.clone()
    (pair / "model" / "model.safetensors").write_bytes(b"\0" * 400_000)
    assert torch.equal(model.head.proj_s1.weight, before)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "MODEL.PTH", "optimizer.pkl", "x.pickle", "last.ckpt"]
)
@pytest.mark.parametrize("beside", [True, False])
def test_pickles_are_refused_by_name(pair, name, beside):
    folder = pair / "model"
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    if not beside:
        (folder / "model.safetensors").unlink()
    with pytest.raises(UnsafeCheckpointError, match=name):
        Kronos.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(pair, name):
    (pair / "model" / name).unlink()
    with pytest.raises(CheckpointNotFoundError, match=name):
        Kronos.from_pretrained(pair / "model")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ({"n_layers": None}, "n_layers"),
        ({"n_heads": 5}, "5 heads"),
        ({"n_heads": 0}, "does not describe"),
        ({"d_model": "wide"}, "does not describe"),
        ({"n_layers": 3}, "transformer.2"),
        ({"n_layers": 1}, "transformer.1"),
        ({"s1_bits": 5}, "shape"),
    ],
)
def test_bad_config_is_a_mismatch(pair, config, said):
    path = pair / "model" / "config.json"
    if isinstance(config, dict):
        merged = json.loads(path.read_text()) | config
        config = json.dumps({name: value for name, value in merged.items() if value is not None})
    path.write_text(config)
    with pytest.raises(CheckpointMismatchError, match=said):
        Kronos.from_pretrained(pair / "model")


def test_unknown_config_keys_are_ignored_and_logged(pair, caplog):
    path = pair / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"library_version": "1.0"}))
    Kronos.from_pretrained(pair / "model")
    assert "library_version" in caplog.text


def test_truncated_weights_are_a_mismatch(pair):
    path = pair / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointMismatchError, match="safetensors"):
        Kronos.from_pretrained(pair / "model")


def test_registry_loads_and_describes_a_local_pair(pair):
    checkpoint = load_checkpoint(CheckpointSource("mine", str(pair)))
    assert len(checkpoint.sha256) == 64
    assert checkpoint.parameters == 79_760
    assert checkpoint.revision is None
    assert str(pair) not in checkpoint.model_version + checkpoint.tokenizer_version
    apart = CheckpointSource("mine", str(pair / "model"), tokenizer=str(pair / "tokenizer"))
    assert load_checkpoint(apart).sha256 == checkpoint.sha256


def test_registry_refuses_weights_that_are_not_finite(pair):
    path = pair / "model" / "model.safetensors"
    weights = load_file(path)
    weights["norm.weight"] = weights["norm.weight"].clone().fill_(float("nan"))
    save_file(weights, path)
    with pytest.raises(CheckpointMismatchError, match=r"norm\.weight"):
        load_checkpoint(CheckpointSource("mine", str(pair)))


def test_registry_refuses_a_pair_that_does_not_belong_together(pair, tmp_path):
    config = json.loads((pair / "tokenizer" / "config.json").read_text()) | {"s1_bits": 7, "s2_bits": 5}
    KronosTokenizer(**config).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointMismatchError, match="do not belong together"):
        load_checkpoint(CheckpointSource("mine", str(pair / "model"), tokenizer=str(tmp_path / "other")))


def test_registry_needs_a_tokenizer(pair):
    with pytest.raises(CheckpointNotFoundError, match="tokenizer"):
        load_checkpoint(CheckpointSource("mine", str(pair / "model")))


def hub_cache(root, repo, revision, folder, branch=None):
    """Lays a network's files out as the Hub's cache does."""
    entry = root / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, entry / "snapshots" / revision)
    if branch:
        (entry / "refs").mkdir()
        (entry / "refs" / branch).write_text(revision)


def test_published_checkpoint_loads_from_the_hub_cache(pair, tmp_path, monkeypatch, offline):
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    source = PUBLISHED["kronos-small"]
    hub_cache(cache, source.model, source.revision, pair / "model")
    hub_cache(cache, source.tokenizer, source.tokenizer_revision, pair / "tokenizer")
    checkpoint = load_checkpoint(source)
    assert checkpoint.revision == source.revision
    assert checkpoint.model_version.startswith(f"NeoQuasar/Kronos-small@{source.revision[:12]}+")
    assert checkpoint.tokenizer_version.startswith("NeoQuasar/Kronos-Tokenizer-base@0e0117387f39+")


def test_branch_resolves_to_its_commit(pair, tmp_path, monkeypatch, offline):
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    source = PUBLISHED["kronos-mini"]
    hub_cache(cache, source.model, "a" * 40, pair / "model", branch="main")
    hub_cache(cache, source.tokenizer, "b" * 40, pair / "tokenizer", branch="main")
    assert load_checkpoint(source).revision == "a" * 40


def test_unreachable_hub_says_what_to_do(tmp_path, monkeypatch, offline):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointNotFoundError, match="not in the local cache; download it once"):
        load_checkpoint(PUBLISHED["kronos-base"])


@pytest.mark.parametrize("source", ["no/such/folder/at/all", "../escape", "", "a b"])
def test_neither_folder_nor_repository(source):
    with pytest.raises(CheckpointNotFoundError):
        load_checkpoint(CheckpointSource("x", source, tokenizer="a/b"))


def test_local_folder_has_no_revision(pair):
    with pytest.raises(CheckpointNotFoundError, match="no revision"):
        Kronos.from_pretrained(pair / "model", revision="main")
