"""LoRA: a low-rank matrix beside each chosen linear layer is trained, the layer itself is not.

Source: Hu et al. 2021, arXiv 2106.09685. A checkpoint holds the adapters and the sha256 of the weights they stand
beside; what is exported is merged, so that nothing that reads a bundle knows of adapters.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.training.config import Lora
from model.errors import CheckpointMismatchError
from model.layers import TransformerBlock

ADAPTERS_FILE = "adapters.safetensors"
LAYERS = {
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "o": ("self_attn.out_proj",),
    "ffn": ("ffn.w1", "ffn.w2", "ffn.w3"),
}
"""Target → its linear layers in a transformer block. Heads, embeddings and the dependency layer get no adapter."""


class LoraLinear(nn.Linear):
    """x W^T + b + (alpha / rank) · x A^T B^T, with A [rank, in] and B [out, rank]; B starts at 0, so nothing changes.

    Shares weight and bias with the layer it stands for, under the same names in the state dict, and freezes them.
    """

    def __init__(self, base: nn.Linear, options: Lora) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(base.weight.new_empty(options.rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, options.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scale = options.alpha / options.rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that computes the same."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.weight + self.lora_b @ self.lora_a * self.scale)
        plain.bias = self.bias
        return plain


def add_adapters(network: nn.Module, options: Lora) -> None:
    """Freezes the network and puts adapters beside the targets in each of its transformer blocks, in place."""
    network.requires_grad_(False)
    blocks = [module for module in network.modules() if isinstance(module, TransformerBlock)]
    for block in blocks:
        for target in options.targets:
            for path in LAYERS[target]:
                _replace(block, path, LoraLinear(cast(nn.Linear, block.get_submodule(path)), options))


def merge_adapters(network: nn.Module) -> nn.Module:
    """A copy in which every adapter is added to its layer; the network itself stays as it is."""
    merged = copy.deepcopy(network)
    for path, module in list(merged.named_modules()):
        if isinstance(module, LoraLinear):
            _replace(merged, path, module.merged())
    return merged


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """Name → tensor of the adapters alone."""
    return {name: tensor for name, tensor in network.state_dict().items() if ".lora_" in name}


def save_adapters(network: nn.Module, options: Lora, base_sha256: str, path: Path) -> None:
    """base_sha256: of the weights file that the adapters stand beside."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in adapter_state(network).items()}
    metadata = {"format": "pt", "base_sha256": base_sha256, "lora": json.dumps(options.model_dump(mode="json"))}
    save_file(tensors, path, metadata=metadata)


def load_adapters(network: nn.Module, path: Path, base_sha256: str) -> None:
    """Fills the adapters that add_adapters made. Raises CheckpointMismatchError if they belong to other weights."""
    try:
        with safe_open(path, framework="pt") as file:
            made_for = (file.metadata() or {}).get("base_sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointMismatchError(f"{path} cannot be read as safetensors: {error}") from None
    if made_for != base_sha256:
        raise CheckpointMismatchError(f"{path} holds adapters of other weights (sha256 {made_for}, not {base_sha256})")
    wanted = adapter_state(network)
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in wanted.items()}:
        raise CheckpointMismatchError(f"{path} holds adapters of another rank or of other targets")
    network.load_state_dict(tensors, strict=False)
