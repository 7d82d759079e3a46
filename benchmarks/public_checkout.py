"""The public implementation, from a checkout given by path. For processes of their own: its package is `model` too."""

import json
import sys
from pathlib import Path
from typing import Any


def load(checkout: str, weights: str) -> tuple[Any, Any, Any]:
    """(its module, model, tokenizer) with the weights of benchmarks.shapes.save_pair."""
    sys.path[0] = checkout
    from safetensors.torch import load_file

    from model import kronos as public  # sys.path starts at the checkout

    networks = []
    for name, cls in (("model", public.Kronos), ("tokenizer", public.KronosTokenizer)):
        folder = Path(weights) / name
        network = cls(**json.loads((folder / "config.json").read_text()))
        network.load_state_dict(load_file(folder / "model.safetensors"))
        networks.append(network.eval())
    return public, *networks
