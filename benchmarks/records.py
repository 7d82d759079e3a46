"""What the service's benchmarks have in common: the table they print and the file they write."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.device import device_info, resolve_device

RESULTS = Path(__file__).parent / "results"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; the columns are the keys in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(key, "")) for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" if i != 1 else f"|-{line}-|" for i, line in enumerate(lines))


def write(name: str, rows: Sequence[Mapping[str, Any]], **facts: Any) -> Path:
    """benchmarks/results/DATE-NAME.json with the rows, the device and the command that made them."""
    device, _ = resolve_device("auto")
    script = Path(sys.argv[0]).name
    result = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", f"benchmarks/{script}", *(_without_paths(sys.argv[1:]))]),
        "device": device_info(device).summary(),
        "python": platform.python_version(),
        **facts,
        "cases": list(rows),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{result['date']}-{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _without_paths(arguments: Sequence[str]) -> list[str]:
    return ["PATH" if "/" in argument else argument for argument in arguments]
