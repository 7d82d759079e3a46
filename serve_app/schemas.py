"""The JSON that comes in, as types that refuse what does not fit; and that goes out, as documentation for /docs.

Strict: no string becomes a number, no unknown field is ignored. Columns become numpy arrays on the way. Limits that the
configuration sets, and what concerns several fields at once, are looked at in serve_app.prepare. No Ray, no torch.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Annotated, Any

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from model.engine.types import WindowPolicy
from serve_app.candles import candle_columns, number_column
from serve_app.errors import MAX_FIELD_ERRORS, UNKNOWN_FIELD, FieldError, value_errors
from serve_app.times import Times, parse_times

API_VERSION = "0.1.0"
MAX_SEED = 2**63 - 1
LOWEST_TEMPERATURE = 0.01
"""Below this and above 0, logits / temperature leaves float32. 0 is greedy."""


def _column(raw: Any, info: ValidationInfo) -> np.ndarray:
    return number_column(raw, str(info.field_name))


_PRICE: dict[str, Any] = {"type": "number", "exclusiveMinimum": 0}
_QUANTITY: dict[str, Any] = {"type": "number", "minimum": 0}
Prices = Annotated[np.ndarray, PlainValidator(_column), WithJsonSchema({"type": "array", "items": _PRICE})]
Quantities = Annotated[np.ndarray, PlainValidator(_column), WithJsonSchema({"type": "array", "items": _QUANTITY})]

_CANDLES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "description": "bars, oldest first; if no bar has an amount, it is volume × the mean of the four prices",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["open", "high", "low", "close"],
        "properties": {
            **dict.fromkeys(("open", "high", "low", "close"), _PRICE),
            **{name: {**_QUANTITY, "default": 0} for name in ("volume", "amount")},
        },
    },
}
Candles = Annotated[dict[str, np.ndarray], PlainValidator(candle_columns), WithJsonSchema(_CANDLES_SCHEMA)]

_TIMES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "string", "format": "date-time"},
    "description": "ISO 8601, strictly increasing, all with one UTC offset or all without",
}


def _times(raw: Any) -> Times:
    times = parse_times(raw)
    if not len(times):
        raise PydanticCustomError("too_few", "must hold at least one timestamp")
    return times


TimesField = Annotated[Times, PlainValidator(_times), WithJsonSchema(_TIMES_SCHEMA)]


def _temperature(value: float) -> float:
    if 0 < value < LOWEST_TEMPERATURE:
        raise PydanticCustomError("out_of_range", f"must be 0 (greedy) or at least {LOWEST_TEMPERATURE}")
    return value


def _levels(values: list[float]) -> list[float]:
    if len(set(values)) != len(values):
        raise PydanticCustomError("duplicate_quantiles", "each quantile must be there once")
    return values


def _window(policy: str) -> str:
    try:
        return str(WindowPolicy.parse(policy))
    except ValueError:
        raise PydanticCustomError("unknown_window", "must be exact, fit or hop:K with K from 1 to 9999") from None


Name = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Horizon = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False), AfterValidator(_temperature)]
TopK = Annotated[
    int, Field(ge=0, le=2**20, description="keep the k likeliest tokens; 0 is off; above 0, top_p is ignored")
]
TopP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="nucleus sampling; 1 is off")]
Samples = Annotated[int, Field(ge=1, description="paths per series")]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED, description="absent: one is drawn and returned")]
Level = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(gt=0, le=86_400_000, allow_inf_nan=False)]
Quantiles = Annotated[list[Level], AfterValidator(_levels)]
WindowName = Annotated[
    str,
    AfterValidator(_window),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": "^(exact|fit|hop:[1-9][0-9]{0,3})$",
            "description": "what happens when history and forecast outgrow the model's context: exact recomputes the "
            "window with every bar, hop:K drops K bars at once, fit starts so late in the history that nothing slides",
        }
    ),
]


class Body(BaseModel):
    """A JSON object of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_unknown_fields(cls, data: Any) -> Any:
        # pydantic would make an error of every one, and a body can hold a million.
        if isinstance(data, dict) and len(data) > len(cls.model_fields) + MAX_FIELD_ERRORS:
            unknown = islice((key for key in data if key not in cls.model_fields), MAX_FIELD_ERRORS + 1)
            raise value_errors(FieldError((key,), *UNKNOWN_FIELD) for key in unknown)
        return data


class Overrides(Body):
    """Settings of one prediction; what is absent comes from the server's defaults."""

    pred_len: Horizon | None = Field(default=None, description="must equal the number of prediction_timestamps")
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    sample_count: Samples | None = None


class PredictRequest(Body):
    """One history and the times to predict."""

    series_id: Name | None = None
    candles: Candles
    timestamps: TimesField
    prediction_timestamps: TimesField
    overrides: Overrides | None = None


class PredictItem(PredictRequest):
    """One prediction of a batch."""

    series_id: Name


