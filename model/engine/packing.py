"""A network's linear layers in the form in which the machine multiplies fastest, derived from a loaded network.

What shares an input becomes one product: q, k and v of a block, and the two halves of its feed-forward. On the CPU
oneDNN keeps a weight in its own blocked layout, up to three times as fast as a plain linear at 5 to 30 rows.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.device import PRECISIONS, precision_obstacle
from model.layers import Attention, FeedForward, TransformerBlock

Pack = Callable[[nn.Linear], nn.Module]

# torch keeps oneDNN's products in a cache of 1,024 shapes for every thread that ever drove the engine, half a megabyte
# each: 600 ragged requests from 8 threads held 3 GB. A step needs about ten shapes. oneDNN itself keeps as many kernels
# again, once for all threads. Both are read at the first product.
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


class PackedLinear(nn.Module):
    """x W^T + b with oneDNN's packed weight in fp32 or bf16; input and output are fp32."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        weight = linear.weight.detach().to(dtype).contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "").float()


class CastLinear(nn.Module):
    """x W^T + b computed in bf16, for devices without oneDNN; input and output are fp32."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().bfloat16())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).float()


class Int8Linear(nn.Module):
    """x W^T + b with weights in int8 per output channel and activations in int8 per row; input and output fp32."""

    ends: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        zero = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():
            # torch announces that quantised tensors will move to another package; the kernel is the one wanted here.
            warnings.simplefilter("ignore")
            quantised = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(quantised, None)
        # The kernel takes one scale for all rows, from their largest and smallest value. Rows that are scaled to a
        # largest value of 1, and one row more that holds 1 and -1, make it the same for any company of rows.
        ends = torch.zeros(1, linear.in_features)
        ends[0, 0], ends[0, -1] = 1, -1
        self.register_buffer("ends", ends)
        self.register_buffer("bias", linear.weight.new_zeros(()) if linear.bias is None else linear.bias.detach())
        # Without VNNI the kernel adds pairs of products in 16 bits, which overflow unless activations keep to 7 bits.
        self.reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        rows = torch.cat(((x / largest).flatten(0, -2), self.ends))
        product = torch.ops.quantized.linear_dynamic(rows, self.packed, self.reduce_range)
        return torch.addcmul(self.bias, product[:-1].unflatten(0, x.shape[:-1]), largest)


class PackedAttention(Attention):
    """Self-attention whose q, k and v are one product."""

    def __init__(self, source: Attention, pack: Pack) -> None:
        nn.Module.__init__(self)
        self.n_heads = source.n_heads
        self.qkv_proj = pack(stacked([source.q_proj, source.k_proj, source.v_proj]))
        self.out_proj = cast(nn.Linear, pack(source.out_proj))
        self.rotary = source.rotary
        self.attn_dropout_p = 0.0
        self.resid_dropout = nn.Dropout(0.0)

    def project(self, query: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As Attention.project; memory is query."""
        q, k, v = self.qkv_proj(query).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class PackedFeedForward(FeedForward):
    """SwiGLU whose gate and value are one product."""

    def __init__(self, source: FeedForward, pack: Pack) -> None:
        nn.Module.__init__(self)
        self.w13 = pack(stacked([source.w1, source.w3]))
        self.w2 = cast(nn.Linear, pack(source.w2))

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * value)


def stacked(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer whose outputs are those of several, side by side."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    one = nn.Linear(weight.shape[1], weight.shape[0], bias=linears[0].bias is not None, device="meta")
    one.weight = nn.Parameter(weight, requires_grad=False)
    if one.bias is not None:
        one.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]), requires_grad=False)
    return one


def packed(network: nn.Module, precision: str, device: torch.device, *, for_compiler: bool = False) -> nn.Module:
    """A copy of a network for inference on the device, its linear layers in the fastest form of that precision.

    Embeddings, norms and everything between the layers stay fp32. for_compiler: fused, but in plain layers, which
    torch.compile packs itself. Raises ValueError for an unknown precision, and for
    one that the device cannot compute: model.device.resolve_precision finds one that it can.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    obstacle = precision_obstacle(precision, device)
    if obstacle is not None:
        raise ValueError(obstacle)
    twin = copy.deepcopy(network).requires_grad_(False).eval()
    _replace_linears(twin, _pack_for(precision, device, for_compiler))
    return twin


def _pack_for(precision: str, device: torch.device, for_compiler: bool) -> Pack:
    if precision == "int8":
        return Int8Linear
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and not for_compiler:
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        return lambda linear: PackedLinear(linear, dtype)
    return CastLinear if precision == "bf16" else (lambda linear: linear)


def _replace_linears(module: nn.Module, pack: Pack) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, Attention) and isinstance(module, TransformerBlock):
            setattr(module, name, PackedAttention(child, pack))
        elif isinstance(child, FeedForward):
            setattr(module, name, PackedFeedForward(child, pack))
        elif isinstance(child, nn.Linear):
            setattr(module, name, pack(child))
        else:
            _replace_linears(child, pack)
