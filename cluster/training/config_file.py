"""Reads the trainer's configuration: a YAML file and overrides → TrainConfig, or one error that names every fault."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from cluster.training.config import TrainConfig, TrainingConfig
from model.errors import InputError

SOURCE_KINDS = ("simulated", "file", "qlib")
"""Values of data.source.kind. pydantic puts them into the path of a fault, although the file has no such key."""

_MERGE = "tag:yaml.org,2002:merge"
"""The tag of <<, which brings in another section's keys."""

_NOT_OF_THIS_KIND = {
    "tuple_type": "must be a list, as in [a, b]",
    "model_type": "must be a section of keys and values",
    "model_attributes_type": "must be a section of keys and values",
}
"""pydantic's kind of fault → what to say instead: who writes YAML knows no tuples and no classes."""


class _OneValueAKey(yaml.SafeLoader):
    """YAML's safe subset; a key that stands twice in a section is an InputError, where PyYAML takes the last value."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        # Not where values are made: by then what << brings lies among the section's own keys, which replace it.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line, known = key.start_mark.line + 1, (key.tag, key.value)
            if known in lines:
                raise InputError(
                    f"line {line}: the key {key.value!r} stands in line {lines[known]} already: keep one, with what is "
                    "below both",
                    code="duplicate_key",
                )
            lines[known] = line
        return node


def _parse(text: str) -> Any:
    """A YAML text. Raises InputError for a doubled key, else YAMLError, or ValueError for a date that is none."""
    return yaml.load(text, Loader=_OneValueAKey)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and applies overrides such as "run.seed=3" (the value is YAML too).

    Raises InputError for what cannot be read, doubled and unknown keys (with the nearest known one) and wrong values.
    """
    try:
        raw = _parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", code="unreadable_config") from error
    except InputError as error:
        raise InputError(f"{path}, {error}", code=error.code) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none, or no UTF-8
        raise InputError(f"{path} is not YAML: {error}", code="unreadable_config") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold keys and values", code="unreadable_config")
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw)


def _apply(raw: dict[str, Any], override: str) -> None:
    """Sets one value in place; list items go by their number, as in tokenizer.phases.0.steps=5."""
    dotted, separator, text = override.partition("=")
    keys = dotted.split(".")
    if not separator or not all(keys):
        raise InputError(f"override {override!r} must look like section.key=value", code="bad_override")
    try:
        value = _parse(text)
    except InputError as error:
        raise InputError(f"override {override!r}: {error}", code=error.code) from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"override {override!r}: the value is not YAML: {error}", code="bad_override") from error
    place: Any = raw
    for depth, key in enumerate(keys):
        if isinstance(place, list) and not (key.isdigit() and int(key) < len(place)):
            raise InputError(f"override {override!r}: there is no item {key!r}", code="bad_override")
        if not isinstance(place, dict | list):
            raise InputError(f"override {override!r}: {keys[depth - 1]!r} is a value, no section", code="bad_override")
        at: Any = int(key) if isinstance(place, list) else key
        if depth == len(keys) - 1:
            place[at] = value
        else:
            place = place[at] if isinstance(place, list) else place.setdefault(at, {})


def parse_config(raw: dict[str, Any]) -> TrainConfig:
    """Checks a nested dict. Raises InputError that lists every fault."""
    try:
        return _with_tokenizer(TrainConfig.model_validate(raw))
    except ValidationError as error:
        found = error.errors()
        # A list whose only item is at fault counts as empty, and a default made of a value at fault is at fault, too:
        # that says nothing.
        faults = [
            _describe(raw, fault)
            for fault in found
            if fault["type"] != "default_factory_not_called"
            and not any(
                len(other["loc"]) > (n := len(fault["loc"])) and other["loc"][:n] == fault["loc"] for other in found
            )
        ]
        raise InputError("configuration: " + "; ".join(faults), code="bad_config") from None


def _with_tokenizer(config: TrainConfig) -> TrainConfig:
    """The same, with the tokenizer that init_from brings written down where nothing says another."""
    predictor = config.predictor
    if predictor is None or predictor.tokenizer is not None or config.tokenizer is not None:
        return config
    return config.model_copy(update={"predictor": predictor.model_copy(update={"tokenizer": predictor.init_from})})


def _describe(raw: dict[str, Any], fault: Any) -> str:
    path = [part for part in fault["loc"] if part not in SOURCE_KINDS]
    name = ".".join(str(part) for part in path) or "the file"
    if fault["type"] != "extra_forbidden":
        return f"{name}: {_NOT_OF_THIS_KIND.get(fault['type'], fault['msg'].removeprefix('Value error, '))}"
    if path[0] == "run" and path[-1] in TrainingConfig.model_fields:
        return f"{name} is not a key: it stands at training.{path[-1]}"
    known = _known_keys(TrainConfig, [str(part) for part in fault["loc"][:-1]])
    near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.0)
    return f"{name} is not a key; the nearest known one is {near[0]!r}" if near else f"{name} is not a key"


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the model that the path leads to; list indices and union tags are stepped over."""
    for part in path:
        field = model.model_fields.get(part)
        if field is None:  # an index or a union's tag
            continue
        choices = _models_in(field.annotation)
        if not choices:
            return []
        tag = next((p for p in path if p in SOURCE_KINDS), None)
        tagged = [m for m in choices if "kind" in m.model_fields and tag in get_args(m.model_fields["kind"].annotation)]
        model = (tagged or choices)[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, tuple, Annotated):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []
