"""--trace-ratio and --trace-exporter: what reaches Ray, and that its tracing works with the pinned packages."""

import inspect

import pytest
import ray
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from ray.serve._private import api, constants, tracing_utils
from ray.serve._private.common import ServeComponentType
from ray.serve.schema import TracingConfig

from serve_app import run

CONFIG = {"applications": [{"name": "a", "import_path": "serve_app.app:build_app"}]}
EXPORTER = f"{__name__}:processors"
spans = InMemorySpanExporter()


def processors():
    """As docs/operations.md describes an exporter."""
    return [SimpleSpanProcessor(spans)]


@pytest.fixture
def started(monkeypatch):
    """What serve_app.run gives to Serve, with its arguments held against what Serve takes."""
    given = {}
    signature = inspect.signature(api.serve_start)

    class Client:
        def deploy_apps(self, schema, _blocking):
            pass

    def serve_start(**options):
        given.update(signature.bind(**options).arguments)
        return Client()

    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(api, "serve_start", serve_start)
    return given


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["--trace-ratio", "0.1"], TracingConfig(enabled=True, sampling_ratio=0.1, exporter_import_path="")),
        (
            ["--trace-ratio", "1", "--trace-exporter", EXPORTER],
            TracingConfig(enabled=True, sampling_ratio=1.0, exporter_import_path=EXPORTER),
        ),
    ],
    ids=["off", "a tenth, to files", "all, to one's own"],
)
def test_what_reaches_serve(started, arguments, expected):
    run.start(CONFIG, run._parse(arguments))
    assert started["global_tracing_config"] == expected


def test_what_reaches_proxies():
    """In Ray 2.60 they do not hear of what Serve is started with."""
    names = ("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", "RAY_SERVE_TRACING_SAMPLING_RATIO")

    def given(*arguments):
        environment = run._environment(run._parse(arguments))
        return tuple(environment.get(name) for name in names)

    assert given() == (None, None)
    assert given("--trace-ratio", "0.1") == (constants.DEFAULT_TRACING_EXPORTER_IMPORT_PATH, "0.1")
    assert given("--trace-ratio", "1", "--trace-exporter", EXPORTER) == (EXPORTER, "1.0")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trace-ratio", "2"], "must lie between 0 and 1"),
        (["--trace-ratio", "1", "--trace-exporter", "no_such_module:f"], "cannot be imported here"),
        (["--trace-exporter", EXPORTER], "nothing would be traced"),
    ],
)
def test_what_would_trace_nothing_is_refused_at_once(arguments, words, capsys):
    with pytest.raises(SystemExit):
        run._parse(arguments)
    assert words in capsys.readouterr().err


def test_spans_of_a_request_reach_the_exporter(monkeypatch):
    """The part that Ray plays in every process: an ImportError or a renamed class of OpenTelemetry shows here."""
    monkeypatch.setattr(tracing_utils, "_tracing_enabled", False)
    monkeypatch.setattr(tracing_utils, "_tracer", None)
    config = TracingConfig(enabled=True, sampling_ratio=1.0, exporter_import_path=EXPORTER)
    assert tracing_utils.setup_tracing("ingress", "1", ServeComponentType.REPLICA, config)
    context = tracing_utils.extract_propagated_context({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})
    with tracing_utils.TraceContextManager("proxy_http_request", trace_context=context):
        tracing_utils.set_http_span_attributes(method="POST", status_code="200", route="/v1/forecast")
    (span,) = spans.get_finished_spans()
    assert (span.name, span.attributes["http.route"]) == ("proxy_http_request", "/v1/forecast")
    assert f"{span.context.trace_id:032x}" == "a" * 32
