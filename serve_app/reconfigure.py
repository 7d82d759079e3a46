"""`python -m serve_app.cli reconfigure FILE`: models, limits and defaults of an edited file, without a restart.

Ray restarts every replica when `args:` change, and none when `user_config` does. So what may change live is taken out
of the file's args and sent as user_config of the application's deployments; the args stay what they were.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve_app.config import LIVE, AppConfig


class RestartNeededError(ValueError):
    """The file differs from what runs in keys that only a restart can change. The message names them."""


def with_user_config(
    running: Mapping[str, Any], deployments: list[str], edited_args: Mapping[str, Any]
) -> dict[str, Any]:
    """The running application's schema with the live part of the edited args as user_config of every deployment.

    running: its deployed_app_config. Raises RestartNeededError if the args differ in anything else, and
    pydantic.ValidationError for args that are no AppConfig.
    """
    before = AppConfig.model_validate(running.get("args") or {}).model_dump()
    after = AppConfig.model_validate(edited_args).model_dump()
    fixed = sorted(key for key in after if key not in LIVE and after[key] != before[key])
    if fixed:
        raise RestartNeededError(f"{', '.join(fixed)} cannot change without a restart: use `serve deploy` for that")
    kept = {entry["name"]: entry for entry in running.get("deployments") or []}
    # With what the file leaves out: a key that is gone means its default, and not what the service was started with.
    user_config = {key: after[key] for key in LIVE}
    entries = [{**kept.pop(name, {}), "name": name, "user_config": user_config} for name in deployments]
    return {**running, "deployments": [*entries, *kept.values()]}


def send_token_if_there_is_one() -> None:
    """A cluster that `make serve` or `serve run` starts asks for the token that Ray then keeps in the home directory.

    Ray's clients send it only if they are told to before Ray is imported; a cluster that asks for none ignores it.
    """
    kept = Path.home() / ".ray" / "auth_token"
    if kept.exists() or "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def reconfigure(address: str, data: Mapping[str, Any], builder: str) -> list[str]:
    """Sends the live part of a Serve configuration to the cluster whose dashboard is at the address.

    data: the edited file. builder: import_path of the applications that it is about; others stay as they run.
    Returns what it did, a line each. Raises RestartNeededError, ConnectionError, and RuntimeError for what Ray refuses,
    a wrong token among it.
    """
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
    from ray.exceptions import AuthenticationError

    try:
        client = ServeSubmissionClient(address)
        in_effect = client.get_serve_details()
    except AuthenticationError as error:
        raise RuntimeError(str(error)) from None
    details = in_effect["applications"]
    edited = {app.get("name", "default"): app for app in data["applications"] if app.get("import_path") == builder}
    missing = sorted(edited.keys() - details.keys())
    if missing:
        raise RestartNeededError(f"no application {', '.join(missing)} is running there: start it with `serve run`")
    applications = []
    for name, application in details.items():
        running = application["deployed_app_config"]
        if name in edited:
            args = edited[name].get("args") or {}
            running = with_user_config(running, list(application["deployments"]), args)
        applications.append(running)
    top = {key: value for key, value in data.items() if key != "applications"}
    client.deploy_applications({**top, "applications": applications})
    sent = [f"{name}: sent; /v1/models shows what is being loaded, /v1/info the settings in effect" for name in edited]
    return [*sent, *(f"{key} stays as it is: that takes a restart" for key in _left_alone(data, in_effect))]


def _left_alone(edited: Mapping[str, Any], in_effect: Mapping[str, Any]) -> list[str]:
    """Changed keys that Ray reads when the cluster starts, and not again: it would ignore them without a word."""
    http, http_in_effect = edited.get("http_options") or {}, in_effect.get("http_options") or {}
    changed = [f"http_options.{key}" for key in http if key in http_in_effect and http_in_effect[key] != http[key]]
    proxies = edited.get("proxy_location", in_effect.get("proxy_location"))
    return [*changed, *(["proxy_location"] if proxies != in_effect.get("proxy_location") else [])]
