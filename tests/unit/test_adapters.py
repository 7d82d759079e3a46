"""LoRA and freezing: what is trained, what stays bit for bit, and that merging changes nothing."""

import pytest
import torch
from safetensors.torch import load_file

from cluster.training.adapters import (
    ADAPTERS_FILE,
    LoraLinear,
    adapter_state,
    add_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
)
from cluster.training.config import Lora
from cluster.training.freezing import freeze, trained_parameters
from cluster.training.worker import Worker
from model.errors import CheckpointMismatchError
from model.kronos import Kronos
from model.tokenizer import KronosTokenizer
from tests.tiny_training import CPU, largest_relative, save_predictor, save_tokenizer, tiny_config

TARGETS = {"q": 1, "k": 1, "v": 1, "o": 1, "ffn": 3}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent")
    save_tokenizer(folder / "tokenizer")
    save_predictor(folder / "model")
    return folder


def lora_worker(parent, **options):
    config = tiny_config(
        "predictor", init_from=parent / "model", tokenizer=parent / "tokenizer", method="lora", **options
    )
    return Worker(config, "predictor", parent / "tokenizer", CPU)


def logits(network):
    s1 = torch.arange(20).remainder(16).unsqueeze(0)
    with torch.no_grad():
        return torch.cat(network.eval()(s1, s1.flip(1), use_teacher_forcing=True, s1_targets=s1), dim=-1)


