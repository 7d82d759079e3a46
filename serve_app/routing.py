"""The backend of the ingress on Ray: which group answers, what happens when a replica is lost, who is alive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster.plan import Plan
from serve_app.errors import FieldError, ServiceError, invalid_fields
from serve_app.jobs import Answered, DeviceFacts, Done, Failed, Job, ReplicaView
from serve_app.listing import REPLICAS
from serve_app.logs import log

POLL_S = 0.1
LOST = (RayActorError, DeploymentUnavailableError)
"""Raised when the replica that had the job is gone. A forecast can be asked for again: its seed is in the job."""


def deployment_name(group: str) -> str:
    return f"kronos_{group}"


class ReplicaLostError(Exception):
    """No replica of the group is left to finish the job."""


class RayBackend:
    """Sends jobs to the replica groups."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle],
        plan: Plan,
        replica_wait_s: float,
    ) -> None:
        """handles: one per planned group. replica_wait_s: how long to wait where no group has a replica."""
        # Naming a method starts the handle's router, and with it the listing.
        self._handles = {name: handle.options(method_name="forecast") for name, handle in handles.items()}
        self._plan = plan
        self._replica_wait_s = replica_wait_s
        self.on_retry: Callable[[], None] = lambda: None
        """Called when a job is sent again."""
        self.device_warning = plan.device_warning

    def groups(self) -> Sequence[str]:
        return [group.name for group in self._plan.groups]

    def replicas(self) -> Sequence[ReplicaView]:
        return [
            _view(replica_id, entry)
            for group in self.groups()
            for replica_id, entry in REPLICAS.get(deployment_name(group), {}).items()
            # A replica that is not ready has no metadata yet.
            if entry["metadata"]
        ]

    async def forecast(self, job: Job, prefer: str | None) -> Answered:
        """Computes the job on the preferred group, or another one, and says so. Raises ServiceError."""
        started = time.monotonic()
        for attempt in (1, 2):
            group, warnings = await self._choose(prefer)
            left = job.timeout_s - (time.monotonic() - started)
            try:
                result = await self._send(group, Job(job.request_id, job.model, job.tasks, left))
            except (*LOST, ReplicaLostError) as error:
                log(logging.WARNING, "replica lost", request_id=job.request_id, group=group, error=type(error).__name__)
                if attempt == 2:
                    raise ServiceError("no_replica", "the replicas that computed this were lost; try again") from None
                self.on_retry()
                continue
            except BackPressureError:
                raise ServiceError("queue_full", "all replicas are full") from None
            return Answered(_done(result), group, warnings)
        raise AssertionError("unreachable: the second attempt returns or raises")

    async def _choose(self, prefer: str | None) -> tuple[str, tuple[str, ...]]:
        """The group to use and what to say about it; waits a bounded time while no group has a replica."""
        planned = self.groups()
        order = sorted(planned, key=lambda name: name != prefer)
        wait_until = time.monotonic() + self._replica_wait_s
        while True:
            alive = [name for name in order if REPLICAS.get(deployment_name(name))]
            if alive:
                return alive[0], _group_warnings(prefer, planned, alive[0])
            if time.monotonic() >= wait_until:
                raise ServiceError("no_replica", "no replica is running now; it may be starting")
            await asyncio.sleep(POLL_S)

    async def _send(self, group: str, job: Job) -> Done | Failed:
        """One try. Raises one of LOST, or ReplicaLostError if the group stays without replicas while the job waits."""
        response = self._handles[group].remote(job)
        task = asyncio.ensure_future(_result(response))
        empty_since: float | None = None
        try:
            while True:
                # The handle itself would wait for a replica for ever.
                done, _ = await asyncio.wait({task}, timeout=POLL_S if empty_since else 1.0)
                if done:
                    return task.result()
                if REPLICAS.get(deployment_name(group)):
                    empty_since = None
                    continue
                empty_since = empty_since or time.monotonic()
                if time.monotonic() - empty_since > self._replica_wait_s:
                    raise ReplicaLostError(group)
        finally:
            if not task.done():
                # The deadline passed or the client is gone: the replica hears of it and stops within one step.
                response.cancel()
                task.cancel()


async def _result(response: Any) -> Done | Failed:
    result: Done | Failed = await response
    return result


def _done(result: Done | Failed) -> Done:
    if isinstance(result, Done):
        return result
    if result.code == "invalid_fields":
        loc = tuple(part for part in (result.task, result.column, result.row) if part is not None)
        raise invalid_fields([FieldError(loc, result.rule or "invalid_input", result.message)])
    raise ServiceError(result.code, result.message, retry_after_s=result.retry_after_s)


def _group_warnings(prefer: str | None, planned: Sequence[str], used: str) -> tuple[str, ...]:
    wanted = prefer or planned[0]
    if used == wanted:
        return ()
    if wanted not in planned:
        return (f"the {wanted} group was requested and is not part of this service: the {used} group answered",)
    return (f"the {wanted} group has no live replica now: the {used} group answered",)


def _view(replica_id: str, entry: Mapping[str, Any]) -> ReplicaView:
    metadata = entry["metadata"]
    # Statistics come every second; until the first ones, what the replica said when it became ready.
    news = entry["stats"] or metadata
    return ReplicaView(
        replica_id=replica_id,
        group=metadata["group"],
        node=entry["node"],
        pid=metadata["pid"],
        device=DeviceFacts(**metadata["device"]),
        queued=news["queued"],
        running_rows=news["running_rows"],
        cache_slots_used=news["cache_slots_used"],
        cache_slots_free=news["cache_slots_free"],
        models=news["models"],
        counters=news["counters"],
    )
