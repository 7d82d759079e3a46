"""The trainer's configuration, placement and optimizer: what is decided before a worker starts."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from cluster import placement, train
from cluster.training import run_folder
from cluster.training.checkpoints import Checkpoints
from cluster.training.config import Optimisation, TrainingConfig
from cluster.training.config_file import load_config, parse_config
from cluster.training.stages import learning_rate, make_optimizer, weighted_tokenizer_loss
from model.errors import InputError
from model.kronos import Kronos
from model.losses import tokenizer_loss
from model.tokenizer import KronosTokenizer

ROOT = Path(__file__).parents[2]


def raw_config(**changes):
    config = {
        "run": {"name": "t", "output": "out"},
        "data": {"source": {"kind": "simulated", "series": 2, "bars": 40, "seed": 1, "validation_seed": 2}},
        "tokenizer": {
            "phases": [{"steps": 2, "window": 16, "batch_size": 2}],
            "optimisation": {"warmup_steps": 1},
        },
    }
    for dotted, value in changes.items():
        place = config
        *path, last = dotted.split("__")
        for key in path:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        place[last] = value
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__sed": 1}, r"run\.sed is not a key; the nearest known one is 'seed'"),
        ({"tokeniser": {}}, "tokeniser is not a key; the nearest known one is 'tokenizer'"),
        ({"tokenizer__optimisation__lerning_rate": 1}, r"tokenizer\.optimisation\.lerning_rate .* 'learning_rate'"),
        ({"tokenizer__network__d_modell": 1}, r"tokenizer\.network\.d_modell .* 'd_model'"),
        ({"tokenizer__phases__0__windows": 1}, r"tokenizer\.phases\.0\.windows .* 'window'"),
        ({"data__source__sereis": 1}, r"data\.source\.sereis .* 'series'"),
        ({"data__source__kind": "file", "data__source__paths": "x"}, r"data\.source\.paths .* 'path'"),
        ({"training__num_workers": -1}, r"training\.num_workers: .* greater than or equal to 0"),
        ({"training__num_workers": [3, 1]}, r"training\.num_workers: .* \[min, max\]"),
        ({"training__num_workers": [2, 4]}, r"2 windows cannot be shared by 4 workers"),
        ({"training__precision": "fp8"}, r"training\.precision: .* 'fp32', 'bf16' or 'fp16'"),
        ({"training__micro_batch_size": 0}, r"training\.micro_batch_size: .* from 1 or auto"),
        ({"tokenizer__phases__0__batch_size": "all"}, r"tokenizer\.phases\.0\.batch_size: .* from 1 or auto"),
        ({"run__device": "cpu"}, r"run\.device is not a key: it stands at training\.device"),
        ({"tokenizer__method": "lora"}, "lora needs init_from"),
        ({"tokenizer__lora": {"rank": 2}}, "method is full"),
        ({"tokenizer__depth": 2}, "without init_from they are random"),
        ({"tokenizer__depth": 6, "tokenizer__init_from": "x"}, r"tokenizer\.depth: .* less than or equal to 5"),
        ({"tokenizer__network__d_model": 8, "tokenizer__init_from": "x"}, "brings its own network"),
        ({"tokenizer__init_from": "x", "tokenizer__method": "lora", "tokenizer__depth": 2}, "leave depth out"),
        ({"tokenizer__init_from": "x", "tokenizer__lora": {"targets": ["z"]}}, r"tokenizer\.lora\.targets\.0"),
        (
            {"tokenizer__init_from": "out/tokenizer"},
            r"tokenizer\.init_from lies in run\.output, .* choose another",
        ),
        (
            {"predictor__phases": [{"steps": 101, "window": 16, "batch_size": 2}], "predictor__tokenizer": "bundled"},
            r"predictor\.tokenizer names bundled, .* leave predictor\.tokenizer out, or the tokenizer stage",
        ),
        (
            {"predictor__phases": [{"steps": 101, "window": 16, "batch_size": 2}], "predictor__mixed_share": 0.2},
            "mixed_share is for s2_conditioning: mixed, not teacher",
        ),
        ({"tokenizer__optimisation": {}}, r"tokenizer: optimisation\.warmup_steps=100 .* 2 in all: set it to less"),
        ({"tokenizer__optimisation__warmup_steps": 2}, r"tokenizer: optimisation\.warmup_steps=2 leaves no step"),
        ({"tokenizer__early_stopping": {}}, r"tokenizer\.early_stopping\.patience: Field required"),
        ({"run__seed": "many"}, r"run\.seed: .* valid integer"),
        ({"run__seed": 2**63}, r"run\.seed: .* less than or equal to 9223372036854775807"),
        ({"run__seed": -1}, r"run\.seed: .* greater than or equal to 0"),
        ({"data__source__seed": 10**20}, r"data\.source\.seed: .* less than or equal to 9223372036854775807"),
        ({"data__source__validation_seed": -1}, r"data\.source\.validation_seed: .* greater than or equal to 0"),
        ({"run__name": "../x"}, r"run\.name: .* pattern"),
        ({"run": {"name": "../x"}}, r"^configuration: run\.name: [^;]* pattern [^;]*$"),
        ({"data__source__validation_seed": 1}, "must differ from seed"),
        ({"data__source__kind": "internet"}, r"data\.source: .* expected tags"),
        ({"predictor__phases": []}, r"predictor\.phases: .* at least 1 item"),
        ({"logging": {"loggers": "wandb"}}, r"^configuration: logging\.loggers: must be a list"),
        ({"run": "x"}, r"run: must be a section of keys and values$"),
    ],
)
def test_faults_name_the_key(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_config(raw_config(**changes))
    assert caught.value.code == "bad_config"


def test_one_fault_in_a_list_or_a_path_is_said_once():
    changes = {"tokenizer__phases": [{"steps": "x", "window": 16, "batch_size": 2}], "tokenizer__optimisation": {}}
    with pytest.raises(InputError) as caught:
        parse_config(raw_config(**changes))
    expected = "tokenizer.phases.0.steps: Input should be a valid integer, unable to parse string as an integer"
    assert str(caught.value) == f"configuration: {expected}"
    for path in (None, "", 5, [], ["a.csv", None]):
        with pytest.raises(InputError) as caught:
            parse_config(raw_config(data__source={"kind": "file", "path": path, "validation_share": 0.2}))
        expected = f"data.source.path: must be a file, a folder, a pattern, or a list of them, not {path!r}"
        assert str(caught.value) == f"configuration: {expected}"


@pytest.mark.parametrize("moment", [2024, 20240701, "1719792000.5"])
def test_a_number_is_no_moment(moment):
    """As seconds since 1970 it would be a moment long before all bars."""
    source = {"kind": "file", "path": "x.csv", "validation_from": moment}
    with pytest.raises(InputError, match=r"data\.source\.validation_from: must be a date or time such as 2024-07-01"):
        parse_config(raw_config(data__source=source))


def test_a_predictor_needs_a_tokenizer():
    config = raw_config()
    config["predictor"] = config.pop("tokenizer")
    with pytest.raises(InputError, match=r"predictor\.tokenizer must name a folder"):
        parse_config(config)
    with pytest.raises(
        InputError,
        match=r"predictor\.tokenizer must .*: init_from=me/model brings none, .* kronos-small, .* no folder of",
    ):
        parse_config(config | {"predictor": config["predictor"] | {"init_from": "me/model"}})
    del config["predictor"]
    with pytest.raises(InputError, match="a tokenizer stage, a predictor stage or both"):
        parse_config(config)


@pytest.mark.parametrize("name", ["kronos-small", "NeoQuasar/Kronos-small", "bundled", "bundle"])
def test_a_name_brings_its_tokenizer(name, tmp_path, monkeypatch):
    """A predictor of one pair with the tokenizer of another trains without an error, and on the wrong codes."""
    monkeypatch.chdir(tmp_path)
    for part in ("model", "tokenizer"):
        (tmp_path / "bundle" / part).mkdir(parents=True)
    config = raw_config()
    config["predictor"] = config.pop("tokenizer") | {"init_from": name}
    parsed = parse_config(config)
    assert str(parsed.predictor.tokenizer) == name
    assert parse_config(parsed.model_dump(mode="json")) == parsed, "as the workers read it"
    config["predictor"]["tokenizer"] = "me/other"
    assert str(parse_config(config).predictor.tokenizer) == "me/other"
    both = raw_config(predictor=config["predictor"] | {"tokenizer": None}, tokenizer__init_from=name)
    assert parse_config(both).predictor.tokenizer is None, "the run's own"


def test_runs_of_two_names_do_not_overwrite_each_other():
    assert parse_config(raw_config(run={"name": "a"})).run.output == Path("runs/a/output")
    assert parse_config(raw_config(run={"name": "a", "storage": "s"})).run.output == Path("s/a/output")
    assert parse_config(raw_config()).run.output == Path("out")


def test_a_bundle_that_the_output_would_overwrite_is_no_parent(tmp_path):
    (tmp_path / "out" / "model").mkdir(parents=True)
    config = raw_config(run__output=str(tmp_path / "out"))
    config["predictor"] = config.pop("tokenizer") | {"init_from": str(tmp_path / "out"), "tokenizer": "bundled"}
    with pytest.raises(InputError, match=r"predictor\.init_from lies in run\.output"):
        parse_config(config)


def test_file_and_overrides(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config()))
    config = load_config(path, ["run.seed=9", "tokenizer.phases.0.steps=5", "data.source.bar_minutes=[5, 15]"])
    assert (config.run.seed, config.tokenizer.steps, config.data.source.bar_minutes) == (9, 5, (5, 15))
    for override, message in [
        ("run.seed", "section.key=value"),
        ("=1", "section.key=value"),
        ("run.name.deep=1", "'name' is a value"),
        ("run.speed=1", "nearest known one is 'seed'"),
        ("tokenizer.phases.7.steps=1", r"no item '7'"),
        ("run.seed=[1", "not YAML"),
        ("data.source.validation_from=2024-13-01", r"data\.source\.validation_from=2024-13-01.*month must be in 1"),
    ]:
        with pytest.raises(InputError, match=message):
            load_config(path, [override])


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1", ""])
def test_files_that_are_no_configuration(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"config\.yaml"):
        load_config(path)
    with pytest.raises(InputError, match="No such file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("run: {name: t}\ndata: {}\nrun: {seed: 1}\n", "line 3: the key 'run' stands in line 1 already"),
        ("run:\n  seed: 1\n  name: t\n  'seed': 2\n", "line 4: the key 'seed' stands in line 2 already"),
        ("tokenizer:\n  phases:\n  - {steps: 1, steps: 2}\n", "line 3: the key 'steps' stands in line 3 already"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, content, told):
    """PyYAML takes the last one without a word, and a whole section is lost."""
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"config\.yaml, {told}: keep one") as caught:
        load_config(path)
    assert caught.value.code == "duplicate_key"
    path.write_text(yaml.safe_dump(raw_config()))
    with pytest.raises(InputError, match=r"override 'data.source=.*: line 1: the key 'bars' stands in line 1 already"):
        load_config(path, ["data.source={kind: simulated, bars: 40, bars: 50}"])


def test_what_a_merge_key_brings_may_be_replaced(tmp_path):
    """Also where the section it comes from was merged itself, and lies deeper in the file."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "run: {name: t, output: out}\n"
        "data: {source: {kind: simulated, series: 2, bars: 40}}\n"
        "tokenizer:\n"
        "  phases:\n"
        "  - &first {steps: 2, window: 16, batch_size: 2}\n"
        "  - &second {<<: *first, steps: 3}\n"
        "  - {<<: *second, steps: 4, window: 20}\n"
        "  optimisation: {warmup_steps: 1}\n"
    )
    phases = load_config(path).tokenizer.phases
    assert [(phase.steps, phase.window, phase.batch_size) for phase in phases] == [(2, 16, 2), (3, 16, 2), (4, 20, 2)]


