"""What the ingress remembers of what Ray tells its routers."""

import pytest

from serve_app import listing


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(listing, "REPLICAS", {})
    monkeypatch.setattr(listing, "_LAST_WORDS", {})


def replica(*, stats=None, **states):
    models = {alias: {"state": state, "error": f"{alias} is broken"} for alias, state in states.items()}
    return {"node": "n", "metadata": {"models": models} if stats is None else {"models": {}}, "stats": stats or {}}


def failures():
    return {alias: failure.message for alias, failure in listing.load_failures().items()}


def test_a_failure_to_load_outlives_the_replica_that_told_it():
    listing.publish("cpu", {"1": replica(a="failed", b="loaded")})
    assert failures() == {"a": "a is broken"}
    listing.publish("cpu", {})
    assert (listing.REPLICAS, failures()) == ({"cpu": {}}, {"a": "a is broken"})


def test_until_a_replica_has_loaded_the_model():
    listing.publish("cpu", {"1": replica(a="failed")})
    listing.publish("cpu", {"2": replica(a="loading")})
    assert failures()
    listing.publish("cpu", {"2": replica(stats={"models": {"a": {"state": "loaded"}}})})
    assert failures() == {}
    listing.publish("cpu", {"1": replica(a="loaded"), "2": replica(a="failed")})
    assert failures() == {}


def test_a_replica_that_is_not_ready_has_told_nothing():
    listing.publish("cpu", {"1": {"node": "n", "metadata": None, "stats": None}})
    assert failures() == {}


def test_one_group_that_has_it_is_enough():
    for order in (("cpu", "gpu"), ("gpu", "cpu")):
        for group in order:
            listing.publish(group, {"1": replica(a="loaded" if group == "cpu" else "failed")})
        assert failures() == {}
    listing.publish("cpu", {"1": replica(a="failed")})
    assert failures() == {"a": "a is broken"}
    listing.forget_load_failures()
    assert failures() == {}


def test_a_failure_is_as_old_as_the_last_that_was_heard_of_it():
    listing.publish("cpu", {"1": replica(a="failed")})
    first = listing.load_failures()["a"].at
    listing.publish("cpu", {"1": replica(a="failed")})
    last = listing.load_failures()["a"].at
    listing.publish("cpu", {})
    assert first < last == listing.load_failures()["a"].at
