"""The `data:` section of a configuration: where candles come from, how they are split, which windows are left out."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, field_validator, model_validator


class Strict(BaseModel):
    """Unknown keys are errors; values do not change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""What torch takes, and fits into 64 bits wherever it is written."""


class SimulatedSource(Strict):
    """Series of cluster.candles.simulate."""

    kind: Literal["simulated"]
    seed: Seed = 0
    series: int = Field(default=200, ge=1)
    bars: int = Field(default=1000, ge=2, description="bars a series")
    bar_minutes: tuple[int, ...] = (1, 5, 15, 30, 60, 240, 1440)
    validation_seed: Seed = 1
    validation_series: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _held_out(self) -> SimulatedSource:
        if self.seed == self.validation_seed:
            raise ValueError("validation_seed must differ from seed: else validation repeats the training series")
        return self


class TimeSplit(Strict):
    """How a source of real bars is cut: at moments that hold for all symbols, given as times or as shares."""

    validation_from: datetime | None = Field(
        default=None, description="first moment of validation; UTC if the source has time zones"
    )
    test_from: datetime | None = Field(default=None, description="first moment that training never touches")
    validation_share: float | None = Field(
        default=None, gt=0, lt=1, description="instead of validation_from: share of the bar times that validation gets"
    )
    test_share: float | None = Field(
        default=None, gt=0, lt=1, description="the last share of the bar times, which training never touches"
    )
    embargo_bars: int = Field(default=0, ge=0, description="bars of a symbol after each boundary that nobody scores")
    reach_back: bool = Field(
        default=True,
        description="windows of validation and test may begin in the split before: those bars are context and are "
        "never scored. false: a window lies in one split",
    )

    @field_validator("validation_from", "test_from", mode="before")
    @classmethod
    def _no_number(cls, moment: Any) -> Any:
        if isinstance(moment, int | float) or (
            isinstance(moment, str) and moment.strip().replace(".", "", 1).isdigit()
        ):
            # As seconds since 1970, which is how pydantic would read it, 2024 is a moment of that year.
            raise ValueError(f"must be a date or time such as 2024-07-01, not {moment}")
        return moment

    @field_validator("validation_from", "test_from")
    @classmethod
    def _in_utc(cls, moment: datetime | None) -> datetime | None:
        return moment if moment is None or moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> TimeSplit:
        moments, shares = (self.validation_from, self.test_from), (self.validation_share, self.test_share)
        if any(m is not None for m in moments) and any(s is not None for s in shares):
            raise ValueError("give validation_from and test_from, or validation_share and test_share, not a mixture")
        if moments[0] is None and shares[0] is None:
            raise ValueError("give validation_from (a time) or validation_share (such as 0.15)")
        if sum(share or 0.0 for share in shares) >= 1:
            raise ValueError("validation_share and test_share leave nothing to train on: their sum must be below 1")
        return self

    def moments(self) -> list[np.datetime64]:
        """The boundaries that are given as times; empty if they are given as shares."""
        return [np.datetime64(m, "ns") for m in (self.validation_from, self.test_from) if m is not None]


def _paths(value: Any) -> Any:
    """Says in one sentence what pydantic would say of each of the two kinds."""
    several = value if isinstance(value, list | tuple) else [value]
    if several and all(isinstance(path, Path) or (isinstance(path, str) and path.strip()) for path in several):
        return value
    raise ValueError(f"must be a file, a folder, a pattern, or a list of them, not {value!r}")


class FileSource(TimeSplit):
    """CSV or Parquet files."""

    kind: Literal["file"]
    path: Annotated[Path | tuple[Path, ...], BeforeValidator(_paths)] = Field(
        description="a file, a folder, a pattern such as bars/*.parquet, or a list of them"
    )
    time_column: str = "timestamps"
    symbol_column: str = "symbol"
    cache: Path | None = Field(
        default=None, description="folder for a memory-mapped copy, which workers of one machine share; default: none"
    )

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path,) if isinstance(self.path, Path) else self.path


class QlibSource(TimeSplit):
    """A folder in Qlib's binary layout; see cluster.candles.qlib."""

    kind: Literal["qlib"]
    path: Path = Field(description="the folder with calendars/, instruments/ and features/")
    freq: str = Field(default="day", pattern=r"^[0-9a-z]+$", description="as in the names of its files: day, 1min, …")
    market: str = Field(default="all", pattern=r"^[A-Za-z0-9_-]+$", description="which instruments/<market>.txt")


class BarFilter(Strict):
    """Bars that training windows must not hold; null switches a rule off."""

    illiquid_bars: int | None = Field(default=20, ge=1, description="runs of at least so many bars without volume")
    stagnant_bars: int | None = Field(default=20, ge=2, description="runs of at least so many bars of the same close")
    jump: float | None = Field(
        default=0.3, gt=0, description="|log(open or close / the close before)| that a window must not straddle"
    )


class DataConfig(Strict):
    source: Annotated[SimulatedSource | FileSource | QlibSource, Discriminator("kind")]
    stride: int = Field(default=1, ge=1, description="bars between the starts of neighbouring windows")
    clip: float = Field(default=5.0, gt=0)
    min_context_share: float = Field(default=0.25, gt=0, lt=1, description="shortest context as a share of the window")
    max_gap_bars: int | None = Field(
        default=None, ge=0, description="windows never straddle more missing bars than that; default: any number"
    )
    filter: BarFilter | None = Field(default=None, description="default: none; {} switches all its rules on")
