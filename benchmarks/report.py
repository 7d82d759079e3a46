"""Writes the newest engine results into README, between the speed markers.

python benchmarks/report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- speed: made by benchmarks/report.py -->", "<!-- end of speed -->"


def table(result: dict[str, Any]) -> str:
    """Markdown: one row per case, one column per precision."""
    cases = [row for row in result["cases"] if "public_s" in row]
    precisions = [key.removesuffix("_s") for key in cases[0] if key.endswith("_s") and key != "public_s"]
    head = ["model, history/horizon, series × samples, window", "public, s", *(f"{p}, s (ratio)" for p in precisions)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in cases:
        cells = [row["case"], f"{row['public_s']:.1f}" if row["public_s"] is not None else "–"]
        for precision in precisions:
            ratio = row.get(f"{precision}_ratio")
            shown = "" if ratio is None else f" ({ratio:.{0 if ratio >= 10 else 1}f}×)"
            cells.append(f"{row[f'{precision}_s']:.2f}{shown}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    newest = sorted((ROOT / "benchmarks" / "results").glob("*-engine-*.json"))[-1]
    result = json.loads(newest.read_text())
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    machine = result["device"].split(",")[0].removeprefix("cpu (")
    if "cpu" in result:
        machine += f" ({result['cpu']})"
    text = (
        f"{BEGIN}\nSeconds per whole forecast, random weights in the published shapes, {result['threads']} threads of "
        f"an {machine}, {result['date']}; ratio = time of the public implementation / ours, in the same run.\n\n"
        f"{table(result)}\n\n`{result['command']}`\n{END}"
    )
    readme.write_text(before + text + after, encoding="utf-8")


if __name__ == "__main__":
    main()
