"""Writes the model card of a bundle from what the trainer recorded and what cluster.evaluate measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.bundles.training_record import TRAINING_FILE
from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from model.errors import InputError
from model.registry import BUNDLED, BUNDLED_FOLDER
from model.types import COLUMNS

AIMS = "Aims: CRPS at most 1.10 of the random walk's, coverage between 0.65 and 0.92."


def write_card(path: Path, bundle: Path, numbers: dict[str, Any]) -> None:
    """numbers: what cluster.evaluate prints. Raises InputError as training_of."""
    training = training_of(bundle)
    sections = [_head(bundle, training), _how_made(training), _measured(numbers), _limits(training, numbers)]
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def training_of(bundle: Path) -> dict[str, Any]:
    """What the bundle's record says of its training. Raises InputError if there is none."""
    record = bundle / TRAINING_FILE
    if not record.is_file():
        raise InputError(f"{bundle} holds no {TRAINING_FILE}: train it with cluster.train", code="no_such_file")
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def _head(bundle: Path, training: dict[str, Any]) -> str:
    size = sum((bundle / part / WEIGHTS_FILE).stat().st_size for part in ("tokenizer", "model"))
    shapes = {
        part: json.loads((bundle / part / CONFIG_FILE).read_text(encoding="utf-8")) for part in ("tokenizer", "model")
    }
    model, tokenizer = shapes["model"], shapes["tokenizer"]
    simulated = training["config"]["data"]["source"]["kind"] == "simulated"
    parents = sorted({stage["parent"]["folder"] for stage in training["stages"].values() if stage.get("parent")})
    told = "Trained on bars of a market." if not simulated else "Trained on simulated candles."
    licence = ""
    if parents:
        told += f" Finetuned from {', '.join(parents)}, whose licence goes on to hold."
    elif simulated:
        told = (
            "An offline default that shows the system working. **Not a trading model**: it was trained for minutes on "
            "simulated\ncandles and has never seen a market."
        )
        licence = "\n| licence | MIT, as the project; no outside data or weights went in |"
    name = BUNDLED.id if bundle.resolve() == BUNDLED_FOLDER.resolve() else bundle.resolve().name
    return f"""# {name}

{told} The tables below say how it compares with the last price.

| | |
|---|---|
| predictor | {model["n_layers"]} layers, width {model["d_model"]}, {model["n_heads"]} heads, ff {model["ff_dim"]} |
| tokenizer | {tokenizer["n_enc_layers"] - 1} + {tokenizer["n_dec_layers"] - 1} blocks, width {tokenizer["d_model"]} |
| code | {model["s1_bits"]} + {model["s2_bits"]} bits |
| context | 512 bars |
| size | {size / 1e6:.2f} MB of float32 weights, both networks |{licence}"""


def _how_made(training: dict[str, Any]) -> str:
    source = training["config"]["data"]["source"]
    rows = "\n".join(
        f"| {name} | {stage['weights']:,} | {stage['steps']:,} | {stage['bars'] / 1e6:.1f} M | "
        f"{stage['minutes']:.1f} | {stage['validation_loss']:.4f} |"
        for name, stage in training["stages"].items()
    )
    return f"""## How it was made

```bash
{training["command"]}
```

Data: {_data(source)} Seed of the run: {training["config"]["run"]["seed"]}.
{training["config"]["training"]["num_workers"]} worker(s) on {training["device"]}, torch {training["torch"]}.
{_warnings(training)}
| stage | weights | steps | bars read | minutes (wall) | validation loss |
|---|---|---|---|---|---|
{rows}"""


def _data(source: dict[str, Any]) -> str:
    """Of which bars it was made, in words. source: data.source of the configuration."""
    if source["kind"] == "simulated":
        return (
            f"{source['series']} series of {source['bars']} bars from `cluster.candles.simulate`, seed "
            f"{source['seed']}: stochastic volatility, GARCH, jumps, mean reversion and drift; bars of "
            f"{', '.join(str(m) for m in source['bar_minutes'])} minutes; sessions with and without a lunch break, "
            f"weekdays and around the clock. Validation: {source['validation_series']} series of seed "
            f"{source['validation_seed']}."
        )
    paths = [source["path"]] if isinstance(source["path"], str) else source["path"]
    names = ", ".join(f"`{Path(path).name}`" for path in paths[:5]) + (" and others" if len(paths) > 5 else "")
    if source.get("validation_from") is not None:
        parts = [("validation from", source["validation_from"]), ("test from", source.get("test_from"))]
    else:
        shares = {name: source.get(f"{name}_share") for name in ("validation", "test")}
        parts = [(f"{share:.0%} of the bar times for", name) for name, share in shares.items() if share]
    return names + "".join(f", {what} {which}" for what, which in parts if which) + "."


