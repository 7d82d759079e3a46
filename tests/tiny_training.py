"""Configurations, networks and workers of a few thousand weights, for tests of the trainer."""

import torch
import torch.distributed as dist
import yaml

from cluster.training.config_file import parse_config
from cluster.training.group import Group
from cluster.training.worker import Worker
from model.kronos import Kronos
from model.tokenizer import KronosTokenizer

CPU = torch.device("cpu")
SOURCE = {"kind": "simulated", "seed": 1, "series": 8, "bars": 80, "validation_seed": 2, "validation_series": 4}


def tiny_config(stage, *, steps=40, folder="out", seed=0, dropout=0.0, training=None, **options):
    """One stage in this process. options: keys of the stage; init_from makes the network's own shape go away."""
    network = {"d_model": 16, "n_heads": 2, "ff_dim": 32, "resid_dropout_p": dropout}
    if stage == "tokenizer":
        network |= {"n_enc_layers": 2, "n_dec_layers": 2, "s1_bits": 4, "s2_bits": 4}
    else:
        network |= {"n_layers": 1}
    chosen = {
        "network": network,
        "phases": [{"steps": steps, "window": 24, "batch_size": 8}],
        "validation_windows": 16,
        "validate_every": 1000,
    }
    if stage == "predictor":
        chosen["tokenizer"] = f"{folder}/no-tokenizer"
    chosen |= options
    total = sum(phase["steps"] for phase in chosen["phases"])
    rates = {"learning_rate": 5e-3, "warmup_steps": min(5, total - 1)}
    chosen["optimisation"] = rates | chosen.get("optimisation", {})
    if "init_from" in options:
        del chosen["network"]
        chosen["init_from"] = str(options["init_from"])
    if chosen.get("tokenizer") is not None:
        chosen["tokenizer"] = str(chosen["tokenizer"])
    return parse_config(
        {
            "run": {"name": "t", "storage": f"{folder}/runs", "output": f"{folder}/out", "seed": seed},
            "training": {"num_workers": 0, "device": "cpu", **(training or {})},
            "data": {"source": SOURCE, "stride": 4},
            stage: chosen,
        }
    )


def save_tokenizer(folder, seed=0):
    torch.manual_seed(seed)
    KronosTokenizer(6, 16, 2, 32, 2, 2, 0.0, 0.0, 0.0, 4, 4, 0.05, 1.0, 1.1, 0.05, 4).save_pretrained(folder)
    return folder


def save_predictor(folder, *, layers=2, width=16, dropout=0.2, seed=0):
    torch.manual_seed(seed)
    Kronos(4, 4, layers, width, 2, 2 * width, dropout, 0.0, dropout, 0.0, True).save_pretrained(folder)
    return folder


def save_parent(folder):
    """A bundle's folder to finetune from."""
    save_tokenizer(folder / "tokenizer")
    save_predictor(folder / "model", dropout=0.2)
    return folder


def finetune_config(parent, folder, **options):
    """Of a predictor, from the networks of save_parent. options: as of tiny_config."""
    return tiny_config(
        "predictor", folder=folder, init_from=parent / "model", tokenizer=parent / "tokenizer", **options
    )


def write_yaml(config, folder):
    """The path of folder/config.yaml, for the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def weights(worker):
    return torch.cat([p.detach().flatten() for p in worker.task.network.parameters()])


def gradients(worker):
    return torch.cat([p.grad.flatten() for p in worker.task.network.parameters() if p.grad is not None])


def largest_relative(found, expected):
    """Largest difference beside the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def train_in_a_group(rank, size, raw_config, stage, tokenizer_folder, steps, folder):
    """One process of `size` over gloo: saves its first gradient, its weights after the steps and its losses."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    worker = Worker(parse_config(raw_config), stage, tokenizer_folder, CPU, Group(rank, size, CPU))
    worker.seed_step(0)
    worker.add_gradients(worker._stream(0)[0].batch(0, rank, size))
    first = gradients(worker)
    for _ in range(steps):
        worker.train_step()
    found = {"gradient": first, "weights": weights(worker), "validation": worker.validate()}
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
