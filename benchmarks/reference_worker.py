"""Times the public implementation, from a checkout given by path. A process of its own: its package is `model` too.

    python benchmarks/reference_worker.py CHECKOUT WEIGHTS_FOLDER THREADS

Reads one JSON object a line and answers with one: {"rows", "window"} → seconds of one generation step at that window;
{"rows", "encode"} and {"rows", "decode"} → seconds of the tokenizer over that many bars; {"rows", "history", "horizon",
"max_context"} → seconds of a whole forecast.
"""

import json
import sys
import time

import torch
from public_checkout import load  # the folder of this script comes first in sys.path


def main(checkout: str, weights: str, threads: str) -> None:
    public, model, tokenizer = load(checkout, weights)
    torch.set_num_threads(int(threads))

    def step(rows: int, window: int) -> None:
        s1, s2 = (torch.randint(0, 1024, (rows, window)) for _ in range(2))
        logits, context = model.decode_s1(s1, s2, torch.ones(rows, window, 5))
        chosen = public.sample_from_logits(logits[:, -1, :], temperature=1.0, top_k=0, top_p=0.9)
        public.sample_from_logits(model.decode_s2(context, chosen)[:, -1, :], temperature=1.0, top_k=0, top_p=0.9)

    def run(job: dict) -> None:
        rows = job["rows"]
        if "window" in job:
            step(rows, job["window"])
        elif "encode" in job:
            tokenizer.encode(torch.randn(rows, job["encode"], 6), half=True)
        elif "decode" in job:
            tokens = [torch.randint(0, 1024, (rows, job["decode"])) for _ in range(2)]
            tokenizer.decode(tokens, half=True)
        else:
            stamps = torch.ones(1, job["history"] + job["horizon"], 5)
            public.auto_regressive_inference(
                tokenizer,
                model,
                torch.randn(1, job["history"], 6),
                stamps[:, : job["history"]],
                stamps[:, job["history"] :],
                job["max_context"],
                job["horizon"],
                top_p=0.9,
                sample_count=rows,
            )

    with torch.no_grad():
        for line in sys.stdin:
            started = time.perf_counter()
            run(json.loads(line))
            print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