def _warnings(training: dict[str, Any]) -> str:
    """What the run gave up, such as a GPU that was asked for and absent."""
    return "".join(f"\n**Warning of the run:** {warning}.\n" for warning in training.get("warnings", []))


def _measured(numbers: dict[str, Any]) -> str:
    setting = numbers["setting"]
    parts = [
        f"""## Measured

{setting["history"]} bars of history, {setting["horizon"]} ahead, {setting["samples"]} paths at T = 1, top_p = 1, seed \
{setting["seed"]}; nothing repaired or
calibrated. CRPS (fair estimator) of the close in units of the history's one-bar move; the baseline is the last price
as a random walk with the history's volatility. Below 1 the ratio is in the model's favour. Where a data set has few
bars for its forecasts they overlap, and the bootstrap's intervals are then too narrow. {AIMS}"""
    ]
    for scores in numbers["sets"]:
        rows = "\n".join(
            f"| {h['horizon']} | {h['crps']:.3f} | {h['baseline']:.3f} | **{h['ratio']:.3f}** "
            f"({h['ratio_low']:.3f}–{h['ratio_high']:.3f}) | {h['coverage']:.2f} | {h['baseline_coverage']:.2f} |"
            for h in scores["horizons"]
        )
        errors = ", ".join(f"{c} {e:.3f}" for c, e in zip(COLUMNS, scores["code_error"], strict=True))
        lengths, moves = (
            " | ".join(cells)
            for cells in zip(*((str(n), f"{e:.2f}") for n, e in scores["close_errors"].items()), strict=True)
        )
        parts.append(
            f"""### {scores["name"]} ({scores["windows"]} forecasts)

| bars ahead | CRPS | random walk | ratio (90 % bootstrap) | 80 % interval covers | random walk's covers |
|---|---|---|---|---|---|
{rows}

80 % coverage over all bars ahead: **{scores["coverage"]:.2f}** (random walk {scores["baseline_coverage"]:.2f}).
Bias of the median at the last bar: {scores["bias"]:+.2f} of the random walk's std there.
Invalid candles (high or low not outermost) among the sampled ones: **{scores["invalid"]:.1%}**.
Tokenizer round trip, rms error in units of the window's std: {errors}.
Time: {scores["seconds"] / scores["windows"]:.1f} s a forecast.

The same error of the close in units of a typical one-bar move, by length of history (median over windows):

| bars | {lengths} |
|---|{"---|" * len(scores["close_errors"])}
| error | {moves} |"""
        )
    return "\n\n".join(parts)


def _limits(training: dict[str, Any], numbers: dict[str, Any]) -> str:
    stages = [stage for name in training["stages"] if (stage := training["config"].get(name)) is not None]
    longest = max(phase["window"] for stage in stages for phase in stage["phases"])
    faults = []
    for scores in numbers["sets"]:
        faults += [
            f"- {scores['name']}: CRPS {h['horizon']} bars ahead is {h['ratio']:.3f} of the random walk's, over "
            "the aim of 1.10."
            for h in scores["horizons"]
            if h["ratio"] > 1.10
        ]
        if not 0.65 <= scores["coverage"] <= 0.92:
            faults.append(f"- {scores['name']}: coverage {scores['coverage']:.2f} is outside 0.65–0.92.")
    missed = "\n".join(faults) if faults else "- None of the aims above is missed."
    return f"""## What falls short

{missed}
- The random walk is a low bar and this is at best near it: there is no claim of skill in any market.
- Bars are coded in units of the window's std: the longer the history, the coarser the code is beside one bar's move.
  The tokenizer was trained on windows of up to {longest} bars; longer histories are coded badly (last table): give it
  the last {longest} bars at most.
- High and low are sampled like the other columns, so that a candle can be invalid; the share is above.

Measure it again: `python -m cluster.evaluate --bundle FOLDER --candles FILE --card FOLDER/README.md`"""
