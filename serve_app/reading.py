"""The bytes of a forecast request → what is asked for: parsed, validated and prepared, whatever route and format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from model.errors import clip_text
from serve_app import schemas
from serve_app.bodies import parse_json
from serve_app.catalog import Catalog
from serve_app.config import AppConfig
from serve_app.errors import Loc, ServiceError, field_errors, invalid_fields
from serve_app.prepare import Prepared, prepare_forecast, prepare_predictions, require_count

BodyT = TypeVar("BodyT", bound=BaseModel)


@dataclass(frozen=True)
class Asked:
    """A request that was read and found good. seed: the one that the answer shows."""

    body: Any
    model: str
    items: list[Prepared]
    seed: int = 0
    deadline_ms: float | None = None
    stream: bool = False


class Reading:
    """One method per route and format: bytes → Asked. All raise ServiceError with the places of what is wrong."""

    def __init__(self, config: AppConfig) -> None:
        self._config = config
        self._catalog = Catalog(config)

    def single(self, raw: bytes) -> Asked:
        body = _validated(schemas.PredictRequest, parse_json(raw))
        return self._predictions(body, [((), body)])

    def batch(self, raw: bytes) -> Asked:
        data = parse_json(raw)
        _require_few(data, "items", self._config.limits.max_series, "series")
        body = _validated(schemas.PredictBatchRequest, data)
        return self._predictions(body, [(("items", i), item) for i, item in enumerate(body.items)])

    def forecast(self, raw: bytes) -> Asked:
        return self._forecast(parse_json(raw))

    def forecast_arrow(self, raw: bytes) -> Asked:
        # Imported on first use: pyarrow takes memory, and most services never see a table.
        from serve_app.arrow import forecast_body

        return self._forecast(forecast_body(raw, self._config.limits))

    def _predictions(self, body: BaseModel, items: list[tuple[Loc, schemas.PredictRequest]]) -> Asked:
        prepared = prepare_predictions(items, self._config.limits, self._config.defaults)
        return Asked(body, self._config.default_model, prepared)

    def _forecast(self, data: Any) -> Asked:
        limits = self._config.limits
        _require_few(data, "series", limits.max_series, "series")
        _require_few(data, "quantiles", limits.max_quantiles, "quantiles")
        body = _validated(schemas.ForecastRequest, data)
        items, seed = prepare_forecast(body, limits, self._config.defaults)
        model = body.model or self._config.default_model
        if self._catalog.get(model) is None:
            raise ServiceError("unknown_model", f"unknown model {clip_text(model)!r}, see /v1/models")
        return Asked(body, model, items, seed, body.deadline_ms, body.stream)


def _require_few(data: Any, field: str, most: int, what: str) -> None:
    """Raises ServiceError for a list that is too long, before each of a million entries gets an error of its own."""
    entries = data.get(field) if isinstance(data, dict) else None
    if isinstance(entries, list):
        require_count((field,), len(entries), most, what)


def _validated(schema: type[BodyT], data: Any) -> BodyT:
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise invalid_fields(field_errors(error)) from None
