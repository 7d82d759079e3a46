"""The earlier design, as a baseline: one FastAPI process that calls the public predict in a thread, request by request.

    python benchmarks/baseline_service.py CHECKOUT WEIGHTS_FOLDER MAX_CONTEXT PORT THREADS

A process of its own: the public package is called `model` too. It has the one route that is compared, without the
checks that the service makes.
"""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd
import torch
import uvicorn
from fastapi import FastAPI, Request
from public_checkout import load  # the folder of this script comes first in sys.path


def main(checkout: str, weights: str, max_context: str, port: str, threads: str) -> None:
    public, model, tokenizer = load(checkout, weights)
    torch.set_num_threads(int(threads))
    predictor = public.KronosPredictor(model, tokenizer, device="cpu", max_context=int(max_context))
    # One at a time: the public model caches its rotary tables while it computes, and two threads break each other's.
    worker = ThreadPoolExecutor(1)
    app = FastAPI()

    @app.get("/v1/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/predict/single")
    async def single(request: Request) -> dict[str, Any]:
        body = await request.json()
        return {"prediction": await asyncio.get_running_loop().run_in_executor(worker, predict, body)}

    def predict(body: dict[str, Any]) -> list[dict[str, Any]]:
        future = body["prediction_timestamps"]
        frame = predictor.predict(
            pd.DataFrame(body["candles"]),
            pd.Series(pd.to_datetime(body["timestamps"])),
            pd.Series(pd.to_datetime(future)),
            pred_len=len(future),
            verbose=False,
        )
        rows = frame.astype(float).to_dict("records")
        return [{"timestamp": stamp, **row} for stamp, row in zip(future, rows, strict=True)]

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
