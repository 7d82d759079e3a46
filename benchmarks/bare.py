"""The least that a request can cost on the path of the service: proxy, FastAPI ingress, one call to a replica, JSON in
and out, and nothing checked, bounded, routed, watched or counted. What serve_app costs is read against it.
"""

from typing import Any

from fastapi import FastAPI, Request
from ray import serve
from ray.serve.handle import DeploymentHandle

api = FastAPI()


@serve.deployment(max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.5})
class BareReplica:
    async def forecast(self, body: dict[str, Any]) -> dict[str, Any]:
        """As many bars as an answer of the service has, all alike."""
        series = body["series"][0]
        bars = [series["close"][-1]] * len(series["future_timestamps"])
        columns = dict.fromkeys(("open", "high", "low", "close", "volume", "amount"), bars)
        return {"timestamps": series["future_timestamps"], "mean": columns, "quantiles": dict.fromkeys("159", columns)}


@serve.deployment(max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.1})
@serve.ingress(api)
class BareIngress:
    def __init__(self, replica: DeploymentHandle) -> None:
        self.replica = replica

    @api.get("/v1/readyz")
    async def ready(self) -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/v1/replicas")
    async def replicas(self) -> dict[str, Any]:
        return {"replicas": [{}]}

    @api.post("/v1/forecast")
    async def forecast(self, request: Request) -> Any:
        return await self.replica.forecast.remote(await request.json())


app = BareIngress.bind(BareReplica.bind())  # type: ignore[attr-defined]
