"""Commands beside `serve run`.

python -m serve_app.cli check-config serve_config.yaml [--port-free]
python -m serve_app.cli reconfigure serve_config.yaml [--address http://127.0.0.1:8265]
python -m serve_app.cli new-key NAME [--scope predict] [--scope admin] [--per-minute N] [--concurrent N]
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from serve_app.config import AppConfig, AuthConfig, GroupsConfig, nearest
from serve_app.environment import EnvironmentVariableError
from serve_app.keys import PREDICT, SCOPES, KeyFileError, new_key
from serve_app.listing import deployment_name
from serve_app.live_config import InvalidUserConfigError, LiveConfig
from serve_app.reconfigure import reconfigure, send_token_if_there_is_one

BUILDER = "serve_app.app:build_app"
DEPLOYMENTS = ["ingress", *map(deployment_name, GroupsConfig.model_fields)]
"""Those of an application; it may do without one of the groups."""


def check_config(path: str, environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(errors, warnings) of a Serve configuration, its `args:` and the environment. Empty lists: fine.

    Ray Serve itself ignores unknown keys without a word; here they are errors that name the nearest known one.
    """
    from ray.serve.schema import ServeDeploySchema

    try:
        with open(path, encoding="utf-8") as file:
            data = yaml.safe_load(file)
    except OSError as error:
        return [f"{path}: {error.strerror}"], []
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return [f"{path} is not YAML: {error}"], []
    if not isinstance(data, dict):
        return [f"{path} does not hold a mapping"], []
    errors = _unknown_keys(data, ServeDeploySchema, ())
    host = None
    try:
        # Left out, it is 0.0.0.0.
        host = ServeDeploySchema.model_validate(data).http_options.host
    except ValidationError as error:
        errors += _texts(error, ())
    except (AttributeError, TypeError):  # Serve's own validators stumble over entries of another shape
        errors.append("applications: every application, and every one of its deployments, must be a mapping")
    warnings: list[str] = []
    applications = data.get("applications")
    for index, application in enumerate(applications if isinstance(applications, list) else []):
        if not isinstance(application, dict) or application.get("import_path") != BUILDER:
            continue
        errors += _unknown_deployments(application, ("applications", index, "deployments"))
        place = ("applications", index, "args")
        try:
            live = LiveConfig(AppConfig.model_validate(application.get("args") or {}), environ)
            warnings += live.warnings
            errors += _auth_errors(live.current.auth, host)
            for user_config in _user_configs(application):
                live.update(user_config)
        except ValidationError as error:
            errors += _texts(error, place)
        except (EnvironmentVariableError, InvalidUserConfigError) as error:
            errors.append(str(error))
    return errors, warnings