def test_the_command_reports_faults_without_a_traceback(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config(run__sed=1)))
    assert train.main(["--config", str(path)]) == 2
    assert "nearest known one is 'seed'" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "cluster/configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_are_valid_and_hold_out_the_scored_series(path):
    from cluster.evaluation.card_scores import HELD_OUT_SEED

    source = load_config(path).data.source
    assert source.kind != "simulated" or HELD_OUT_SEED not in (source.seed, source.validation_seed)


@pytest.mark.parametrize(
    ("device", "resources", "expected"),
    [
        ("auto", {"CPU": 4.0, "GPU": 2.0}, (True, "cuda", False)),
        ("auto", {"CPU": 4.0, "GPU": 1.0}, (False, "cpu", True)),
        ("auto", {"CPU": 4.0}, (False, "cpu", False)),
        ("cuda", {"CPU": 4.0, "GPU": 2.0}, (True, "cuda", False)),
        ("cuda:1", {"CPU": 4.0}, (False, "cpu", True)),
        ("cuda", {"CPU": 4.0, "GPU": 1.0}, (False, "cpu", True)),
        ("cpu", {"CPU": 4.0, "GPU": 2.0}, (False, "cpu", False)),
    ],
)
def test_an_absent_gpu_is_a_warning_not_a_wait(monkeypatch, device, resources, expected):
    monkeypatch.setattr(placement, "resolve_device", lambda requested: (torch.device("cpu"), None))
    found = placement.place_workers(TrainingConfig(device=device, num_workers=2), [resources])
    assert (found.use_gpu, found.device, bool(found.warnings)) == expected
    for warning in found.warnings:
        assert device in warning
        assert "'cpu'" in warning


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
@pytest.mark.parametrize("workers", [0, 2, (1, 2)])
def test_a_required_gpu_that_is_absent_is_an_error(monkeypatch, device, workers):
    monkeypatch.setattr(placement, "resolve_device", lambda requested: (torch.device("cpu"), None))
    training = TrainingConfig(device=device, num_workers=workers, require_gpu=True)
    with pytest.raises(InputError, match="there is no GPU") as caught:
        placement.place_here(training) if workers == 0 else placement.place_workers(training, [{"CPU": 4.0}])
    assert caught.value.code == "no_gpu"


