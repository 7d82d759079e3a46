"""AppConfig, the KRONOS_ variables and check-config."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from serve_app.cli import check_config, main
from serve_app.config import LIVE, AppConfig, Limits
from serve_app.environment import KNOWN, EnvironmentVariableError, apply_environment
from serve_app.live_config import InvalidUserConfigError, LiveConfig
from serve_app.reconfigure import RestartNeededError, with_user_config

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "serve_config.yaml"


@pytest.fixture
def shipped():
    return AppConfig.model_validate(yaml.safe_load(CONFIG.read_text())["applications"][0]["args"])


def override(config=None, **variables):
    return apply_environment(config or AppConfig(), {f"KRONOS_{name}": value for name, value in variables.items()})


# --- the file that is shipped -----------------------------------------------------------------------------------------


def test_the_shipped_configuration(shipped):
    assert check_config(str(CONFIG), {}) == ([], [])
    assert shipped.default_model == "kronos-bundled"
    assert shipped.always_on == ["kronos-bundled"]
    assert list(shipped.models) == ["kronos-bundled", "kronos-mini", "kronos-small", "kronos-base"]


def test_the_shipped_models_are_the_published_ones(shipped):
    from model.registry import PUBLISHED

    for alias, source in PUBLISHED.items():
        model = shipped.models[alias]
        assert (model.source, model.revision) == (source.model, source.revision)
        assert (model.tokenizer, model.tokenizer_revision) == (source.tokenizer, source.tokenizer_revision)
        assert model.max_context == source.max_context


def test_the_service_binds_to_this_machine():
    data = yaml.safe_load(CONFIG.read_text())
    assert data["http_options"]["host"] == "127.0.0.1"
    assert data["http_options"]["port"] == 8000


# --- AppConfig --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"modles": {}}, "unknown key 'modles', did you mean 'models'"),
        ({"groups": {"gpus": {}}}, "unknown key 'gpus', did you mean 'gpu'"),
        ({"groups": {"gpu": {"num_gpu": 1}}}, "unknown key 'num_gpu', did you mean 'num_gpus'"),
        ({"groups": {"cpu": {"mode": "off"}}}, "unknown key 'mode'"),
        ({"groups": {"cpu": {"autoscaling": {"max_replica": 1}}}}, "did you mean 'max_replicas'"),
        ({"models": {"a": {"source": "bundled", "revison": "x"}}, "default_model": "a"}, "did you mean 'revision'"),
        ({"limits": {"max_horizons": 1}}, "did you mean 'max_horizon'"),
        ({"defaults": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"ingress": {"replica": 1}}, "did you mean 'replicas'"),
        ({"zzz": 1}, "known: auth, clip, default_model"),
        ({"default_model": "kronos-bundle"}, "did you mean 'kronos-bundled'"),
        ({"models": {"../x": {"source": "bundled"}}, "default_model": "../x"}, "must match"),
        ({"models": {"a": {"source": "bundled", "device": "tpu"}}, "default_model": "a"}, "cuda:N"),
        ({"groups": {"cpu": {"num_gpus": 1}}}, "less than or equal to 0"),
        ({"groups": {"gpu": {"num_gpus": 0}}}, "greater than 0"),
        ({"groups": {"cpu": {"replicas": 2, "autoscaling": {"max_replicas": 3}}}}, "either replicas or autoscaling"),
        ({"groups": {"cpu": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}}}, "min_replicas is above"),
        ({"groups": {"cpu": {"cache_gb": 8}}}, "no model would fit"),
        ({"groups": {"cpu": {"precision": "fp16"}}}, "'auto', 'fp32', 'bf16' or 'int8'"),
        ({"defaults": {"pred_len": 513}}, "over the limit of 512"),
        ({"defaults": {"temperature": 0.001}}, "at least 0.01"),
        ({"limits": {"request_timeout_s": float("inf")}}, "finite number"),
    ],
)
def test_what_is_refused(args, words):
    with pytest.raises(ValidationError, match=words.replace("(", r"\(")):
        AppConfig.model_validate(args)


def test_the_default_model_is_always_on():
    models = {"a": {"source": "bundled"}, "b": {"source": "bundled", "always_on": True}, "c": {"source": "bundled"}}
    assert AppConfig(models=models, default_model="a").always_on == ["a", "b"]


@pytest.mark.parametrize(
    ("source", "shown"),
    [("bundled", "bundled"), ("org/repo", "org/repo"), ("/some/where", "local"), ("./a/b", "local"), ("a", "local")],
)
def test_local_paths_are_not_shown(source, shown):
    config = AppConfig(models={"m": {"source": source}}, default_model="m")
    assert config.models["m"].repo == shown


# --- KRONOS_ variables ------------------------------------------------------------------------------------------------


KEY_LINE = f"alice predict sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("LOG_LEVEL", "debug", lambda c: c.log_level == "DEBUG"),
        ("CLIP_VALUE", "3.5", lambda c: c.clip == 3.5),
        ("MAX_REQUEST_SIZE_MB", "0.5", lambda c: c.limits.max_request_mb == 0.5),
        ("INFERENCE_TIMEOUT", "7", lambda c: c.limits.inference_timeout_s == 7),
        ("REQUEST_TIMEOUT", "8", lambda c: c.limits.request_timeout_s == 8),
        ("RATE_LIMIT_PER_MINUTE", "60", lambda c: c.limits.rate_limit_per_minute == 60),
        ("SECURITY_ENABLED", "false", lambda c: c.limits.security_enabled is False),
        ("API_KEYS_FILE", "/run/keys", lambda c: c.auth.keys_file == "/run/keys"),
        ("API_KEYS", KEY_LINE, lambda c: c.auth.keys == KEY_LINE),
        ("DEFAULT_PRED_LEN", "12", lambda c: c.defaults.pred_len == 12),
        ("DEFAULT_TEMPERATURE", "0.6", lambda c: c.defaults.temperature == 0.6),
        ("DEFAULT_TOP_K", "5", lambda c: c.defaults.top_k == 5),
        ("DEFAULT_TOP_P", "0.8", lambda c: c.defaults.top_p == 0.8),
        ("DEFAULT_SAMPLE_COUNT", "4", lambda c: c.defaults.sample_count == 4),
        ("MAX_CONTEXT", "256", lambda c: c.models["kronos-bundled"].max_context == 256),
        ("DEVICE", "CUDA:0", lambda c: c.models["kronos-bundled"].device == "cuda:0"),
        ("MODEL_PATH", "/a/b", lambda c: c.models[c.default_model].source == "/a/b"),
        ("TOKENIZER_ID", "org/tok", lambda c: c.models["kronos-bundled"].tokenizer == "org/tok"),
        ("MODEL_ID", "org/Mine", lambda c: c.models[c.default_model].source == "org/Mine"),
    ],
)
def test_each_variable_works(name, value, read):
    config, _ = override(**{name: value})
    assert read(config)
    assert not read(AppConfig())
    # An empty variable counts as unset, as compose files write it.
    assert override(**{name: " "}) == (AppConfig(), [])


def test_every_level_of_logging_may_be_set():
    for level in ("debug", "info", "warning", "error", "critical"):
        assert override(LOG_LEVEL=level)[0].log_level == level.upper()


def test_every_variable_is_tested():
    tested = {row[0] for row in test_each_variable_works.pytestmark[0].args[1]}
    assert {f"KRONOS_{name}" for name in tested} == set(KNOWN)


def test_model_id_selects_a_listed_model_by_alias_or_repository(shipped):
    for value in ("kronos-small", "NeoQuasar/Kronos-small"):
        config, warnings = override(shipped, MODEL_ID=value)
        assert (config.default_model, warnings) == ("kronos-small", [])
        assert config.models == shipped.models
        assert config.always_on == ["kronos-small"]


def test_model_id_of_another_repository_never_takes_a_listed_name(shipped):
    config, warnings = override(shipped, MODEL_ID="someone/kronos-small")
    assert config.default_model == "someone-kronos-small"
    assert config.models["kronos-small"] == shipped.models["kronos-small"]
    assert "KRONOS_TOKENIZER_ID" in warnings[0]
    config, warnings = override(shipped, MODEL_ID="someone/new", TOKENIZER_ID="someone/tok")
    assert (config.default_model, config.models["new"].tokenizer, warnings) == ("new", "someone/tok", [])


def test_model_path_and_model_id_together(shipped):
    config, _ = override(shipped, MODEL_ID="kronos-small", MODEL_PATH="/weights", TOKENIZER_ID="/tok")
    model = config.models["kronos-small"]
    assert config.default_model == "kronos-small"
    assert (model.source, model.tokenizer, model.revision) == ("/weights", "/tok", None)


def test_unknown_variables_are_warnings_with_the_nearest_name():
    config, warnings = apply_environment(AppConfig(), {"KRONOS_MAX_CONTEX": "5", "OTHER": "1"})
    assert config == AppConfig()
    assert warnings == ["unknown environment variable KRONOS_MAX_CONTEX, did you mean 'KRONOS_MAX_CONTEXT'?"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_CONTEXT", "many"),
        ("DEFAULT_TOP_P", "2"),
        ("DEFAULT_TEMPERATURE", "0.001"),
        ("REQUEST_TIMEOUT", "inf"),
        ("DEVICE", "tpu"),
        ("LOG_LEVEL", "loud"),
        ("SECURITY_ENABLED", "?"),
    ],
)
def test_bad_values_name_their_variable(name, value):
    with pytest.raises(EnvironmentVariableError, match=f"KRONOS_{name}"):
        override(**{name: value})


# --- settings of a running service ------------------------------------------------------------------------------------


def test_user_config_replaces_keys_of_args_and_variables_stay_on_top():
    live = LiveConfig(AppConfig(clip=3), {"KRONOS_DEFAULT_TOP_K": "5", "OTHER": "x"})
    config = live.update({"limits": {"max_horizon": 64}})
    assert (config.limits.max_horizon, config.defaults.top_k, config.clip) == (64, 5, 3)
    assert live.update({}).limits == Limits()


@pytest.mark.parametrize(
    ("user_config", "words"),
    [
        ({"group": {}}, "'group' cannot change without a restart"),
        ({"limit": {}}, "did you mean 'limits'"),
        ({"limits": {"max_horizon": 0}}, "limits.max_horizon"),
        ({"default_model": "absent"}, "is not in models"),
    ],
)
def test_a_bad_user_config_changes_nothing(user_config, words):
    live = LiveConfig(AppConfig(), {})
    before = live.current
    with pytest.raises(InvalidUserConfigError, match=words):
        live.update(user_config)
    assert live.current == before


def test_what_reconfigure_sends():
    running = {
        "name": "kronos",
        "import_path": "x:y",
        "args": {"clip": 3.0, "limits": {"max_horizon": 100}},
        "deployments": [{"name": "kronos_cpu", "max_ongoing_requests": 7}],
    }
    edited = {"clip": 3, "limits": {"max_horizon": 64}, "models": {"a": {"source": "bundled"}}, "default_model": "a"}
    sent = with_user_config(running, ["ingress", "kronos_cpu"], edited)
    live = AppConfig.model_validate(edited).model_dump(include=set(LIVE))
    # The args stay: Ray would restart every replica if they changed.
    assert sent == {
        **running,
        "deployments": [
            {"name": "ingress", "user_config": live},
            {"name": "kronos_cpu", "max_ongoing_requests": 7, "user_config": live},
        ],
    }
    # What is gone from the file goes back to its default.
    (gone,) = with_user_config(running, ["ingress"], {"clip": 3})["deployments"][:1]
    assert LiveConfig(AppConfig(limits={"max_horizon": 100}), {}).update(gone["user_config"]).limits.max_horizon == 512
    with pytest.raises(RestartNeededError, match="clip, ingress cannot change"):
        with_user_config(running, [], {"ingress": {"replicas": 2}})


def test_check_config_reads_user_config(tmp_path):
    data = yaml.safe_load(CONFIG.read_text())
    data["applications"][0]["deployments"] = [{"name": "ingress", "user_config": {"limits": {"max_horizons": 1}}}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    assert "did you mean 'max_horizon'" in check_config(str(path), {})[0][0]


# --- check-config -----------------------------------------------------------------------------------------------------


def test_check_config_finds_what_serve_ignores(tmp_path):
    path = tmp_path / "bad.yaml"
    text = CONFIG.read_text().replace("request_timeout_s: 3600", "request_timout_s: 1")
    path.write_text(text.replace("hybrid:", "hybird:").replace("route_prefix:", "route_prefx:"))
    errors, _ = check_config(str(path), {})
    assert [error.split(":")[0] for error in errors] == [
        "http_options.request_timout_s",
        "applications.0.route_prefx",
        "applications.0.args",
    ]
    assert "did you mean 'hybrid'" in errors[2]


@pytest.mark.parametrize("text", ["", "[]", "a: [", "applications: 3", "applications: [3]"])
def test_check_config_survives_any_file(tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    assert check_config(str(path), {})[0]


def test_a_misspelt_deployment_is_named(tmp_path):
    """Serve would take its settings and change nothing."""
    path = tmp_path / "serve_config.yaml"
    path.write_text(f"{CONFIG.read_text()}\n    deployments: [{{name: kronos_gpu}}, {{name: kronos-cpu}}]\n")
    (error,) = check_config(str(path), {})[0]
    assert error == "applications.0.deployments.1.name: unknown deployment 'kronos-cpu', did you mean 'kronos_cpu'?"


@pytest.mark.parametrize(
    "deployments",
    ["foo", "5", "[x]", "[{name: ingress, user_config: 5}]", "[{name: ingress, user_config: {1: 5}}]"],
)
def test_check_config_names_what_is_wrong_with_deployments(tmp_path, deployments):
    path = tmp_path / "odd.yaml"
    path.write_text(f"{CONFIG.read_text()}\n    deployments: {deployments}\n")
    (error, *_), _ = check_config(str(path), {})
    assert "deployments" in error or "user_config: 1 cannot" in error


def test_check_config_reads_text_only(tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_bytes(b"\xff\xfe\x80")
    assert "not YAML" in check_config(str(path), {})[0][0]


def test_reconfigure_says_what_is_wrong_with_an_address(capsys):
    assert main(["reconfigure", str(CONFIG), "--address", "127.0.0.1:8265"]) == 1
    assert "http://" in capsys.readouterr().err


def test_check_config_command(tmp_path, capsys):
    assert main(["check-config", str(CONFIG)]) == 0
    assert main(["check-config", str(tmp_path / "absent.yaml")]) == 1
    assert "absent.yaml" in capsys.readouterr().err


def test_check_config_includes_the_environment():
    errors, warnings = check_config(str(CONFIG), {"KRONOS_MAX_CONTEXT": "x", "KRONOS_DEVICES": "cpu"})
    assert "KRONOS_MAX_CONTEXT" in errors[0]
    errors, warnings = check_config(str(CONFIG), {"KRONOS_DEVICES": "cpu"})
    assert (errors, len(warnings)) == ([], 1)


def test_the_command_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "serve_app.cli", "check-config", "serve_config.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "serve_config.yaml is fine")


def test_a_port_in_use_is_an_error_before_anything_starts(tmp_path, capsys):
    """Ray's own proxy would share it without a word."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        path = tmp_path / "serve_config.yaml"
        path.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1", "port": port}, "applications": []}))
        assert main(["check-config", str(path), "--port-free"]) == 1
        assert f"port {port} of 127.0.0.1 is in use" in capsys.readouterr().err
    assert main(["check-config", str(path), "--port-free"]) == 0
    # An address of the other family is no crash.
    path.write_text(yaml.safe_dump({"http_options": {"host": "::1", "port": port}, "applications": []}))
    assert main(["check-config", str(path), "--port-free"]) == 0
