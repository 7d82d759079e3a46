"""build_app: the entry point that serve_config.yaml names.

No `from __future__ import annotations` here: Serve reads build_app's annotation to turn `args:` into an AppConfig, and
does not resolve a string.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.context import _get_global_client  # no public way to the address; serve.status() does not hold it
from ray.serve.handle import DeploymentHandle

from cluster.plan import GroupRequest, Plan, PlannedGroup, Scale, plan_groups, probe_resources
from serve_app.config import AppConfig, AuthConfig, GroupConfig
from serve_app.deployment import Factory, KronosReplica
from serve_app.engine import EngineFactory
from serve_app.environment import apply_environment
from serve_app.ingress import create_app
from serve_app.logs import configure_logging, log
from serve_app.routing import RayBackend, deployment_name
from serve_app.status import public_settings

MAX_ONGOING = 1000
"""Requests that Ray lets into a replica: our own queue decides what waits and what is refused."""
HEALTH_CHECK_PERIOD_S = 2
GRACEFUL_SHUTDOWN_TIMEOUT_S = 8
_LISTING = RequestRouterConfig.model_validate(
    {"request_router_class": "serve_app.listing_router.ListingRouter", "request_routing_stats_period_s": 1}
)


@serve.ingress()
class Ingress:
    """HTTP in, jobs out. Holds no model and no torch."""

    def __init__(
        self, groups: dict[str, DeploymentHandle], plan: Plan, config: AppConfig, warnings: tuple[str, ...]
    ) -> None:
        configure_logging(config.log_level)
        _require_safe_address(config.auth)
        self._keys = config.auth.key_ring()
        self._config = config
        self._warnings = warnings
        self._backend = RayBackend(groups, plan, config.limits.replica_wait_s)
        for warning in warnings:
            log(logging.WARNING, warning)
        log(logging.INFO, "effective settings", settings=public_settings(config), groups=self._backend.groups())

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(self._backend, self._config, self._warnings, behind_serve=True, keys=self._keys)
        self._backend.on_retry = app.state.metrics.retries.inc
        return app


def build_app(args: AppConfig) -> serve.Application:
    """The application that the configuration, the environment and the cluster's resources make together.

    Raises serve_app.environment.EnvironmentVariableError for a KRONOS_ variable that its setting does not accept,
    UnsafeAddressError, and serve_app.keys.KeyFileError.
    """
    # Told here, a mistake is an answer; in the ingress's constructor it would be tried again and again.
    config, _ = apply_environment(args, os.environ)
    _require_safe_address(config.auth)
    config.auth.key_ring()
    return assemble(args, os.environ, probe_resources())


class UnsafeAddressError(ValueError):
    """The service would be open to a network, without keys and without anybody having said so."""


def _require_safe_address(auth: AuthConfig) -> None:
    if error := auth.address_error(_bind_host()):
        raise UnsafeAddressError(error)


def _bind_host() -> str | None:
    """The address that Serve's HTTP proxy listens on; None where there is none yet, or none at all."""
    # Asking starts a cluster where there is none.
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    return client.http_config.host if client else None


def assemble(
    args: AppConfig,
    environ: Mapping[str, str],
    resources: Mapping[str, float] | None,
    make_factory: Callable[[AppConfig], Factory] = EngineFactory,
) -> serve.Application:
    """build_app with what it reads from outside, and what computes, as arguments."""
    config, warnings = apply_environment(args, environ)
    plan = make_plan(config, resources)
    groups = {group.name: _group(group, config, make_factory) for group in plan.groups}
    ingress = serve.deployment(
        name="ingress",
        num_replicas=config.ingress.replicas,
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        ray_actor_options={"num_cpus": config.ingress.num_cpus},
    )(Ingress)
    return ingress.bind(groups, plan, config, (*warnings, *plan.warnings))


def make_plan(config: AppConfig, resources: Mapping[str, float] | None) -> Plan:
    """Which groups run, for this configuration on a cluster with these resources."""
    gpu, cpu = config.groups.gpu, config.groups.cpu
    # No model may use a GPU: then none is asked for, and nothing is missed.
    cpu_only = all(model.device in ("cpu", "mps") for model in config.models.values())
    return plan_groups(
        resources,
        gpu=GroupRequest(gpu.num_cpus, gpu.num_gpus, _scale(gpu)),
        cpu=GroupRequest(cpu.num_cpus, 0.0, _scale(cpu)),
        gpu_mode="off" if cpu_only else gpu.mode,
        hybrid=config.hybrid,
        reserved_cpus=config.ingress.num_cpus * config.ingress.replicas,
    )


def _scale(group: GroupConfig) -> Scale:
    if group.autoscaling is not None:
        return Scale(group.autoscaling.min_replicas, group.autoscaling.max_replicas)
    return Scale(group.replicas or 1, group.replicas or 1)


def _group(group: PlannedGroup, config: AppConfig, make_factory: Callable[[AppConfig], Factory]) -> serve.Application:
    settings: GroupConfig = config.groups.gpu if group.name == "gpu" else config.groups.cpu
    options: dict[str, Any] = {"num_cpus": group.num_cpus}
    if group.num_gpus:
        options["num_gpus"] = group.num_gpus
    else:
        # Belt and braces beside the forced device: on a GPU host Ray hides no GPU from a replica that reserved none.
        options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    scaling: dict[str, Any] = {"num_replicas": group.scale.maximum}
    if settings.autoscaling is not None:
        scaling = {
            "num_replicas": None,
            "autoscaling_config": {
                "min_replicas": group.scale.minimum,
                "max_replicas": group.scale.maximum,
                "target_ongoing_requests": settings.autoscaling.target_ongoing_requests,
                "upscale_delay_s": settings.autoscaling.upscale_delay_s,
                "downscale_delay_s": settings.autoscaling.downscale_delay_s,
            },
        }
    replica = serve.deployment(
        name=deployment_name(group.name),
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_TIMEOUT_S,
        request_router_config=_LISTING,
        ray_actor_options=options,
        **scaling,
    )(KronosReplica)
    return replica.bind(group.name, config, make_factory)