def _deployments(application: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """With their indices; what has another shape is an error of Serve's schema."""
    deployments = application.get("deployments")
    entries = enumerate(deployments) if isinstance(deployments, list) else ()
    return [(index, entry) for index, entry in entries if isinstance(entry, dict)]


def _user_configs(application: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [config for _, entry in _deployments(application) if isinstance(config := entry.get("user_config"), dict)]


def _unknown_deployments(application: Mapping[str, Any], place: tuple[str | int, ...]) -> list[str]:
    """Serve takes settings for a deployment that the application does not have, and nothing changes."""
    return [
        f"{_dotted((*place, index, 'name'))}: unknown deployment {name!r}{nearest(name, DEPLOYMENTS)}"
        for index, entry in _deployments(application)
        if isinstance(name := entry.get("name"), str) and name not in DEPLOYMENTS
    ]


def _auth_errors(auth: AuthConfig, host: str | None) -> list[str]:
    errors = [auth.address_error(host)]
    try:
        auth.key_ring()
    except KeyFileError as error:
        errors.append(f"auth: {error}")
    return [error for error in errors if error]


def _unknown_keys(data: Any, schema: type[BaseModel], place: tuple[str | int, ...]) -> list[str]:
    """Keys that the schema does not have, at every level that is made of schemas itself."""
    if not isinstance(data, dict):
        return []
    errors = []
    for key, value in data.items():
        field = schema.model_fields.get(key)
        if field is None:
            errors.append(f"{_dotted((*place, str(key)))}: unknown key{nearest(str(key), list(schema.model_fields))}")
            continue
        for inner in _schemas_in(field.annotation):
            values = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, item in values:
                errors += _unknown_keys(item, inner, (*place, key) if index is None else (*place, key, index))
    return errors


def _schemas_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [schema for argument in get_args(annotation) for schema in _schemas_in(argument)][:1]


def _texts(error: ValidationError, place: tuple[str | int, ...]) -> list[str]:
    return [f"{_dotted((*place, *item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]


def _dotted(place: tuple[str | int, ...]) -> str:
    return ".".join(map(str, place)) or "the configuration"


def port_errors(path: str) -> list[str]:
    """Ray's proxy would share the port of another service without a word, and the two would answer in turn."""
    with open(path, encoding="utf-8") as file:
        options = (yaml.safe_load(file) or {}).get("http_options", {})
    host, port = options.get("host", "127.0.0.1"), int(options.get("port", 8000))
    try:
        socket.create_connection(({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port), timeout=1).close()
    except OSError:
        return []
    return [f"port {port} of {host} is in use: stop what listens there, or change http_options.port in {path}"]


def _checked(options: argparse.Namespace) -> bool:
    """Says what is wrong with the file; True if nothing is."""
    errors, warnings = check_config(options.path, os.environ)
    if getattr(options, "port_free", False) and not errors:
        errors = port_errors(options.path)
    for warning in warnings:
        print(f"warning: {warning}")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return not errors


def _check(options: argparse.Namespace) -> int:
    if not _checked(options):
        return 1
    print(f"{options.path} is fine")
    return 0


def _reconfigure(options: argparse.Namespace) -> int:
    send_token_if_there_is_one()
    if not _checked(options):
        return 1
    with open(options.path, encoding="utf-8") as file:
        data = yaml.safe_load(file)
    try:
        lines = reconfigure(options.address, data, BUILDER)
    except (ValueError, ConnectionError, RuntimeError) as error:  # ValueError: RestartNeededError, or a wrong address
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


def _new_key(options: argparse.Namespace) -> int:
    given = {"per_minute": options.per_minute, "concurrent": options.concurrent}
    limits = [f"{name}={value}" for name, value in given.items() if value is not None]
    try:
        secret, line = new_key(options.name, options.scope or [PREDICT], limits)
    except KeyFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"The key, for the client; it is shown this once and stored nowhere:\n\n  {secret}\n")
    print(f"The line for the file that auth.keys_file or KRONOS_API_KEYS_FILE names:\n\n{line}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the process's exit status: 0 fine, 1 errors were found."""
    parser = argparse.ArgumentParser(prog="python -m serve_app.cli", description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(required=True)
    check = commands.add_parser("check-config", help="check a Serve configuration strictly, without starting anything")
    check.add_argument("path", nargs="?", default="serve_config.yaml")
    check.add_argument("--port-free", action="store_true", help="also check that nobody listens on its HTTP port")
    check.set_defaults(run=_check)
    live = commands.add_parser("reconfigure", help="send models, limits and defaults to a running service, no restart")
    live.add_argument("path", nargs="?", default="serve_config.yaml")
    live.add_argument("--address", default=os.environ.get("RAY_DASHBOARD_ADDRESS", "http://127.0.0.1:8265"))
    live.set_defaults(run=_reconfigure)
    key = commands.add_parser("new-key", help="make an API key")
    key.add_argument("name", help="who it is for; shown in logs")
    key.add_argument("--scope", action="append", choices=SCOPES, help="what it may (default: predict)")
    key.add_argument("--per-minute", type=int, help="its own rate limit; 0 is none")
    key.add_argument("--concurrent", type=int, help="its own limit of requests at once; 0 is none")
    key.set_defaults(run=_new_key)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
