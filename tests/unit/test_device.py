"""Device resolution: what is asked, what is there, what is used, and that the difference is said."""

import inspect
import logging

import pytest
import torch

import model.device as device_module
from model import KronosPredictor, resolve_device
from model.device import check_mps_compatibility, device_info, main, precision_policy, resolve_precision


@pytest.fixture
def machine(monkeypatch):
    """Pretends that the machine has some CUDA devices, and MPS or not."""

    def pretend(cuda=0, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.delenv("KRONOS_DEVICE", raising=False)
        device_module._log_once.cache_clear()

    return pretend


@pytest.mark.parametrize(
    ("requested", "cuda", "mps", "used", "warns"),
    [
        ("auto", 0, False, "cpu", False),
        ("auto", 2, True, "cuda:0", False),
        ("auto", 0, True, "mps", False),
        (None, 0, False, "cpu", False),
        ("cpu", 2, True, "cpu", False),
        ("cuda", 2, False, "cuda:0", False),
        ("cuda:1", 2, False, "cuda:1", False),
        ("cuda:7", 2, False, "cuda:0", True),
        ("cuda:0", 0, False, "cpu", True),
        ("cuda", 0, True, "cpu", True),
        ("mps", 0, True, "mps", False),
        ("mps", 2, False, "cpu", True),
        (" CUDA:1 ", 2, False, "cuda:1", False),
        (torch.device("cuda", 5), 1, False, "cuda:0", True),
        (torch.device("cpu"), 1, False, "cpu", False),
    ],
)
def test_resolution(machine, requested, cuda, mps, used, warns):
    machine(cuda, mps)
    device, warning = resolve_device(requested)
    assert device == torch.device(used)
    assert (warning is not None) == warns
    if warns:
        assert str(requested).strip().lower() in warning
        assert used in warning


@pytest.mark.parametrize(
    "nonsense", ["gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:1", "tpu", "cuda:0:1", "", 0, True, 1.5]
)
def test_nonsense_lists_what_is_accepted(machine, nonsense):
    machine(cuda=1)
    with pytest.raises(ValueError, match=r"accepted: auto, cpu, cuda, cuda:N .*, mps"):
        resolve_device(nonsense)


def test_none_reads_the_environment(machine, monkeypatch):
    machine(cuda=2)
    monkeypatch.setenv("KRONOS_DEVICE", "cuda:1")
    assert resolve_device(None)[0] == torch.device("cuda:1")
    assert resolve_device("cpu")[0] == torch.device("cpu")
    monkeypatch.setenv("KRONOS_DEVICE", " ")
    assert resolve_device(None)[0] == torch.device("cuda:0")
    monkeypatch.setenv("KRONOS_DEVICE", "quantum")
    with pytest.raises(ValueError, match="quantum"):
        resolve_device(None)


def test_fallback_is_logged_once(machine, caplog):
    machine(cuda=0)
    with caplog.at_level(logging.WARNING, logger="model.device"):
        warnings = {resolve_device("cuda:0")[1] for _ in range(3)}
    assert len(warnings) == 1
    assert [record.message for record in caplog.records] == list(warnings)


def test_broken_cuda_counts_as_absent(machine, monkeypatch):
    machine(cuda=0)

    def broken():
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert resolve_device("auto")[0] == torch.device("cpu")


def test_no_cuda_call_on_a_machine_without_cuda(monkeypatch, tiny, bars):
    """Every function of torch.cuda raises, and a forecast runs all the same: device chosen, described and used."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")

    def forbidden(*args, **kwargs):
        raise AssertionError("torch.cuda was called")

    for name, member in inspect.getmembers(torch.cuda, callable):
        # is_available is how one asks; its answer is the machine's.
        if name != "is_available" and not inspect.isclass(member) and not name.startswith("__"):
            monkeypatch.setattr(torch.cuda, name, forbidden)
    predictor = KronosPredictor(*tiny, device="cuda:0")
    assert predictor.device_warning is not None
    assert device_info(predictor.device).device_type == "cpu"
    times = bars.timestamps
    forecast = predictor.forecast(bars[:40], times[:40], times[40:44], sample_count=2)
    assert forecast.paths.shape == (2, 4, 6)
    assert forecast.device_warning == predictor.device_warning


def test_device_info_of_the_cpu():
    info = device_info(torch.device("cpu"))
    assert (info.device_type, info.precision) == ("cpu", "fp32")
    assert info.memory_total_bytes > 2**28
    assert info.device_name in info.summary()
    assert info.precision_reason in info.summary()
    assert info.gpu_available == (info.cuda_available or info.mps_available)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_mps_check_says_why_not():
    usable, reason = check_mps_compatibility()
    assert not usable
    assert "MPS" in reason


def test_command_line(machine, capsys):
    machine()
    assert main(["cuda:3"]) == 0
    assert "warning: device 'cuda:3'" in capsys.readouterr().out
    assert main(["nonsense"]) == 2
    assert "accepted" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_precision_that_the_device_lacks_falls_back_and_says_so(monkeypatch, device):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    precision, reason, warning = resolve_precision("bf16", torch.device(device))
    assert precision == "fp32"
    assert reason == precision_policy(torch.device(device))[1]
    assert "'bf16' was requested" in warning
    assert "using 'fp32'" in warning


def test_precisions_that_every_cpu_has():
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == (*precision_policy(cpu), None)
    assert resolve_precision("int8", cpu) == ("int8", "as requested", None)
    assert resolve_precision("int8", torch.device("mps"))[0] == "fp32"
    with pytest.raises(ValueError, match="must be auto, fp32, bf16, int8, not 'fp8'"):
        resolve_precision("fp8", cpu)
