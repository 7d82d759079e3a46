"""KRONOS_* environment variables on top of an AppConfig.

Read once, when the application is built; the result travels to the replicas as their argument. Under `serve run` the
builder runs in a Ray worker, which inherits the variables of the shell that started the local Ray.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from serve_app.config import AppConfig, ModelConfig, nearest

PREFIX = "KRONOS_"
LOCAL_ALIAS = "kronos-local"
DEFAULT_TOKENIZER = "NeoQuasar/Kronos-Tokenizer-base"

SETTINGS: dict[str, tuple[str, ...]] = {
    "KRONOS_LOG_LEVEL": ("log_level",),
    "KRONOS_CLIP_VALUE": ("clip",),
    "KRONOS_MAX_REQUEST_SIZE_MB": ("limits", "max_request_mb"),
    "KRONOS_INFERENCE_TIMEOUT": ("limits", "inference_timeout_s"),
    "KRONOS_REQUEST_TIMEOUT": ("limits", "request_timeout_s"),
    "KRONOS_RATE_LIMIT_PER_MINUTE": ("limits", "rate_limit_per_minute"),
    "KRONOS_SECURITY_ENABLED": ("limits", "security_enabled"),
    "KRONOS_API_KEYS_FILE": ("auth", "keys_file"),
    "KRONOS_API_KEYS": ("auth", "keys"),
    "KRONOS_DEFAULT_PRED_LEN": ("defaults", "pred_len"),
    "KRONOS_DEFAULT_TEMPERATURE": ("defaults", "temperature"),
    "KRONOS_DEFAULT_TOP_K": ("defaults", "top_k"),
    "KRONOS_DEFAULT_TOP_P": ("defaults", "top_p"),
    "KRONOS_DEFAULT_SAMPLE_COUNT": ("defaults", "sample_count"),
}
"""Variables that set one value, and where."""

MODEL_VARIABLES = ("KRONOS_DEVICE", "KRONOS_MODEL_ID", "KRONOS_MODEL_PATH", "KRONOS_TOKENIZER_ID", "KRONOS_MAX_CONTEXT")
KNOWN = (*SETTINGS, *MODEL_VARIABLES)


class EnvironmentVariableError(ValueError):
    """A KRONOS_ variable holds something that its setting does not accept."""


def apply_environment(config: AppConfig, environ: Mapping[str, str]) -> tuple[AppConfig, list[str]]:
    """The configuration with the environment's overrides, and warnings (unknown variables, guesses).

    An empty variable counts as unset. Raises EnvironmentVariableError, naming the variable.
    """
    given = {name: value.strip() for name, value in environ.items() if name.startswith(PREFIX) and value.strip()}
    warnings = [
        f"unknown environment variable {name}{nearest(name, list(KNOWN))}" for name in given if name not in KNOWN
    ]
    data = config.model_dump()
    for name, path in SETTINGS.items():
        if name in given:
            _set(data, path, given[name].upper() if name == "KRONOS_LOG_LEVEL" else given[name])
            config = _validate(data, name)
    if any(name in given for name in MODEL_VARIABLES):
        warnings += _override_models(data, given)
        config = _validate(data, ", ".join(name for name in MODEL_VARIABLES if name in given))
    return config, warnings


def _set(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


def _validate(data: dict[str, Any], names: str) -> AppConfig:
    try:
        return AppConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise EnvironmentVariableError(
            f"{names}: {first['msg']} (setting {'.'.join(map(str, first['loc']))})"
        ) from None


def _override_models(data: dict[str, Any], given: dict[str, str]) -> list[str]:
    """Changes the default model (and, for the device, every model) in data. Returns warnings."""
    warnings: list[str] = []
    models: dict[str, dict[str, Any]] = data["models"]
    model_id, folder = given.get("KRONOS_MODEL_ID"), given.get("KRONOS_MODEL_PATH")
    tokenizer = given.get("KRONOS_TOKENIZER_ID")
    if model_id is not None:
        alias = _alias_of(model_id, models)
        if alias not in models:
            models[alias] = ModelConfig(source=model_id, tokenizer=tokenizer or DEFAULT_TOKENIZER).model_dump()
            if tokenizer is None and folder is None:
                warnings.append(f"KRONOS_MODEL_ID without KRONOS_TOKENIZER_ID: {DEFAULT_TOKENIZER} is used")
        data["default_model"] = alias
    if folder is not None:
        alias = data["default_model"] if model_id is not None else LOCAL_ALIAS
        known = models.get(alias, models[data["default_model"]])
        # Revisions and the tokenizer belong to the source that the folder replaces.
        models[alias] = {**known, "source": folder, "revision": None, "tokenizer": None, "tokenizer_revision": None}
        data["default_model"] = alias
    default = models[data["default_model"]]
    if tokenizer is not None:
        default.update(tokenizer=tokenizer, tokenizer_revision=None)
    if "KRONOS_MAX_CONTEXT" in given:
        default["max_context"] = given["KRONOS_MAX_CONTEXT"]
    if "KRONOS_DEVICE" in given:
        for model in models.values():
            model["device"] = given["KRONOS_DEVICE"].lower()
    return warnings


def _alias_of(model_id: str, models: dict[str, dict[str, Any]]) -> str:
    """The listed model that is meant, by alias or by repository; else a new alias made of the repository's name."""
    if model_id in models:
        return model_id
    for alias, model in models.items():
        if model["source"] == model_id:
            return alias
    name, whole = (
        re.sub(r"[^a-z0-9._-]", "-", part.lower()).strip("-._")[:64] for part in (model_id.rsplit("/", 1)[-1], model_id)
    )
    # A listed model of that name has another source: "someone/kronos-small" must not become our kronos-small.
    alias = whole if name in models else name
    return alias or LOCAL_ALIAS
