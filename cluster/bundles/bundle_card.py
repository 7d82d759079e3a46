"""The card of a bundle (README.md): what it is, what it was made from, what was measured, who promoted it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE

AGAINST = {
    "parent": "the model it was finetuned from",
    "last_price": "last price",
    "drift": "drift",
    "historical_volatility": "historical volatility",
    "seasonal_naive": "seasonal naive",
}


def bundle_card(name: str, folder: Path, training: dict[str, Any], report: dict[str, Any] | None) -> str:
    """folder: with the networks in it. training: training.json as export writes it. report: cluster.evaluate's."""
    sections = [_head(name, folder, training), _how_made(training), _measured(report), _check()]
    return "\n\n".join(sections) + "\n"


def _head(name: str, folder: Path, training: dict[str, Any]) -> str:
    tokenizer, model = (
        json.loads((folder / part / CONFIG_FILE).read_text(encoding="utf-8")) for part in ("tokenizer", "model")
    )
    size = sum((folder / part / WEIGHTS_FILE).stat().st_size for part in ("tokenizer", "model"))
    parent = training["parent"]
    lineage = "trained from scratch"
    if parent is not None:
        lineage = f"finetuned from {parent['name']}, sha256 {_code(parent['sha256'])}"
    return f"""# {name}

| | |
|---|---|
| weights | {size / 1e6:.2f} MB, sha256 {_code(training["sha256"])} |
| predictor | {model["n_layers"]} layers, width {model["d_model"]}, {model["n_heads"]} heads |
| tokenizer | {tokenizer["s1_bits"]} + {tokenizer["s2_bits"]} bits, width {tokenizer["d_model"]} |
| lineage | {lineage} |"""


def _code(sha256: str | None) -> str:
    return f"`{sha256}`" if sha256 else "not known (the weights are gone)"


def _how_made(training: dict[str, Any]) -> str:
    rows = []
    for stage, made in training.get("stages", {}).items():
        loss = made.get("validation_loss")
        numbers = [made.get("method", "full"), made.get("steps", "-"), made.get("minutes", "-")]
        rows.append("| " + " | ".join([stage, *map(str, numbers), "-" if loss is None else f"{loss:.4f}"]) + " |")
    data = training["data"]
    source = ((training.get("config") or {}).get("data") or {}).get("source") or {}
    told = f"Data ({source.get('kind', 'unknown')}): sha256 {_code(data and data.get('sha256'))}"
    if data and data.get("validation_from"):
        told += f"; trained on bars before {data['validation_from']}"
        chosen = ", the checkpoint was chosen on those after, none was kept for a test"
        told += f", nothing from {data['test_from']} on was touched" if data.get("test_from") else chosen
    warnings = "".join(f"\n- warning: {text}" for text in training.get("warnings", []))
    return f"""## How it was made

```bash
{training.get("command", "not recorded")}
```

{told}. Device: {training.get("device", "not recorded")}.{warnings}

| stage | method | steps | minutes | validation loss |
|---|---|---|---|---|
{chr(10).join(rows)}"""


def _measured(report: dict[str, Any] | None) -> str:
    if report is None:
        return "## Measured\n\nNot evaluated: nothing is known of its skill. `python -m cluster.evaluate` measures it."
    period = report.get("period", {})
    rows = [
        f"| {AGAINST.get(c['against'], c['against'])} | {c['metric']} | {_number(c.get('ratio'))} "
        f"({_number(c.get('low'))}–{_number(c.get('high'))}) | {_number(c.get('p_value'))} | {c['verdict']} |"
        for c in report.get("comparisons", [])
    ]
    shown = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in period.items() if value is not None)
    warnings = "".join(f"\n- warning: {text}" for text in report.get("warnings", []))
    return f"""## Measured

{report.get("verdict_line") or "verdict: " + str(report.get("verdict"))}

Period: {shown or "not recorded"}. Below 1 a ratio is in the model's favour.{warnings}

| against | metric | ratio (interval) | p | verdict |
|---|---|---|---|---|
{chr(10).join(rows)}"""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _check() -> str:
    return """## Check it

`sha256sum -c SHA256SUMS` in this folder; the server does it before it serves these weights."""


def promotion_section(when: str, verdict: str, reason: str | None) -> str:
    """What promote adds. reason: of whoever forced it."""
    if reason is None:
        return f"\n## Promoted\n\n{when}: it {verdict} its parent and the baselines on held-out data.\n"
    refused = f"{when}: it was refused ({verdict}). The reason given for it all the same:"
    return f"\n## Promoted by force\n\n{refused}\n\n> {reason}\n"
