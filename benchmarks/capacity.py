"""Works out the tables of docs/capacity.md from the newest results of benchmarks/batch.py, between the markers there.

    python benchmarks/capacity.py [--cores 16] [--print]

Hours = (start + symbols / (symbols a second of one actor × actors × efficiency)) / 3600, with one actor a core; the
efficiency is what two actors reached of twice one. Nothing in the tables is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "capacity.md"
BEGIN, END = "<!-- capacity: made by benchmarks/capacity.py -->", "<!-- end of capacity -->"
SYMBOLS = (10_000, 1_000_000)
NODES = (1, 4, 16, 64)


def newest_results(folder: Path) -> list[dict[str, Any]]:
    """The last batch result of every shape."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*-batch-*-cpu.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["cases"]:
            found[row["shape"]] = {**row, "date": result["date"], "device": result["device"], "from": path.name}
    return list(found.values())


def hours(row: dict[str, Any], symbols: int, actors: int) -> float:
    """Of a whole run on that many actors."""
    efficiency = min(1.0, row["2 actors / 1 actor"] / 2)
    return (row["start s"] + symbols / (row["1 actor symbols/s"] * actors * efficiency)) / 3600


def section(row: dict[str, Any], cores: int) -> list[str]:
    machine = row["device"].split(",")[0].removeprefix("cpu (")
    efficiency = min(1.0, row["2 actors / 1 actor"] / 2)
    lines = [
        f"### Kronos-{row['case']} paths",
        "",
        f"Measured on {row['date']} ({machine}, {row['from']}): one actor of one core {row['1 actor symbols/s']:g} "
        f"symbols/s, {row['1 actor / engine']:.0%} of the engine alone ({row['engine symbols/s']:g}); two actors "
        f"{row['2 actors symbols/s']:g} symbols/s, {row['2 actors / 1 actor']:g} times one (efficiency "
        f"{efficiency:.0%}); start {row['start s']:g} s; input {row['input bytes a symbol'] / 1000:.0f} kB and output "
        f"{row['output bytes a symbol'] / 1000:.0f} kB a symbol.",
        "",
        f"| nodes of {cores} cores | " + " | ".join(f"{count:,} symbols" for count in SYMBOLS) + " |",
        "|---" * (1 + len(SYMBOLS)) + "|",
    ]
    for nodes in NODES:
        cells = [duration(hours(row, count, nodes * cores)) for count in SYMBOLS]
        lines.append(f"| {nodes} | {' | '.join(cells)} |")
    cores_hours = [count / (row["1 actor symbols/s"] * efficiency) / 3600 for count in SYMBOLS]
    disk = [count * (row["input bytes a symbol"] + row["output bytes a symbol"]) / 1e9 for count in SYMBOLS]
    lines.append("| core hours | " + " | ".join(f"{value:,.0f}" for value in cores_hours) + " |")
    lines.append("| input and output | " + " | ".join(f"{value:,.1f} GB" for value in disk) + " |")
    return lines


def duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=16, help="of a node; an actor takes one")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--print", action="store_true", help="only print the tables")
    options = parser.parse_args()
    rows = newest_results(options.results)
    if not rows:
        print(f"no *-batch-*-cpu.json in {options.results}: run benchmarks/batch.py first, without --quick")
        return 2
    text = "\n\n".join("\n".join(section(row, options.cores)) for row in rows)
    if options.print:
        print(text)
        return 0
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
