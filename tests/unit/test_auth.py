"""API keys: the file, the routes they open, and the addresses that need them."""

import json
import re

import pytest
import yaml

from serve_app.cli import check_config, main
from serve_app.config import AppConfig
from serve_app.environment import EnvironmentVariableError, apply_environment
from serve_app.keys import KeyFileError, KeyRing, address_error, new_key, parse_keys

DIGEST = "0" * 64


@pytest.fixture
def keys(tmp_path):
    """{scope: key}, and the path of their file."""
    made = {scope: new_key(f"{scope}-client", [scope]) for scope in ("predict", "admin")}
    path = tmp_path / "keys"
    path.write_text("# who may ask\n\n" + "\n".join(line for _, line in made.values()))
    return {scope: secret for scope, (secret, _) in made.items()}, str(path)


@pytest.fixture
def guarded(make_http, keys):
    return make_http(auth={"keys_file": keys[1]}), keys[0]


def bearer(key):
    return {"authorization": f"Bearer {key}"}


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_new_key_opens_what_its_line_says():
    secret, line = new_key("alice", ["predict"], ["per_minute=5"])
    assert secret not in line
    assert len(secret) > 40
    (key,) = parse_keys(line + "  # a comment")
    assert (key.name, key.scopes, key.per_minute, key.concurrent) == ("alice", {"predict"}, 5, None)
    ring = KeyRing(None, line)
    assert ring.find(secret) == key
    for wrong in ("", secret[:-1], secret + "x", "x" * 10**6, "\udce9", line.split()[2]):
        assert ring.find(wrong) is None


@pytest.mark.parametrize(
    "line",
    [
        "alice predict",
        "alice predict kronos_plainkey",
        f"alice predict {DIGEST}",
        f"alice predict sha256:{DIGEST[:-1]}",
        f"alice root sha256:{DIGEST}",
        f"alice predict, sha256:{DIGEST}",
        f"a/b predict sha256:{DIGEST}",
        f"alice predict sha256:{DIGEST} per_hour=3",
        f"alice predict sha256:{DIGEST} per_minute=1 per_minute=2",
        f"alice predict sha256:{DIGEST}\nalice predict sha256:{'1' * 64}",
    ],
)
def test_lines_that_are_refused_are_not_echoed(line):
    with pytest.raises(KeyFileError, match=r"^line [12] of the API keys: ") as caught:
        parse_keys(line)
    assert "plainkey" not in str(caught.value)


def test_lines_are_counted_within_the_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# mine\nbob predict sha256:{DIGEST}\nplainkey")
    with pytest.raises(KeyFileError, match=r"^line 3 of the API keys"):
        KeyRing(str(path), f"alice predict sha256:{DIGEST}; carol predict sha256:{DIGEST}")
    path.write_text(f"bob predict sha256:{DIGEST}")
    with pytest.raises(KeyFileError, match="another line has this name"):
        KeyRing(str(path), f"bob predict sha256:{DIGEST}")


def test_files_that_cannot_be_used(tmp_path):
    for content in (None, b"", b"# nothing\n", b"\xff\xfe"):
        path = tmp_path / "keys"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(KeyFileError):
            KeyRing(str(path))


def test_a_changed_file_is_read_again_and_a_broken_one_is_not_used(tmp_path):
    now = [0.0]
    path = tmp_path / "keys"
    (first, line), (second, other) = new_key("one", ["predict"]), new_key("two", ["predict"])
    path.write_text(line)
    ring = KeyRing(str(path), clock=lambda: now[0])
    path.write_text(other + "\n")
    assert ring.find(first)
    now[0] += 3
    assert ring.find(first) is None
    assert ring.find(second)
    path.write_text("half a li")
    now[0] += 3
    assert ring.find(second)
    path.unlink()
    now[0] += 3
    assert ring.find(second)


# --- routes -----------------------------------------------------------------------------------------------------------


def test_who_may_what(guarded, columns):
    http, keys = guarded
    body = {"series": [columns()], "horizon": 2}
    for route in ("/v1/healthz", "/v1/readyz", "/", "/docs"):
        assert http.get(route).status_code == 200, route
    for route in ("/v1/models", "/v1/info", "/openapi.json", "/v1/metrics", "/v1/replicas", "/v1/nothing"):
        for headers in ({}, bearer("x"), {"authorization": "Basic eDp5"}, {"x-api-key": "wrong"}, bearer("")):
            response = http.get(route, headers=headers)
            assert response.status_code == 401, route
            assert response.headers["www-authenticate"] == 'Bearer realm="kronos"'
            assert response.json()["error"]["code"] == "unauthorized"
            assert response.json()["error"]["request_id"] == response.headers["x-request-id"]
    assert http.post("/v1/forecast", body).status_code == 401
    for headers in (
        bearer(keys["predict"]),
        {"x-api-key": keys["predict"]},
        {"authorization": f"bearer {keys['admin']}"},
    ):
        assert http.post("/v1/forecast", body, headers=headers).status_code == 200
        assert http.get("/v1/models", headers=headers).status_code == 200
        assert http.get("/v1/nothing", headers=headers).status_code == 404
    for route in ("/v1/metrics", "/v1/replicas", "/v1/healthz/detailed"):
        response = http.get(route, headers=bearer(keys["predict"]))
        assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")
        assert http.get(route, headers=bearer(keys["admin"])).status_code == 200
    text = http.get("/v1/metrics", headers=bearer(keys["admin"])).text
    assert float(re.search(r'event="unauthorized"} ([0-9.]+)', text)[1]) == 31
    assert float(re.search(r'event="forbidden"} ([0-9.]+)', text)[1]) == 3


