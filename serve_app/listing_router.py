"""Ray's default routing (the shorter of two queues), which also publishes the live replicas to serve_app.listing.

Ray pickles a router class by value, with the globals of its module. So nothing but the class may live here, and the
table that it writes is imported inside the method: a global of this module would be a private copy.
"""

from __future__ import annotations

import random

from ray.serve.request_router import (
    FIFOMixin,
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)


class ListingRouter(FIFOMixin, LocalityMixin, MultiplexMixin, RequestRouter):
    """Knows every replica of its deployment at no cost: Ray pushes changes and statistics."""

    def _publish(self) -> None:
        from serve_app.listing import publish

        replicas = {
            replica.replica_id.unique_id: {
                "node": replica.node_id,
                "metadata": replica.replica_metadata,
                "stats": replica.routing_stats,
            }
            for replica in self.curr_replicas.values()
        }
        publish(self._deployment_id.name, replicas)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._publish()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            # Without this, Ray asks again without a pause as long as no replica has room, and its loop stands still.
            pending_request.routing_context.should_backoff = True
        if not candidate_replicas:
            return []
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
