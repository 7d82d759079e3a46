"""Short forms of benchmarks/chaos.py: what breaks under load, and what clients see of it."""

import pytest

from benchmarks import chaos
from benchmarks.service import Service, bundled_config

RATE = 3.0


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def context():
    with Service(bundled_config(2, ingress={"num_cpus": 0.1, "replicas": 2})) as service:
        yield chaos.Context(service, RATE, quick=True)


def shown(rows):
    assert rows
    for row in rows:
        assert row["shown"] == "yes", row


def test_bad_inputs_leave_their_neighbours_alone(context):
    shown(chaos.poison(context))


def test_clients_that_leave_stop_the_computing(context):
    shown(chaos.cancel(context))


def test_generated_requests_never_make_a_5xx(context):
    shown(chaos.fuzz(context))


@pytest.mark.parametrize("name", ["kill-replica", "kill-controller", "update"])
def test_nobody_notices(context, name):
    shown(chaos.CASES[name](context))


@pytest.mark.parametrize("name", ["kill-ingress", "kill-proxy"])
def test_a_retry_is_enough(context, name):
    """How long it takes is measured in benchmarks/chaos.py: here time decides nothing."""
    _, with_retry = chaos.CASES[name](context)
    shown([with_retry])
