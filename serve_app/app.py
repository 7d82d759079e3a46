"""build_app: the entry point that serve_config.yaml names.

No `from __future__ import annotations` here: Serve reads build_app's annotation to turn `args:` into an AppConfig, and
does not resolve a string.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from cluster.plan import GroupRequest, Plan, PlannedGroup, Scale, plan_groups, probe_resources
from serve_app.admission import Admission
from serve_app.cluster_watch import ClusterWatch
from serve_app.config import AppConfig, AuthConfig, GroupConfig
from serve_app.deployment import KronosReplica, MakeFactory
from serve_app.draining import Drain
from serve_app.engine import EngineFactory
from serve_app.errors import ServiceError
from serve_app.ingress import create_app
from serve_app.limits import ClientLimits
from serve_app.listing import deployment_name, forget_load_failures
from serve_app.live_config import InvalidUserConfigError, LiveConfig
from serve_app.logs import configure_logging, log
from serve_app.metrics import Metrics
from serve_app.proxy import CALLBACK, CALLBACK_VARIABLE
from serve_app.routing import RayBackend
from serve_app.status import public_settings
from serve_app.updates import Before, probe_before, serve_client

MAX_ONGOING = 1000
"""Requests that Ray lets into a replica: our own queue decides what waits and what is refused."""
HEALTH_CHECK_PERIOD_S = 0.5
"""How late a killed replica is missed. Its successor takes seconds to start, so every one before it counts."""
GRACEFUL_SHUTDOWN_TIMEOUT_S = 5
METRICS_INTERVAL_S = 0.5
"""How often replicas report what they have to do. Ray's own 10 s would make a sleeping group wake that late."""
NO_DOOR = (
    f"Ray was started without {CALLBACK_VARIABLE}={CALLBACK}: an overloaded service refuses more slowly, and clients "
    "can give Ray's proxy orders by header; `make serve` starts it so, see docs/operations.md"
)
LOOK_BACK_S = 2.0
SWITCH_POLL_S = 0.2
_LISTING = RequestRouterConfig.model_validate(
    {"request_router_class": "serve_app.listing_router.ListingRouter", "request_routing_stats_period_s": 0.5}
)


@serve.ingress()
class Ingress:
    """HTTP in, jobs out. Holds no model and no torch."""

    def __init__(self, groups: dict[str, DeploymentHandle], plan: Plan, live: LiveConfig) -> None:
        self._live = live
        self._config = config = live.current
        configure_logging(config.log_level)
        _require_safe_address(config.auth)
        self._keys = config.auth.key_ring()
        self._clients = ClientLimits(config.limits)
        self._plan = plan
        self._metrics = Metrics()
        self._drain = Drain()
        watch = ClusterWatch(probe_resources) if plan.group("gpu") is not None else None
        self._backend = RayBackend(
            groups,
            plan,
            Admission(
                {name: config.group(name).max_outstanding_work for name in groups},
                {name: config.group(name).max_wait_s for name in groups},
                {name: config.group(name).workers for name in groups},
            ),
            replica_wait_s=config.limits.replica_wait_s,
            spill=config.hybrid,
            resources=lambda: None if watch is None else watch.resources,
        )
        self._backend.on_retry = self._metrics.retries.inc
        self._switching: asyncio.Task[None] | None = None
        # Ray gives its proxy and this process the same environment.
        self._no_door = () if os.environ.get(CALLBACK_VARIABLE) == CALLBACK else (NO_DOOR,)
        for warning in (*live.warnings, *plan.warnings, *self._no_door):
            log(logging.WARNING, warning)
        self._serve(config)

    def _serve(self, config: AppConfig, *notes: str) -> None:
        """From now on new requests are answered under this configuration; those under way end under theirs.

        notes: what /v1/info says about settings that are not in effect.
        """
        if config.models != self._config.models:
            forget_load_failures()
        self._config, self._notes = config, notes
        self._backend.replica_wait_s = config.limits.replica_wait_s
        self._clients.limits = config.limits
        self._app = create_app(
            self._backend,
            config,
            (*self._live.warnings, *self._plan.warnings, *self._no_door, *notes),
            behind_serve=True,
            behind_door=not self._no_door,
            metrics=self._metrics,
            drain=self._drain,
            keys=self._keys,
            clients=self._clients,
        )
        log(logging.INFO, "effective settings", settings=public_settings(config), groups=self._backend.groups())

    def __serve_build_asgi_app__(self) -> Callable[..., Awaitable[None]]:
        async def current(scope: Any, receive: Any, send: Any) -> None:
            async def hearing() -> Any:
                try:
                    return await receive()
                except RayActorError:
                    # Killed, but it may still pass on an answer.
                    raise ServiceError("no_replica", "the HTTP proxy of this request was lost; ask again") from None

            await self._app(scope, hearing, send)

        return current

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Takes over models, limits and defaults, a new default model as soon as a replica has loaded it."""
        try:
            config = self._live.update(user_config)
        except InvalidUserConfigError as error:
            # Raised, it would make Ray replace an ingress that serves well.
            log(logging.ERROR, "user_config was refused, the settings before it stay", error_message=str(error))
            self._serve(self._config, f"the latest user_config was refused: {error}")
            return
        if self._switching is not None:
            self._switching.cancel()
        if config == self._config and not self._notes:
            return  # as at start
        if self._can_answer(config):
            self._serve(config)
            return
        self._serve(self._config, f"new settings wait until a replica has loaded {config.default_model!r}")
        self._switching = asyncio.get_running_loop().create_task(self._switch(config))

    async def _switch(self, config: AppConfig) -> None:
        while not self._can_answer(config):
            await asyncio.sleep(SWITCH_POLL_S)
        self._serve(config)

    def _can_answer(self, config: AppConfig) -> bool:
        """False as long as a request for another default model than today's would have to wait."""
        views = self._backend.replicas()
        if config.default_model == self._config.default_model or not views:
            return True
        return any(view.models.get(config.default_model, {}).get("state") == "loaded" for view in views)

    async def drain(self) -> int:
        """Refuses new work from now on; the number of requests in flight. Reached by handle only, never over HTTP."""
        return self._drain.start()


