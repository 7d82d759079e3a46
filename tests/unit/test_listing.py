"""What the ingress remembers of what Ray tells its routers."""

import pytest

from serve_app import listing


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(listing, "REPLICAS", {})
    monkeypatch.setattr(listing, "LOAD_FAILURES", {})


def replica(*, stats=None, **states):
    models = {alias: {"state": state, "error": f"{alias} is broken"} for alias, state in states.items()}
    return {"node": "n", "metadata": {"models": models} if stats is None else {"models": {}}, "stats": stats or {}}


def test_a_failure_to_load_outlives_the_replica_that_told_it():
    listing.publish("cpu", {"1": replica(a="failed", b="loaded")})
    assert listing.LOAD_FAILURES == {"a": "a is broken"}
    listing.publish("cpu", {})
    assert (listing.REPLICAS, listing.LOAD_FAILURES) == ({"cpu": {}}, {"a": "a is broken"})


def test_until_a_replica_has_loaded_the_model():
    listing.publish("cpu", {"1": replica(a="failed")})
    listing.publish("cpu", {"2": replica(a="loading")})
    assert listing.LOAD_FAILURES
    listing.publish("cpu", {"2": replica(stats={"models": {"a": {"state": "loaded"}}})})
    assert listing.LOAD_FAILURES == {}
    listing.publish("cpu", {"1": replica(a="loaded"), "2": replica(a="failed")})
    assert listing.LOAD_FAILURES == {}


def test_a_replica_that_is_not_ready_has_told_nothing():
    listing.publish("cpu", {"1": {"node": "n", "metadata": None, "stats": None}})
    assert listing.LOAD_FAILURES == {}
