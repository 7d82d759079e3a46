"""README, block by block, as a new user would run it: `make serve`, then every command against that server."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
URL = "http://127.0.0.1:8000"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
STARTS_THE_SERVER = "make serve"
RUNS_THIS_TEST = "make test"


@pytest.fixture(scope="module")
def server(wait, tmp_path_factory):
    """`make serve` as README says, until the end of this module."""
    with contextlib.suppress(httpx.TransportError):
        httpx.get(URL)
        pytest.fail("something answers on port 8000 already: README's commands would talk to it")
    path = tmp_path_factory.mktemp("readme") / "log"
    with path.open("w") as log:
        process = subprocess.Popen(
            STARTS_THE_SERVER.split(),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def ready():
        assert process.poll() is None, path.read_text()[-3000:]
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{URL}/v1/readyz").status_code == 200

    try:
        wait(ready, 120, 0.5)
        yield process
    finally:
        # As Ctrl-C does: to every process of the terminal's foreground group.
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)


def blocks(language):
    return [text for kind, text in BLOCKS if kind == language]


def output_after(text):
    """The output block that README shows right after a command block."""
    i = next(i for i, (_, block) in enumerate(BLOCKS) if block == text)
    return BLOCKS[i + 1][1] if i + 1 < len(BLOCKS) and BLOCKS[i + 1][0] in ("json", "text") else None


def numbers_of(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def test_nothing_in_readme_is_left_untested():
    """Blocks are commands, Python, or the output of the block before; a new kind would slip through the tests below."""
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "json", "text"}
    assert blocks("bash")[0].strip() == STARTS_THE_SERVER
    assert RUNS_THIS_TEST in [block.strip() for block in blocks("bash")]


@pytest.mark.parametrize("command", [b for b in blocks("bash") if b.strip() not in (STARTS_THE_SERVER, RUNS_THIS_TEST)])
def test_command(server, command):
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert '"error"' not in result.stdout
    shown = output_after(command)
    if shown is not None:
        # Kernels of another processor round differently, which can turn a token; the shape and the start cannot change.
        assert result.stdout[:60] == shown[:60]
        assert len(numbers_of(result.stdout)) == len(numbers_of(shown)) or len(result.stdout) >= 900


def test_python_blocks_in_order(server, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for block in blocks("python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "README.md", "exec"), names)
        shown = output_after(block)
        assert re.sub(r"[\d.]+", "#", printed.getvalue()) == re.sub(r"[\d.]+", "#", shown)


def test_the_same_request_gives_the_same_numbers(server):
    request = json.loads((ROOT / "examples" / "request.json").read_text())
    first, second = (httpx.post(f"{URL}/v1/forecast", json=request, timeout=60).json() for _ in range(2))
    assert first["series"] == second["series"]
    assert first["device"] == "cpu" or first["device"].startswith(("cuda", "mps"))
