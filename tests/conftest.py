"""Options and the few fixtures that every kind of test shares."""

import os
from pathlib import Path

# The tests' networks are tiny, and Ray's workers share the machine: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Ray is imported: with its token it would write into the home directory. The processes of a test inherit it.
os.environ["RAY_AUTH_MODE"] = "disabled"

import numpy as np
import pandas as pd
import pytest

from model import Kronos, KronosPredictor, KronosTokenizer
from model.frames import series_from_frame
from model.types import COLUMNS

SHARED = Path(__file__).parents[2] / "shared"


def pytest_addoption(parser):
    parser.addoption("--reference", help="checkout of the public implementation to compare with")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n 2`: a file's tests stay together, and all that start Ray run one after another.

    Two Ray clusters at once would compete for the processors, and README's commands for port 8000. These come first and
    take longest. (xdist's own loadgroup does not group under this pytest: it writes a field that items no longer have.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            return "ray" if path.startswith(("tests/distributed/", "tests/serving/")) else path

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter):
    """The figures travel with the reports of their tests, which also come from other processes."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    called = [report for report in reports if getattr(report, "when", None) == "call"]
    figures = [tuple(value) for report in called for name, value in report.user_properties if name == "figure"]
    if figures:
        terminalreporter.section("figures of the verified claims")
        for claim, figure, bound in sorted(figures):
            terminalreporter.write_line(f"{claim:<5} {figure}" + (f"   [{bound}]" if bound else ""))


@pytest.fixture
def figure(request):
    """figure("largest weight difference 0.0", "must be 0"): a line of the table that `make verify` ends with."""
    claim = request.node.get_closest_marker("verify").args[0]
    return lambda text, bound="": request.node.user_properties.append(("figure", (claim, text, bound)))


@pytest.fixture(scope="session")
def reference(request):
    path = request.config.getoption("--reference")
    if path is None:
        pytest.skip("needs --reference CHECKOUT of the public implementation")
    return Path(path).resolve()


def shared_path(relative):
    """A file of the workplace's shared folder; the test is skipped where it is absent, as on a user's machine."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"shared/{relative} is not on this machine")
    return path


@pytest.fixture(scope="session")
def candles_csv():
    return shared_path("data/candles_5min.csv")


@pytest.fixture(scope="session")
def golden():
    """The folder of known answers; see its README."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory, golden):
    """The golden networks as a bundle: random weights, 6 + 6 bits. To be read only."""
    folder = tmp_path_factory.mktemp("bundle")
    for part in ("model", "tokenizer"):
        (folder / part).symlink_to(golden / part)
    return folder


@pytest.fixture(scope="session")
def bars(golden):
    """1,700 real five-minute candles: the six columns and `timestamps`."""
    stored = np.load(golden / "candles.npz")
    frame = pd.DataFrame(stored["candles"], columns=list(COLUMNS))
    return frame.assign(timestamps=pd.to_datetime(stored["timestamps"], unit="s"))


@pytest.fixture(scope="session")
def series_of(bars):
    """(first bar, bars of history, horizon) → a series of those candles."""

    def make(start, length, horizon):
        end = start + length
        times = bars.timestamps
        return series_from_frame(bars[start:end], times[start:end], times[end : end + horizon])

    return make


@pytest.fixture(scope="session")
def tiny(golden):
    """The golden pair of networks: (model, tokenizer), random weights, 6 + 6 bits."""
    return Kronos.from_pretrained(golden / "model"), KronosTokenizer.from_pretrained(golden / "tokenizer")


@pytest.fixture(scope="session")
def predictor(tiny):
    return KronosPredictor(*tiny, device="cpu")