def test_too_few_cpus_and_nonsense_are_refused_before_the_start():
    with pytest.raises(InputError, match="need 8 CPUs and the cluster has 4"):
        placement.place_workers(TrainingConfig(device="cpu", num_workers=4, cpus_per_worker=2), [{"CPU": 4.0}])
    with pytest.raises(ValueError, match="accepted: auto"):
        placement.place_workers(TrainingConfig(device="toaster"), [{"CPU": 4.0}])
    with pytest.raises(ValueError, match="accepted: auto"):
        placement.place_workers(TrainingConfig(device="cuda:x"), [{"CPU": 4.0}])


def test_what_a_run_without_ray_does_not_read_is_a_warning():
    here = {"device": "cpu", "num_workers": 0}
    assert placement.place_here(TrainingConfig(**here, cpus_per_worker=2)).warnings == ()  # they become threads
    ignored = {"ray_address": "head:6379", "max_failures": 3}
    [warning] = placement.place_here(TrainingConfig(**here, **ignored)).warnings
    assert "training.ray_address=head:6379 and training.max_failures=3 are without effect" in warning
    assert "set training.num_workers to 1 or more" in warning
    [warning] = placement.place_here(TrainingConfig(**here, max_failures=1, ray_address=None)).warnings
    assert "training.max_failures=1 is without effect" in warning, "what was written down counts, if only the default"
    on_ray = TrainingConfig(device="cpu", num_workers=1, **ignored)
    assert placement.place_workers(on_ray, [{"CPU": 4.0}]).warnings == ()


