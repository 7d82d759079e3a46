"""The backend of the ingress on Ray: which group answers, what happens when a replica is lost, who is alive."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster.plan import Plan, gpu_slots, why_no_gpu
from serve_app.admission import Admission, Booking
from serve_app.errors import ALL_FULL, FieldError, ServiceError, invalid_fields
from serve_app.jobs import (
    Answered,
    Bars,
    Chunk,
    DeviceFacts,
    Done,
    Failed,
    Job,
    LoadFailure,
    Places,
    ReplicaView,
    Resume,
)
from serve_app.listing import REPLICAS, deployment_name, load_failures
from serve_app.logs import log

POLL_S = 0.05
WATCH_S = 1.0
LEFT_ALONE_S = 6.0
"""How long a job may be with a group that has no listed replica: one that is being stopped finishes its jobs."""
LOST = (RayActorError, NodeDiedError, ObjectLostError, DeploymentUnavailableError)
"""Raised when the replica that had the job is gone. A forecast can be asked for again: its seed is in the job."""


class ReplicaLostError(Exception):
    """No replica of the group is left to finish the job."""


@dataclass
class _Delivery:
    """How far a job is: bars passed on per task, and where they came from; tries that ended with a lost replica."""

    delivered: list[int]
    origin: str = ""
    lost: int = 0
    avoid: str | None = None

    def resume(self) -> Resume | None:
        return Resume(self.origin, tuple(self.delivered)) if any(self.delivered) else None

    def pass_on(self, chunk: Chunk) -> Sequence[Bars]:
        self.origin = chunk.origin
        for bars in chunk.bars:
            self.delivered[bars.task] = bars.first + bars.values.shape[1]
        return chunk.bars


class RayBackend:
    """Sends jobs to the replica groups."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle],
        plan: Plan,
        admission: Admission,
        *,
        replica_wait_s: float,
        spill: bool = True,
        resources: Callable[[], Mapping[str, float] | None] = lambda: None,
    ) -> None:
        """handles: one per planned group. admission: how much may be under way in each.

        replica_wait_s: how long to wait where no group has a replica. spill: a full group's jobs go to the next one.
        resources: the latest of the cluster's totals; costs nothing.
        """
        # Naming a method starts the handle's router, and with it the listing.
        self._handles = {name: handle.options(method_name="forecast", stream=True) for name, handle in handles.items()}
        self._wakers = {name: handle.options(method_name="wake") for name, handle in handles.items()}
        self._waking: dict[str, asyncio.Task[None]] = {}
        self._plan = plan
        self._spill = spill
        self._resources = resources
        self._sender = uuid.uuid4().hex[:8]
        self._waiting_work = 0
        self.admission = admission
        self.replica_wait_s = replica_wait_s
        self.on_retry: Callable[[], None] = lambda: None
        """Called when a job is sent again."""

    @property
    def device_warning(self) -> str | None:
        gpu = self._plan.group("gpu")
        if gpu is None or _alive("gpu"):
            return None
        return why_no_gpu(self._resources(), gpu.num_gpus)

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

    def load_failures(self) -> Mapping[str, LoadFailure]:
        """See serve_app.jobs.Backend."""
        return load_failures()

    async def forecast(self, job: Job, prefer: str | None) -> Answered:
        """Computes the job on the preferred group, or another one, and says so. Raises ServiceError."""
        async with contextlib.aclosing(self._deliver(job, prefer, bars=False)) as items:
            async for item in items:
                if isinstance(item, Answered):
                    return item
        raise AssertionError("unreachable: a delivery ends with an answer or raises")

    async def stream(self, job: Job, prefer: str | None) -> AsyncGenerator[Bars | Answered]:
        """See serve_app.jobs.Backend. Raises ServiceError."""
        async with contextlib.aclosing(self._deliver(job, prefer, bars=True)) as items:
            async for item in items:
                yield item

    async def _deliver(self, job: Job, prefer: str | None, *, bars: bool) -> AsyncGenerator[Bars | Answered]:
        """Sends the job, once more if its replica is lost, and passes on what comes back."""
        started = time.monotonic()
        delivery = _Delivery([0] * len(job.tasks))
        while True:
            booking, warnings = await self._admit(job, prefer, delivery)
            group = booking.group
            waited_s = time.monotonic() - started
            left = job.timeout_s - waited_s
            result: Done | Failed | None = None
            sent = replace(job, timeout_s=left, sender=self._sender)
            response: Any = self._handles[group].remote(sent, delivery.resume(), bars=bars)
            try:
                while result is None:
                    item = await self._watched(group, response.__anext__())
                    if isinstance(item, Chunk):
                        for some in delivery.pass_on(item):
                            yield replace(some, queue_ms=some.queue_ms + 1000 * waited_s)
                    else:
                        result = item
                await _read_end(response)
                done = _done(result)
                # Also the wait for a sleeping group, and what was spent on a lost replica.
                yield Answered(replace(done, queue_ms=done.queue_ms + 1000 * waited_s), group, warnings)
                return
            except (*LOST, ReplicaLostError) as error:
                self._count_loss(job, group, delivery, error)
            except BackPressureError:
                raise ServiceError("queue_full", "all replicas are full") from None
            finally:
                self.admission.end(booking, computed=isinstance(result, Done))
                if result is None:
                    # The deadline passed or the client is gone: the replica hears of it and stops within one step.
                    response.cancel()

    def _count_loss(self, job: Job, group: str, delivery: _Delivery, error: Exception) -> None:
        """Raises ServiceError if this was the second time."""
        log(logging.WARNING, "replica lost", request_id=job.request_id, group=group, error=type(error).__name__)
        delivery.lost += 1
        if delivery.lost == 2:
            raise ServiceError("no_replica", "the replicas that computed this were lost; try again") from None
        # The listing may not know of the loss yet. Bars that have been passed on bind the stream to its group.
        delivery.avoid = None if delivery.resume() else group
        self.on_retry()

    async def _admit(self, job: Job, prefer: str | None, delivery: _Delivery) -> tuple[Booking, tuple[str, ...]]:
        """Books the job on a group with room, and what to say about it.

        Raises ServiceError: queue_full at once if every group that may answer is full; no_replica after a bounded wait
        if none has a replica.
        """
        order = sorted(self.groups(), key=lambda name: (name == delivery.avoid, name != prefer))
        alive = [name for name in order if _alive(name)] or await self._wait_for_replica(job, order)
        usable = alive if self._spill else alive[:1]
        for name in usable:
            replicas = len(_alive(name))
            if self.admission.has_room(name, job.work, replicas, self._others(name)):
                warnings = self._group_warnings(prefer, name, delivery.avoid)
                return self.admission.start(name, job.work, len(job.tasks), replicas), warnings
        raise self._full(alive, dict.fromkeys(usable, job.work))

    def refuse_if_crowded(self) -> None:
        """See serve_app.jobs.Backend."""
        alive = [name for name in self.groups() if _alive(name)]
        if alive and all(self.admission.crowded(name, len(_alive(name)), self._others(name)) for name in alive):
            raise self._full(alive, self._small_work(alive))

    def places(self) -> Places | None:
        """See serve_app.jobs.Backend. None also while overload has a sleeping group to wake, which is done here."""
        alive = [name for name in self.groups() if _alive(name)]
        if not alive or (self._spill and any(self._can_wake(name) for name in self.groups() if name not in alive)):
            return None
        count = sum(self.admission.places(name, len(_alive(name)), self._others(name)) for name in alive)
        return Places(count, self._retry_after_s(self._small_work(alive)))

    def _small_work(self, groups: Sequence[str]) -> dict[str, int]:
        return {name: self.admission.small_work(name) for name in groups}

    def _full(self, alive: Sequence[str], work: Mapping[str, int]) -> ServiceError:
        """What to say to work that finds no room in the groups it names; those that are not alive are woken."""
        if self._spill:
            self._wake([name for name in self.groups() if name not in alive])
        return ServiceError("queue_full", ALL_FULL, retry_after_s=self._retry_after_s(work))

    def _retry_after_s(self, work: Mapping[str, int]) -> float:
        return min(
            self.admission.retry_after_s(name, amount, len(_alive(name)), self._others(name))
            for name, amount in work.items()
        )

    async def _wait_for_replica(self, job: Job, order: Sequence[str]) -> list[str]:
        """Wakes the groups that sleep and waits for the first replica of any."""
        if self._waiting_work and self._waiting_work + job.work > max(self.admission.bounds.values()):
            raise ServiceError("queue_full", "no replica is running and enough requests wait for one")
        self._waiting_work += job.work
        until = time.monotonic() + min(self.replica_wait_s, job.timeout_s)
        try:
            while not (alive := [name for name in order if _alive(name)]):
                self._wake(order)
                if time.monotonic() >= until:
                    raise ServiceError("no_replica", "no replica is running now; it may be starting")
                await asyncio.sleep(POLL_S)
            return alive
        finally:
            self._waiting_work -= job.work

    def _wake(self, groups: Sequence[str]) -> None:
        """Shows Ray demand for groups without replicas: a call that waits in the handle until there is one."""
        for name in groups:
            waking = self._waking.get(name)
            if (waking is not None and not waking.done()) or not self._can_wake(name):
                continue
            log(logging.INFO, "waking a group that has no replica", group=name)
            self._waking[name] = asyncio.ensure_future(self._call_waker(name))

    def _can_wake(self, name: str) -> bool:
        """Whether the cluster has what the group runs on."""
        planned = self._plan.group(name)
        if planned is None:
            return False
        gpus = (self._resources() or {}).get("GPU", 0.0)
        return not planned.follows_gpus or gpu_slots(gpus, planned.num_gpus) > 0

    async def _call_waker(self, group: str) -> None:
        response = self._wakers[group].remote()
        try:
            await asyncio.wait_for(_result(response), max(self.replica_wait_s, 1.0))
        except (TimeoutError, *LOST) as error:
            log(logging.WARNING, "no replica came", group=group, error=type(error).__name__)
        finally:
            response.cancel()

    def _others(self, group: str) -> int:
        """Work that other ingress replicas have in the group, as its replicas said last."""
        return sum(
            work
            for entry in _alive(group).values()
            for sender, work in (entry["stats"] or {}).get("work", {}).items()
            if sender != self._sender
        )

    async def _watched(self, group: str, waiting: Awaitable[Any]) -> Any:
        """Waits with an eye on the listing: a handle without replicas would wait for ever. Raises ReplicaLostError."""
        task = asyncio.ensure_future(waiting)
        left_alone: float | None = None
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=WATCH_S)
                if done:
                    return task.result()
                if _alive(group):
                    left_alone = None
                    continue
                left_alone = left_alone or time.monotonic()
                elsewhere = any(_alive(name) for name in self.groups())
                patience = LEFT_ALONE_S if elsewhere else max(LEFT_ALONE_S, self.replica_wait_s)
                if time.monotonic() - left_alone > patience:
                    raise ReplicaLostError(group)
        finally:
            if not task.done():
                # Ray ends it with an error of its own, which asyncio would write into the log.
                task.add_done_callback(_look_at)
                task.cancel()

    def _group_warnings(self, prefer: str | None, used: str, avoid: str | None) -> tuple[str, ...]:
        planned = self.groups()
        wanted = prefer or planned[0]
        if used == wanted:
            return ()
        if wanted not in planned:
            return (f"the {wanted} group was requested and is not part of this service: the {used} group answered",)
        if wanted == avoid:
            return (f"the replica of the {wanted} group that had this was lost: the {used} group answered",)
        if _alive(wanted):
            return (f"the {wanted} group is full now: the {used} group answered",)
        if prefer is None:
            return ()  # device_warning says it
        return (f"the {wanted} group was requested and has no live replica now: the {used} group answered",)


def _alive(group: str) -> dict[str, dict[str, Any]]:
    return REPLICAS.get(deployment_name(group), {})


async def _result(response: Any) -> Any:
    return await response


def _look_at(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()


async def _read_end(response: Any) -> None:
    """A call is over for Ray once its end has been read; the result is there, so a replica that is lost now is none."""
    with contextlib.suppress(StopAsyncIteration, *LOST):
        await response.__anext__()


def _done(result: Done | Failed) -> Done:
    if isinstance(result, Done):
        return result
    if result.code == "invalid_fields":
        loc = tuple(part for part in (result.task, result.column, result.row) if part is not None)
        raise invalid_fields([FieldError(loc, result.rule or "invalid_input", result.message)])
    raise ServiceError(result.code, result.message, retry_after_s=result.retry_after_s)


def _view(replica_id: str, entry: Mapping[str, Any]) -> ReplicaView:
    metadata = entry["metadata"]
    # Statistics come twice a second; until the first ones, what the replica said when it became ready.
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
        work=sum(news["work"].values()),
        models=news["models"],
        counters=news["counters"],
    )