def build_app(args: AppConfig) -> serve.Application:
    """The application that the configuration, the environment and the cluster's resources make together.

    Raises serve_app.environment.EnvironmentVariableError for a KRONOS_ variable that its setting does not accept,
    UnsafeAddressError, and serve_app.keys.KeyFileError.
    """
    # Told here, a mistake is an answer; in the ingress's constructor it would be tried again and again.
    config = LiveConfig(args, os.environ).current
    _require_safe_address(config.auth)
    config.auth.key_ring()
    return assemble(args, os.environ, probe_resources(), before=probe_before())


class UnsafeAddressError(ValueError):
    """The service would be open to a network, without keys and without anybody having said so."""


def _require_safe_address(auth: AuthConfig) -> None:
    if error := auth.address_error(_bind_host()):
        raise UnsafeAddressError(error)


def _bind_host() -> str | None:
    """The address that Serve's HTTP proxy listens on; None where there is none yet, or none at all."""
    client = serve_client()
    return client.http_config.host if client else None


def assemble(
    args: AppConfig,
    environ: Mapping[str, str],
    resources: Mapping[str, float] | None,
    make_factory: MakeFactory = EngineFactory,
    before: Before = Before(),  # noqa: B008 - frozen
) -> serve.Application:
    """build_app with what it reads from outside, and what computes, as arguments."""
    live = LiveConfig(args, environ)
    config = live.current
    plan = make_plan(config, resources)
    groups = {group.name: _group(group, live, make_factory, before) for group in plan.groups}
    ingress = serve.deployment(
        name="ingress",
        num_replicas=config.ingress.replicas,
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        # One that a code update replaces finishes what it answers; jobs of replicas that are replaced it sends again.
        graceful_shutdown_timeout_s=config.limits.request_timeout_s,
        max_surge_percent=before.surge_percent("ingress", config.ingress.replicas, config.ingress.num_cpus),
        user_config={},
        ray_actor_options={"num_cpus": config.ingress.num_cpus},
    )(Ingress)
    return ingress.bind(groups, plan, live)


def make_plan(config: AppConfig, resources: Mapping[str, float] | None) -> Plan:
    """Which groups exist, for this configuration on a cluster with these resources."""
    gpu, cpu = config.groups.gpu, config.groups.cpu
    # No model may use a GPU: then none is asked for, and nothing is missed.
    cpu_only = all(model.device in ("cpu", "mps") for model in config.models.values())
    return plan_groups(
        resources,
        gpu=GroupRequest(gpu.num_cpus, gpu.num_gpus, _scale(gpu)),
        cpu=GroupRequest(cpu.num_cpus, 0.0, _scale(cpu)),
        gpu_mode="off" if cpu_only else gpu.mode,
        reserved_cpus=config.ingress.num_cpus * config.ingress.replicas,
    )


def _scale(group: GroupConfig) -> Scale:
    if group.autoscaling is not None:
        return Scale(group.autoscaling.min_replicas, group.autoscaling.max_replicas)
    return Scale(group.replicas or 1, group.replicas or 1)


def _group(group: PlannedGroup, live: LiveConfig, make_factory: MakeFactory, before: Before) -> serve.Application:
    ingress = live.current.ingress
    # A GPU is rarely left for one replica more, and how many there should be follows the cluster.
    surge = 0
    if not group.num_gpus:
        starting = ingress.num_cpus * ingress.replicas
        name = deployment_name(group.name)
        surge = before.surge_percent(name, group.scale.maximum, group.num_cpus, reserved_cpus=starting)
    options: dict[str, Any] = {"num_cpus": group.num_cpus}
    if group.num_gpus:
        options["num_gpus"] = group.num_gpus
    replica = serve.deployment(
        name=deployment_name(group.name),
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_TIMEOUT_S,
        max_surge_percent=surge,
        request_router_config=_LISTING,
        user_config={},
        ray_actor_options=options,
        **_scaling(group, live.current.group(group.name)),
    )(KronosReplica)
    return replica.bind(group.name, live, make_factory)


def _scaling(group: PlannedGroup, settings: GroupConfig) -> dict[str, Any]:
    """A fixed number of replicas, or what serve_app.scaling decides."""
    autoscaling = settings.autoscaling
    if autoscaling is None and not group.follows_gpus:
        return {"num_replicas": group.scale.maximum}
    policy: dict[str, Any] = {"minimum": group.scale.minimum, "maximum": group.scale.maximum}
    if autoscaling is not None:
        policy |= autoscaling.model_dump(include={"target_work", "upscale_delay_s", "downscale_delay_s"})
    if group.follows_gpus:
        policy["num_gpus"] = group.num_gpus
    return {
        "num_replicas": None,
        "autoscaling_config": {
            "min_replicas": 0 if group.follows_gpus else group.scale.minimum,
            "max_replicas": group.scale.maximum,
            "metrics_interval_s": METRICS_INTERVAL_S,
            "look_back_period_s": LOOK_BACK_S,
            # The policy itself waits before it follows the work; a GPU that has left is followed at once.
            "upscale_delay_s": 0,
            "downscale_delay_s": 0,
            "policy": {"policy_function": "serve_app.scaling:GroupScaling", "policy_kwargs": policy},
        },
    }
