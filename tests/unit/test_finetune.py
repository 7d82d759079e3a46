"""Whole finetunes in this process: when they end, what they refuse, what they leave behind."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cluster import train as train_module
from cluster.candles.bars import frame_from_bars
from cluster.candles.simulate import simulate
from cluster.data import load_splits
from cluster.train import main, train
from cluster.training.config_file import parse_config
from cluster.training.worker import Worker
from model.kronos import Kronos
from model.tokenizer import KronosTokenizer
from tests.tiny_training import finetune_config, save_parent, save_tokenizer, tiny_config, write_yaml


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return save_parent(tmp_path_factory.mktemp("parent"))


@pytest.mark.verify("V18")
def test_early_stopping_best_last_and_the_log(parent, tmp_path, monkeypatch, figure):
    """Scripted validation losses; patience 2, min_delta 0.1: 1.95 is no improvement on 2.0."""
    losses = iter([3.0, 2.0, 1.95, 2.5, 0.1, 0.1])
    monkeypatch.setattr(Worker, "validate", lambda self: {"validation_loss": next(losses)})
    rule = {"patience": 2, "min_delta": 0.1}
    config = finetune_config(parent, tmp_path, steps=60, validate_every=10, keep=1, early_stopping=rule)
    train(config)
    folder = tmp_path / "runs/t/predictor"
    kept = sorted(path.name for path in folder.glob("step_*"))
    assert kept == ["step_0000030", "step_0000040"]
    record = json.loads((tmp_path / "out/training.json").read_text())["stages"]["predictor"]
    assert (record["steps"], record["stopped_early"], record["best_step"]) == (40, True, 30)
    assert record["validation_loss"] == 1.95
    best = load_file(folder / "step_0000030/network/model.safetensors")
    exported = load_file(tmp_path / "out/model/model.safetensors")
    assert all(torch.equal(best[name], exported[name]) for name in best)
    figure("losses 3, 2, 1.95, 2.5 with patience 2, min_delta 0.1: ended at step 40, best 30, last 40", "these")
    train(config)  # it has ended: nothing more is trained, no loss is asked for
    assert list(losses) == [0.1, 0.1]


@pytest.mark.verify("V18")
def test_an_empty_validation_is_an_error(parent, tmp_path, figure, capsys):
    config = finetune_config(parent, tmp_path).model_dump(mode="json")
    config["data"]["source"]["bars"] = 20
    assert main(["--config", str(write_yaml(parse_config(config), tmp_path))]) == 2
    message = capsys.readouterr().err
    figure(f"no validation window: {message.strip()[:60]}…", "an error, not 0.0000")
    assert message.startswith("error: ")
    assert "has no window of 25 bars" in message


def test_what_a_finetune_leaves_behind(parent, tmp_path, monkeypatch, caplog):
    """A bundle with both networks; parent, data, method, device and what was given up, on record."""
    monkeypatch.setattr("model.device.cuda_available", lambda: False)
    lora = {"rank": 2, "targets": ["q", "v"]}
    training = {"device": "cuda", "threads": 1, "max_failures": 3}
    config = finetune_config(parent, tmp_path, steps=6, method="lora", lora=lora, training=training)
    train(config, command="the command")
    out = tmp_path / "out"
    assert Kronos.from_pretrained(out / "model").s1_bits == 4
    for name in ("config.json", "model.safetensors"):
        assert (out / "tokenizer" / name).read_bytes() == (parent / "tokenizer" / name).read_bytes()
    record = json.loads((out / "training.json").read_text())
    first, second = record["warnings"]
    assert "device 'cuda' was requested" in first
    assert "training.max_failures=3 is without effect" in second
    assert second in caplog.text
    assert (record["device"], record["command"]) == ("cpu", "the command")
    entry = record["stages"]["predictor"]
    assert entry["method"] == "lora"
    assert entry["parent"]["folder"] == (parent / "model").as_posix()
    assert len(entry["parent"]["sha256"]) == len(record["data_sha256"]) == 64
    assert 0 < entry["trained_weights"] < entry["weights"]
    assert entry["bars"] == 6 * 8 * 25
    assert set(entry["metrics"]) == {"validation_loss", "validation_s1", "validation_s2"}
    [adapters] = (tmp_path / "runs/t/predictor").glob("step_*/adapters.safetensors")
    assert len(load_file(adapters)) == 2 * 2 * 2
    assert not list((tmp_path / "runs").rglob("model.safetensors"))


@pytest.mark.parametrize("cached", [False, True])
def test_crooked_candles_are_on_record(parent, tmp_path, cached):
    """Also where they come from a cache, whose files were read and warned of in another run."""
    frame = frame_from_bars(simulate(3, 3, 100, bar_minutes=(60,)))
    frame.loc[130, "high"] = frame.loc[130, "low"] * 0.99
    frame.to_csv(tmp_path / "bars.csv", index=False)
    source = {"kind": "file", "path": str(tmp_path / "bars.csv"), "validation_share": 0.4}
    config = finetune_config(parent, tmp_path, steps=2).model_dump(mode="json", exclude_unset=True)
    config["data"]["source"] = source | ({"cache": str(tmp_path / "cache")} if cached else {})
    if cached:
        load_splits(parse_config(config).data)
    train(parse_config(config))
    [told] = json.loads((tmp_path / "out/training.json").read_text())["warnings"]
    symbol, time = frame.loc[130, ["symbol", "timestamps"]]
    assert told.startswith("1 of 300 bars have a high below or a low above another price, in 1 of 3 symbols")
    assert f"of {symbol!r} at {time.isoformat()}" in told


def test_a_required_gpu_that_is_absent_ends_the_run(parent, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("model.device.cuda_available", lambda: False)
    monkeypatch.setattr("model.device.mps_available", lambda: False)
    config = write_yaml(finetune_config(parent, tmp_path, training={"device": "auto", "require_gpu": True}), tmp_path)
    assert main(["--config", str(config)]) == 2
    assert "training.require_gpu" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_finetune_reports_how_many_codes_have_changed(parent, tmp_path, caplog):
    for depth, changes in ((3, False), (5, True)):
        folder = tmp_path / str(depth)
        config = tiny_config("tokenizer", folder=folder, steps=30, init_from=parent / "tokenizer", depth=depth)
        train(config)
        drift = json.loads((folder / "out/training.json").read_text())["stages"]["tokenizer"]["code_drift"]
        assert (drift["percent"] > 0) == changes, "up to depth 3 the encoder is frozen"
        assert drift["percent"] >= drift["s1_percent"]
        assert KronosTokenizer.from_pretrained(folder / "out/tokenizer").s1_bits == 4
    assert "have another code than the parent's" in caplog.text


def test_memory_that_ends_in_the_last_validation_names_the_size_to_try(parent, tmp_path, monkeypatch, capsys):
    def validate(self):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(Worker, "validate", validate)
    assert main(["--config", str(write_yaml(finetune_config(parent, tmp_path, steps=2), tmp_path))]) == 2
    assert "set training.micro_batch_size=4" in capsys.readouterr().err


def test_the_record_is_of_what_lies_beside_it(parent, tmp_path):
    """Stages of an earlier run in the same folder go, but for the tokenizer that is used from there; splits stay."""
    bars = simulate(3, 1, 200, bar_minutes=(60,))
    frame_from_bars(bars).to_csv(tmp_path / "bars.csv", index=False)
    source = {"kind": "file", "path": str(tmp_path / "bars.csv"), "validation_share": 0.3, "test_share": 0.2}

    def run(stage, name, **options):
        raw = tiny_config(stage, folder=tmp_path, steps=2, **options).model_dump(mode="json")
        raw["run"]["name"], raw["data"]["source"] = name, source
        train(parse_config(raw))
        return json.loads((tmp_path / "out/training.json").read_text())

    assert list(run("tokenizer", "a")["stages"]) == ["tokenizer"]
    record = run("predictor", "b", tokenizer=tmp_path / "out/tokenizer")
    assert list(record["stages"]) == ["tokenizer", "predictor"]
    times = bars[0].times.astype("datetime64[s]")
    assert record["splits"] == {"validation_from": str(times[100]), "test_from": str(times[160])}
    del source["test_share"]
    without_test = {"validation_from": str(times[140]), "last_bar": str(times[199])}
    assert run("tokenizer", "e")["splits"] == without_test
    assert list(run("predictor", "c", tokenizer=parent / "tokenizer")["stages"]) == ["predictor"]
    assert list(run("tokenizer", "d")["stages"]) == ["tokenizer"]


@pytest.mark.verify("V21")
def test_keys_of_the_environment_are_nowhere_in_the_run(parent, tmp_path, monkeypatch, capsys, caplog, figure):
    canary = "canary-5f2c9e"
    keys = {
        name: f"{canary}-{name}" for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "COMET_API_KEY")
    }
    for name, key in keys.items():
        monkeypatch.setenv(name, key)
    caplog.set_level("INFO")
    assert main(["--config", str(write_yaml(finetune_config(parent, tmp_path, steps=4), tmp_path))]) == 0
    printed = capsys.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    hits = [path for path in files if canary.encode() in path.read_bytes()]
    assert canary not in printed.out + printed.err + caplog.text
    figure(f"{len(keys)} keys in the environment: {len(hits)} hits in {len(files)} files and the output", "0")
    assert hits == []


@pytest.mark.verify("V23")
@pytest.mark.slow
def test_the_published_small_shape_trains(tmp_path, figure):
    """8 layers of width 512, random weights, 2 windows of 64 bars, 3 steps: no claim of skill."""
    import resource

    shape = {"n_layers": 8, "d_model": 512, "n_heads": 8, "ff_dim": 1024}
    save_tokenizer(tmp_path / "tokenizer")
    config = tiny_config(
        "predictor",
        folder=tmp_path,
        network=shape,
        tokenizer=tmp_path / "tokenizer",
        phases=[{"steps": 3, "window": 64, "batch_size": 2}],
    )
    made = train_module.train(config)
    loss = json.loads((tmp_path / "out/training.json").read_text())["stages"]["predictor"]["validation_loss"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figure(f"Kronos-small shape: loss {loss:.3f} after 3 steps, peak {peak:.1f} GiB of this process", "finite")
    assert 0 < loss < 100
    assert Kronos.from_pretrained(made["predictor"]).d_model == 512
