"""The pages of the service and its description: they work without any other server, and say what is true."""

import base64
import hashlib
import json
import re

import pytest

from serve_app import schemas
from serve_app.openapi import EXAMPLES


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_loads_nothing_and_runs_only_what_is_in_it(http, path):
    response = http.get(path, headers={"accept": "text/html,*/*;q=0.8"})
    assert response.headers["content-type"].startswith("text/html")
    text = response.text
    assert not re.search(r"https?:|//\w|<link|<img|<iframe|@import| src=| style=| on\w+=", text)
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    # Text of others reaches the page as text.
    assert "innerHTML" not in text


@pytest.fixture
def document(http):
    return http.get("/openapi.json").json()


def test_every_reference_leads_somewhere(document):
    names = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert names <= set(document["components"]["schemas"])
    assert {"ForecastRequest", "ForecastAnswer", "ForecastBars", "ErrorBody"} <= names | set(
        document["components"]["schemas"]
    )


def test_a_forecast_is_described_in_all_its_formats(document):
    operation = document["paths"]["/v1/forecast"]["post"]
    arrow = "application/vnd.apache.arrow.stream"
    assert set(operation["requestBody"]["content"]) == {"application/json", arrow}
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream", arrow}
    assert {name["name"] for name in operation["parameters"]} == {"X-Kronos-Device", "X-Request-ID"}
    for status in (400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 500, 503):
        schema = operation["responses"][str(status)]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorBody"}


def test_keys_are_described(document):
    assert set(document["components"]["securitySchemes"]) == {"bearer", "apiKey"}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert ("security" in operation) == (path not in ("/v1/healthz", "/v1/readyz")), path


ROUTES = {
    schemas.PredictRequest: "/v1/predict/single",
    schemas.PredictBatchRequest: "/v1/predict/batch",
    schemas.ForecastRequest: "/v1/forecast",
}


@pytest.mark.parametrize("schema", ROUTES)
def test_the_examples_are_accepted_as_they_stand(http, document, schema):
    content = document["paths"][ROUTES[schema]]["post"]["requestBody"]["content"]["application/json"]
    assert content["examples"]["small"]["value"] == EXAMPLES[schema]
    response = http.post(ROUTES[schema], EXAMPLES[schema])
    assert response.status_code == 200, response.text


def test_events_have_the_fields_that_are_described(http, columns):
    body = {"series": [columns()], "horizon": 1, "stream": True}
    data = http.post("/v1/forecast", body).text.split("\n")[1].removeprefix("data: ")
    assert set(json.loads(data)) == set(schemas.ForecastBars.model_fields)