def test_a_worker_lies_on_one_node():
    """Two nodes of 2 CPUs hold no worker of 4, and a GPU on a node without CPUs is no use."""
    training = TrainingConfig(device="cpu", num_workers=1, cpus_per_worker=4)
    with pytest.raises(InputError, match=r"1 workers of 4 CPUs .* has 4 on 2 node\(s\), where 0 of them fit"):
        placement.place_workers(training, [{"CPU": 2.0}, {"CPU": 2.0}])
    placement.place_workers(training, [{"CPU": 2.0}, {"CPU": 4.0}])
    apart = [{"CPU": 4.0}, {"CPU": 1.0, "GPU": 2.0}]
    assert placement.place_workers(TrainingConfig(device="cuda", num_workers=1), apart).use_gpu
    found = placement.place_workers(TrainingConfig(device="cuda", num_workers=2), apart)
    assert not found.use_gpu
    assert "room for 1 with a GPU and 1 CPUs on one node" in found.warnings[0]


def test_an_elastic_run_needs_room_for_its_least_number_of_workers():
    elastic = TrainingConfig(device="auto", num_workers=[2, 8])
    assert not placement.place_workers(elastic, [{"CPU": 2.0}]).use_gpu
    assert placement.place_workers(elastic, [{"CPU": 8.0, "GPU": 2.0}]).use_gpu
    with pytest.raises(InputError, match="2 workers of 1 CPUs need 2 CPUs"):
        placement.place_workers(elastic, [{"CPU": 1.0}])


