"""What a request costs without Ray: one FastAPI process that answers with the JSON that it was sent. The speed of the
host, against which requests/s of other machines are read.
"""

from typing import Any

from fastapi import FastAPI, Request

api = FastAPI()


@api.get("/v1/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@api.post("/v1/forecast")
async def forecast(request: Request) -> Any:
    return await request.json()