class PredictBatchRequest(Body):
    """Any mix of lengths, horizons and overrides."""

    items: list[PredictItem] = Field(min_length=1)


class ForecastSeries(Body):
    """One history, by columns. Horizon and sampling given here win over the request's."""

    id: Name | None = Field(default=None, description="absent: the position in the request, from 0")
    timestamps: TimesField
    open: Prices
    high: Prices
    low: Prices
    close: Prices
    volume: Quantities | None = Field(default=None, description="absent: 0, and amount is 0 too")
    amount: Quantities | None = Field(default=None, description="absent: volume × the mean of the four prices")
    horizon: Horizon | None = None
    freq: Name | None = None
    calendar: Name | None = None
    future_timestamps: TimesField | None = None
    samples: Samples | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    window: WindowName | None = None


class ForecastRequest(Body):
    """Several histories, and how to forecast them."""

    model: Name | None = Field(default=None, description="absent: the server's default model, see /v1/models")
    series: list[ForecastSeries] = Field(min_length=1)
    horizon: Horizon | None = Field(
        default=None, description="bars to forecast; absent: as many as future_timestamps, or the default"
    )
    freq: Name | None = Field(
        default=None,
        description="bar size such as 5min, 1h, 1d; absent: inferred, refused if ambiguous",
    )
    calendar: Name | None = Field(default=None, description="an exchange_calendars name such as XNYS, or 24/7")
    future_timestamps: TimesField | None = Field(
        default=None, description="the bars to forecast, for every series that names none"
    )
    samples: Samples | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    window: WindowName | None = None
    quantiles: Quantiles = Field(default=[0.1, 0.5, 0.9], min_length=1)
    return_paths: bool = False
    repair: str = Field(default="off", description='"ohlc" makes every path a valid candle, "off" does not')
    calibrate: bool = Field(
        default=False,
        description="move the sampled prices by the calibration that was fitted for the model and the series' id; 409 "
        "for a model without one",
    )
    stream: bool = Field(
        default=False, description="server-sent events: bars as they become final, then the whole answer"
    )
    deadline_ms: Milliseconds | None = Field(
        default=None, description="408 if it takes longer; the server's own deadline is at /v1/info"
    )


class Candle(BaseModel):
    timestamp: str
    open: float
    high: float
    low: float
    close: float
    volume: float
    amount: float


class Prediction(BaseModel):
    series_id: str | None
    prediction: list[Candle]
    model_version: str
    tokenizer_version: str
    device: str
    device_warning: str | None


class ColumnsOut(BaseModel):
    open: list[float]
    high: list[float]
    low: list[float]
    close: list[float]
    volume: list[float]
    amount: list[float]


class Summary(BaseModel):
    last_close: float
    expected_return: float
    upside_probability: float
    volatility: float | None
    volatility_amplification_probability: float | None
    expected_max_drawdown: float


class WindowOut(BaseModel):
    context_used: int
    slid: bool
    policy: str


class Parameters(BaseModel):
    horizon: int
    samples: int
    temperature: float
    top_k: int
    top_p: float
    seed: int


class CalibrationOut(BaseModel):
    """entry: symbol, bar_size or pooled, what the fitted numbers were chosen by. Coverage: nominal → measured share."""

    method: str
    entry: str
    symbol: str | None
    forecasts: int
    fitted_on: dict[str, Any]
    raw_coverage: dict[str, float]
    calibrated_coverage: dict[str, float]


class SeriesForecast(BaseModel):
    id: str
    timestamps: list[str]
    mean: ColumnsOut
    quantiles: dict[str, ColumnsOut]
    paths: list[ColumnsOut] | None = None
    summary: Summary
    window: WindowOut
    parameters: Parameters
    calibration: CalibrationOut | None = None


class ForecastBars(BaseModel):
    """An event of a stream: bars of one series. series: its position in the request. first: index of the first bar."""

    id: str
    series: int
    first: int
    timestamps: list[str]
    mean: ColumnsOut
    quantiles: dict[str, ColumnsOut]
    final: bool


class ModelOut(BaseModel):
    id: str
    repo: str
    revision: str | None
    sha256: str


class ForecastAnswer(BaseModel):
    model: ModelOut
    device: str
    device_warning: str | None
    precision: str
    window: WindowOut
    seed: int
    parameters: dict[str, Any]
    repaired: int
    series: list[SeriesForecast]


class FieldErrorOut(BaseModel):
    loc: list[str | int]
    code: str
    message: str


class ErrorOut(BaseModel):
    code: str
    message: str
    request_id: str
    fields: list[FieldErrorOut] = Field(max_length=20)


class ErrorBody(BaseModel):
    error: ErrorOut
    detail: str


def json_safe_level(level: float) -> str:
    """The key of a quantile in an answer: 0.1 → "0.1", 0.50 → "0.5", 1 → "1"."""
    return str(int(level)) if math.floor(level) == level else repr(level)
