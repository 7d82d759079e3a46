"""Whether a code update may start a new replica before it stops an old one (Ray's max_surge_percent)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.serve.context import _get_global_client  # serve.status() has neither options nor counts


@dataclass(frozen=True)
class Running:
    """A deployment before the update. replicas: at least so many. num_cpus: per replica."""

    replicas: int
    num_cpus: float


@dataclass(frozen=True)
class Before:
    """The cluster before the update. running: by name of the deployment. free_cpus: what nothing takes."""

    running: Mapping[str, Running] = field(default_factory=dict)
    free_cpus: float = 0.0

    def surge_percent(self, name: str, replicas: int, num_cpus: float, *, reserved_cpus: float = 0.0) -> int:
        """Ray's max_surge_percent for at most so many replicas of the new version; 0: the old ones stop first.

        reserved_cpus: what others of this update start with. Ray stops old ones only once more than `replicas` run, and
        waits for ever for one that finds no room: all that start before then must fit.
        """
        old = self.running.get(name)
        if old is None or old.num_cpus != num_cpus:
            return 0
        needed = num_cpus * max(1, replicas - old.replicas + 1)
        return max(1, 100 // replicas) if needed + reserved_cpus <= self.free_cpus else 0


def serve_client() -> Any:
    """Ray's own client of the Serve that runs on this process's cluster; None where none does."""
    # Asking Serve starts a cluster where there is none.
    return _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None


def probe_before() -> Before:
    """Asks Ray; nothing runs, and nothing is free, where no Serve runs on this process's cluster.

    A name that several applications use says nothing: which of them is being updated is not known here.
    """
    client = serve_client()
    if client is None:
        return Before()
    # Not get_serve_details: while an application is being built, it has no deployments there.
    deployments = ray.get(client._controller.list_deployments_internal.remote())
    found: dict[str, list[Running]] = {}
    for each, (info, _) in deployments.items():
        autoscaling = info.deployment_config.autoscaling_config
        replicas = info.deployment_config.num_replicas if autoscaling is None else autoscaling.min_replicas
        num_cpus = (info.replica_config.ray_actor_options or {}).get("num_cpus", 1)
        found.setdefault(each.name, []).append(Running(replicas or 0, float(num_cpus)))
    running = {name: same[0] for name, same in found.items() if len(same) == 1}
    return Before(running, float(ray.available_resources().get("CPU", 0.0)))
