"""Linear layers in the form in which the machine multiplies fastest, derived from a loaded network.

On the CPU oneDNN keeps a weight in its own blocked layout: 2–3 times as fast as a plain linear at 1 to 30 rows. Other
devices run the plain layers.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from model.device import PRECISIONS, precision_obstacle


class PackedLinear(nn.Module):
    """x W^T + b with oneDNN's packed weight in fp32 or bf16; input and output are fp32."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        weight = linear.weight.detach().to(dtype).contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.to(self.dtype).flatten(0, -2)
        y = torch.ops.mkldnn._linear_pointwise(flat, self.weight, self.bias, "none", [], "")
        return y.float().unflatten(0, x.shape[:-1])


class Int8Linear(nn.Module):
    """x W^T + b with weights in int8 per output channel and activations quantised per call; input and output fp32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        zero = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():
            # torch announces that quantised tensors will move to another package; the kernel is the one wanted here.
            warnings.simplefilter("ignore")
            quantised = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(quantised, linear.bias)
        # Without VNNI the kernel adds pairs of products in 16 bits, which overflow unless activations keep to 7 bits.
        self.reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)


def packed(network: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """A copy of a network for inference on the device, its linear layers in the fastest form of that precision.

    Embeddings, norms and everything between the layers stay fp32. Raises ValueError for an unknown precision, and for
    one that the device cannot compute: model.device.resolve_precision finds one that it can.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    obstacle = precision_obstacle(precision, device)
    if obstacle is not None:
        raise ValueError(obstacle)
    if device.type != "cpu" or not (torch.backends.mkldnn.is_available() or precision == "int8"):
        return network
    twin = copy.deepcopy(network).requires_grad_(False)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, _pack(child, precision))
    return twin


def _pack(linear: nn.Linear, precision: str) -> nn.Module:
    if precision == "int8":
        return Int8Linear(linear)
    return PackedLinear(linear, torch.float32 if precision == "fp32" else torch.bfloat16)