def test_a_run_with_another_configuration_or_other_inputs_is_not_resumed(tmp_path):
    def remember(inputs=None, **changes):
        checkpoints = Checkpoints(tmp_path, "")
        run_folder.remember(parse_config(raw_config(**changes)), "tokenizer", inputs or {"data": "a"}, checkpoints)

    remember(run__seed=7)
    (tmp_path / "batch_sizes.json").write_text("{}")
    remember()  # there is no checkpoint: nothing is lost, and nothing that was found for the other is used
    assert not (tmp_path / "batch_sizes.json").exists()
    (tmp_path / "step_0000001").mkdir()
    remember(training__threads=2, tokenizer__keep=5)  # these decide no number
    with pytest.raises(InputError, match=r"another run\.seed: choose another"):
        remember(run__seed=5)
    with pytest.raises(InputError, match=r"another training\.precision"):
        remember(training__precision="bf16")
    with pytest.raises(InputError, match=r"another inputs\.data"):
        remember(inputs={"data": "b"})


def small_predictor():
    return Kronos(4, 4, 1, 16, 2, 32, 0.0, 0.0, 0.0, 0.0, True)


def test_weight_decay_shrinks_the_matrices_of_linear_layers_only():
    network = small_predictor()
    optimizer = make_optimizer(network, Optimisation(weight_decay=0.1))
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    linear = {id(m.weight) for m in network.modules() if isinstance(m, nn.Linear)}
    assert decayed == linear
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_frozen_weights_are_left_out():
    network = small_predictor()
    for parameter in network.embedding.parameters():
        parameter.requires_grad_(False)
    held = {id(p) for group in make_optimizer(network, Optimisation()).param_groups for p in group["params"]}
    assert not held & {id(p) for p in network.embedding.parameters()}


def test_learning_rate_warms_up_and_falls_to_its_final_share():
    options = Optimisation(learning_rate=1.0, warmup_steps=10, final_share=0.1)
    rates = [learning_rate(step, 100, options) for step in range(101)]
    assert rates[0] == pytest.approx(0.19)
    assert rates[9] == max(rates) == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[100] == pytest.approx(0.1)


def test_equal_column_weights_give_the_published_loss():
    torch.manual_seed(0)
    tokenizer = KronosTokenizer(6, 16, 2, 32, 2, 2, 0.0, 0.0, 0.0, 4, 4, 0.05, 1.0, 1.1, 0.05, 4)
    x = torch.randn(2, 9, 6)
    for ours, published in zip(
        weighted_tokenizer_loss(tokenizer, x, torch.ones(6)), tokenizer_loss(tokenizer, x), strict=True
    ):
        assert ours.item() == pytest.approx(published.item(), rel=1e-6)
    only_close = torch.tensor([0.0, 0, 0, 6, 0, 0])
    loss = weighted_tokenizer_loss(tokenizer, x, only_close)
    (_, from_both), *_ = tokenizer(x)
    assert loss.reconstruction.item() == pytest.approx(((from_both - x)[..., 3] ** 2).mean().item(), rel=1e-5)
