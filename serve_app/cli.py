"""Commands beside `serve run`.

python -m serve_app.cli check-config serve_config.yaml [--port-free]
python -m serve_app.cli reconfigure serve_config.yaml [--address http://127.0.0.1:8265]
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

from serve_app.config import AppConfig, nearest
from serve_app.environment import EnvironmentVariableError
from serve_app.live_config import InvalidUserConfigError, LiveConfig
from serve_app.reconfigure import RestartNeededError, reconfigure

BUILDER = "serve_app.app:build_app"


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
    except yaml.YAMLError as error:
        return [f"{path} is not YAML: {error}"], []
    if not isinstance(data, dict):
        return [f"{path} does not hold a mapping"], []
    errors = _unknown_keys(data, ServeDeploySchema, ())
    try:
        ServeDeploySchema.model_validate(data)
    except ValidationError as error:
        errors += _texts(error, ())
    warnings: list[str] = []
    applications = data.get("applications")
    for index, application in enumerate(applications if isinstance(applications, list) else []):
        if not isinstance(application, dict) or application.get("import_path") != BUILDER:
            continue
        place = ("applications", index, "args")
        try:
            live = LiveConfig(AppConfig.model_validate(application.get("args") or {}), environ)
            warnings += live.warnings
            for deployment in application.get("deployments") or []:
                live.update(deployment.get("user_config") or {})
        except ValidationError as error:
            errors += _texts(error, place)
        except (EnvironmentVariableError, InvalidUserConfigError) as error:
            errors.append(str(error))
    return errors, warnings


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
    with socket.socket() as probe:
        probe.settimeout(1)
        taken = probe.connect_ex(("127.0.0.1" if host == "0.0.0.0" else host, port)) == 0
    text = f"port {port} of {host} is in use: stop what listens there, or change http_options.port in {path}"
    return [text] if taken else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the process's exit status: 0 fine, 1 errors were found."""
    parser = argparse.ArgumentParser(prog="python -m serve_app.cli", description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(required=True, dest="command")
    check = commands.add_parser("check-config", help="check a Serve configuration strictly, without starting anything")
    check.add_argument("path", nargs="?", default="serve_config.yaml")
    check.add_argument("--port-free", action="store_true", help="also check that nobody listens on its HTTP port")
    live = commands.add_parser("reconfigure", help="send models, limits and defaults to a running service, no restart")
    live.add_argument("path", nargs="?", default="serve_config.yaml")
    live.add_argument("--address", default=os.environ.get("RAY_DASHBOARD_ADDRESS", "http://127.0.0.1:8265"))
    options = parser.parse_args(arguments)
    errors, warnings = check_config(options.path, os.environ)
    if options.command == "check-config" and options.port_free and not errors:
        errors = port_errors(options.path)
    for warning in warnings:
        print(f"warning: {warning}")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        return 1
    if options.command == "reconfigure":
        return _reconfigure(options.path, options.address)
    print(f"{options.path} is fine")
    return 0


def _reconfigure(path: str, address: str) -> int:
    with open(path, encoding="utf-8") as file:
        data = yaml.safe_load(file)
    try:
        lines = reconfigure(address, data, BUILDER)
    except (RestartNeededError, ConnectionError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