def test_a_refusal_does_not_wait_for_the_body(guarded):
    http, _ = guarded

    async def never():
        raise AssertionError("the body was read")
        yield b""

    assert http.post("/v1/forecast", raw=never()).status_code == 401


def test_the_name_is_logged_and_the_key_nowhere(guarded, columns, log_lines):
    http, keys = guarded
    http.post("/v1/forecast", {"series": [columns()], "horizon": 1}, headers=bearer(keys["predict"]))
    http.post("/v1/forecast", {}, headers=bearer("kronos_wrong"))
    assert [line["client"] for line in log_lines] == ["predict-client", "anonymous"]
    everything = json.dumps(log_lines)
    for route in ("/v1/info", "/v1/metrics", "/openapi.json"):
        everything += http.get(route, headers=bearer(keys["admin"])).text
    for secret in (*keys.values(), "kronos_wrong", "sha256:"):
        assert secret not in everything
    assert http.get("/v1/info", headers=bearer(keys["admin"])).json()["settings"]["auth"] == {
        "keys_required": True,
        "allow_anonymous_on_public_address": False,
    }


def test_limits_are_per_key(make_http, columns):
    (first, one), (second, two), (free, three) = (
        new_key("one", ["predict"]),
        new_key("two", ["predict"], ["per_minute=1"]),
        new_key("three", ["predict"], ["per_minute=0"]),
    )
    http = make_http(auth={"keys": ";".join((one, two, three))}, limits={"rate_limit_per_minute": 2})
    body = {"series": [columns()], "horizon": 1}

    def statuses(key):
        return [http.post("/v1/forecast", body, headers=bearer(key)).status_code for _ in range(4)]

    assert statuses(first) == [200, 200, 429, 429]
    assert statuses(second) == [200, 429, 429, 429]
    assert statuses(free) == [200] * 4


def test_without_keys_nothing_is_asked(http):
    assert http.get("/v1/metrics").status_code == 200
    assert http.get("/v1/info").json()["settings"]["auth"]["keys_required"] is False


# --- configuration ----------------------------------------------------------------------------------------------------


def test_the_environment_names_the_file_or_holds_the_lines(keys):
    _, path = keys
    config, warnings = apply_environment(AppConfig(), {"KRONOS_API_KEYS_FILE": path})
    assert (config.auth.keys_file, config.auth.required, warnings) == (path, True, [])
    _, line = new_key("alice", ["admin"])
    config, _ = apply_environment(AppConfig(), {"KRONOS_API_KEYS": line})
    assert config.auth.required
    with pytest.raises(EnvironmentVariableError, match=r"KRONOS_API_KEYS: .*line 1") as caught:
        apply_environment(AppConfig(), {"KRONOS_API_KEYS": "kronos_secret"})
    assert "kronos_secret" not in str(caught.value)


def test_a_key_in_the_wrong_place_is_not_shown():
    with pytest.raises(ValueError, match="line 1 of the API keys") as caught:
        AppConfig(auth={"keys": "alice predict kronos_secret"})
    assert "kronos_secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", None])
def test_addresses_that_need_no_key(host):
    assert address_error(host, keys_required=False, allow_anonymous=False) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "kronos.example.org", ""])
def test_addresses_that_do(host):
    assert "http_options.host" in address_error(host, keys_required=False, allow_anonymous=False)
    assert address_error(host, keys_required=True, allow_anonymous=False) is None
    assert address_error(host, keys_required=False, allow_anonymous=True) is None


def test_check_config_refuses_an_open_address_without_keys(tmp_path, keys):
    def errors(http_options, **auth):
        data = {
            "http_options": http_options,
            "applications": [{"name": "k", "import_path": "serve_app.app:build_app", "args": {"auth": auth}}],
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(data))
        return check_config(str(path), {})[0]

    for http_options in ({"host": "0.0.0.0"}, {"port": 8000}):
        (error,) = errors(http_options)
        assert "0.0.0.0" in error
        assert errors(http_options, keys_file=keys[1]) == []
        assert errors(http_options, allow_anonymous_on_public_address=True) == []
    assert errors({"host": "127.0.0.1"}) == []
    assert errors({"host": "127.0.0.1"}, keys_file="/no/such/file") == [
        "auth: the file of API keys cannot be read: FileNotFoundError"
    ]


def test_the_command_makes_keys(capsys):
    assert main(["new-key", "alice", "--scope", "predict", "--scope", "admin", "--concurrent", "2"]) == 0
    printed = capsys.readouterr().out
    secret = re.search(r"kronos_\S+", printed)[0]
    line = printed.strip().split("\n")[-1]
    key = KeyRing(None, line).find(secret)
    assert (key.name, key.scopes, key.concurrent) == ("alice", {"predict", "admin"}, 2)
    assert main(["new-key", "a b"]) == 1
    assert "name" in capsys.readouterr().err