@pytest.mark.verify("V17")
def test_only_the_adapters_are_trained_and_merging_changes_nothing(parent, tmp_path, figure):
    worker = lora_worker(parent, lora={"rank": 2})
    assert torch.equal(logits(worker.task.network), logits(Kronos.from_pretrained(parent / "model")))
    before = {name: tensor.clone() for name, tensor in worker.task.network.state_dict().items()}
    trained = [n for n, p in worker.task.network.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    for _ in range(20):
        worker.train_step()
    after = worker.task.network.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == trained
    original = load_file(parent / "model/model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in original.items())

    worker.task.export(tmp_path / "merged")
    merged = Kronos.from_pretrained(tmp_path / "merged")
    difference = largest_relative(logits(merged), logits(worker.task.network))
    moved = largest_relative(logits(merged), logits(Kronos.from_pretrained(parent / "model")))
    figure(f"base weights changed: 0; merged against unmerged logits {difference:.1e} of the largest", "at most 1e-6")
    assert difference <= 1e-6
    assert moved > 100 * difference
    assert not [m for m in merged.modules() if isinstance(m, LoraLinear)]


@pytest.mark.verify("V17")
def test_the_adapters_of_the_bundled_predictor_are_a_small_file(tmp_path, figure):
    folder = "model/bundled/model"
    network = Kronos.from_pretrained(folder)
    add_adapters(network, Lora())
    save_adapters(network, Lora(), "0", tmp_path / ADAPTERS_FILE)
    with open(f"{folder}/model.safetensors", "rb") as file:
        full = file.seek(0, 2)
    share = (tmp_path / ADAPTERS_FILE).stat().st_size / full
    figure(f"adapter file {100 * share:.1f} % of the full one", "at most 5 %")
    assert share <= 0.05


@pytest.mark.parametrize("target", TARGETS)
def test_targets(target):
    network = Kronos(4, 4, 3, 16, 2, 32, 0.0, 0.0, 0.0, 0.0, True)
    add_adapters(network, Lora(targets=(target,), rank=3))
    assert len(adapter_state(network)) == 2 * TARGETS[target] * 3
    assert sum(isinstance(m, LoraLinear) for m in network.modules()) == TARGETS[target] * 3


def test_a_merged_copy_leaves_the_original_alone():
    network = Kronos(4, 4, 1, 16, 2, 32, 0.0, 0.0, 0.0, 0.0, True)
    names = set(network.state_dict())
    add_adapters(network, Lora())
    merged = merge_adapters(network)
    assert set(merged.state_dict()) == names
    assert set(network.state_dict()) > names


def test_adapters_of_other_weights_ranks_or_formats_are_refused(parent, tmp_path):
    network = Kronos.from_pretrained(parent / "model")
    add_adapters(network, Lora(rank=2))
    path = tmp_path / ADAPTERS_FILE
    save_adapters(network, Lora(rank=2), "aaa", path)
    load_adapters(network, path, "aaa")
    with pytest.raises(CheckpointMismatchError, match="adapters of other weights"):
        load_adapters(network, path, "bbb")
    other = Kronos.from_pretrained(parent / "model")
    add_adapters(other, Lora(rank=3))
    with pytest.raises(CheckpointMismatchError, match="another rank or of other targets"):
        load_adapters(other, path, "aaa")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointMismatchError, match="cannot be read as safetensors"):
        load_adapters(network, path, "aaa")


PREDICTOR_LEVELS = [
    ("head.",),
    ("transformer.3.", "norm.", "dep_layer."),
    ("transformer.2.",),
    ("transformer.0.", "transformer.1."),
    ("embedding.", "time_emb."),
]
TOKENIZER_LEVELS = [
    ("head.",),
    ("decoder.1.",),
    ("decoder.0.", "post_quant_embed.", "post_quant_embed_pre."),
    ("encoder.1.", "quant_embed."),
    ("encoder.0.", "embed."),
]


@pytest.mark.verify("V17")
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_depth_says_what_is_trained(depth, figure):
    kronos = Kronos(4, 4, 4, 16, 2, 32, 0.0, 0.0, 0.0, 0.0, True)
    tokenizer = KronosTokenizer(6, 16, 2, 32, 3, 3, 0.0, 0.0, 0.0, 4, 4, 0.05, 1.0, 1.1, 0.05, 4)
    shares = []
    for network, levels in ((kronos, PREDICTOR_LEVELS), (tokenizer, TOKENIZER_LEVELS)):
        freeze(network, depth)
        wanted = tuple(prefix for level in levels[:depth] for prefix in level)
        assert all(p.requires_grad == n.startswith(wanted) for n, p in network.named_parameters())
        trained = sum(p.numel() for p in trained_parameters(network))
        shares.append(trained / sum(p.numel() for p in network.parameters()))
    figure(f"depth {depth}: {shares[0]:.0%} of a predictor, {shares[1]:.0%} of a tokenizer are trained", "the table's")
    assert (shares == [1.0, 1.0]) == (depth == 5)


def test_a_fixed_time_table_stays_fixed_at_any_depth():
    network = Kronos(4, 4, 1, 16, 2, 32, 0.0, 0.0, 0.0, 0.0, False)
    freeze(network, 5)
    assert not any(p.requires_grad for p in network.time_emb.parameters())


def test_a_shallow_finetune_leaves_the_rest_bitwise(parent):
    config = tiny_config("predictor", init_from=parent / "model", tokenizer=parent / "tokenizer", depth=2)
    worker = Worker(config, "predictor", parent / "tokenizer", CPU)
    for _ in range(5):
        worker.train_step()
    original = load_file(parent / "model/model.safetensors")
    changed = {
        name.split(".")[0] for name, t in worker.task.network.state_dict().items() if not t.equal(original[name])
    }
    assert changed == {"transformer", "norm", "dep_layer", "head"}
    assert all(t.equal(original[n]) for n, t in worker.task.network.state_dict().items() if "transformer.0" in n)


def test_a_predictor_and_a_tokenizer_that_are_no_pair(parent, tmp_path):
    torch.manual_seed(0)
    KronosTokenizer(6, 16, 2, 32, 2, 2, 0.0, 0.0, 0.0, 5, 3, 0.05, 1.0, 1.1, 0.05, 4).save_pretrained(tmp_path)
    config = tiny_config("predictor", init_from=parent / "model", tokenizer=tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"4 \+ 4 bits, the tokenizer .* 5 \+ 3: they are no pair"):
        Worker(config, "predictor", tmp_path, CPU)
