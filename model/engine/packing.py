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
from model.kronos import DependencyLayer, TokenEmbedding
from model.layers import Attention, FeedForward, RMSNorm, RotaryTables, TransformerBlock, rotate

Pack = Callable[[nn.Linear], nn.Module]

# torch keeps oneDNN's products in a cache of 1,024 shapes for every thread that ever drove the engine, half a megabyte
# each: 600 ragged requests from 8 threads held 3 GB. A step needs about ten shapes. oneDNN itself keeps as many kernels
# again, once for all threads. Both are read at the first product.
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


STREAMED_WEIGHTS = 2**23
"""A network with more in its linear layers, 32 MiB of fp32, reads them from memory at every step, not from a cache."""


class PackedLinear(nn.Module):
    """x W^T + b with oneDNN's packed weight in fp32 or bf16; input and output are fp32."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, *, streamed: bool = False) -> None:
        """streamed: also keep the weight as it is, for products of one or two rows."""
        super().__init__()
        self.dtype = dtype
        self.plain = linear.weight.detach().clone() if streamed and dtype is torch.float32 else None
        weight = linear.weight.detach().to(dtype).contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.plain is not None and x.numel() <= 2 * x.shape[-1]:
            return self._of_few_rows(x, self.plain)
        if self.dtype is torch.float32:  # the common case without two conversions that do nothing, at 3 µs
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "").float()

    def _of_few_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """As W X^T with two columns, which reads W from memory almost twice as fast as oneDNN or MKL with one row."""
        rows = x.reshape(-1, x.shape[-1])
        pair = (rows if len(rows) == 2 else rows.repeat(2, 1)).t()
        product = weight @ pair if self.bias is None else torch.addmm(self.bias[:, None], weight, pair)
        return product.t()[: len(rows)].reshape(*x.shape[:-1], -1).contiguous()


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


class PackedNorm(RMSNorm):
    """RMSNorm of fp32 in five operations instead of eight."""

    eps_tensor: Tensor

    def __init__(self, source: RMSNorm) -> None:
        super().__init__(len(source.weight), source.eps)
        self.weight = source.weight
        self.register_buffer("eps_tensor", source.weight.new_tensor(source.eps))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self.eps_tensor, length, length, value=1 / x.shape[-1]).rsqrt_()
        return x * scale * self.weight


class FusedEmbedding(TokenEmbedding):
    """TokenEmbedding as two look-ups: what the fusion makes of every s1, and of every s2, is computed once."""

    def __init__(self, source: TokenEmbedding) -> None:
        nn.Module.__init__(self)
        self.emb_s1 = source.emb_s1
        fusion = source.fusion_proj
        coarse, fine = fusion.weight.chunk(2, dim=1)
        self.coarse = nn.Embedding.from_pretrained(F.linear(source.emb_s1.weight * source.scale, coarse, fusion.bias))
        self.fine = nn.Embedding.from_pretrained(F.linear(source.emb_s2.weight * source.scale, fine))

    def forward(self, s1: Tensor, s2: Tensor) -> Tensor:
        return self.coarse(s1) + self.fine(s2)


class PackedDependencyLayer(DependencyLayer):
    """DependencyLayer for generation: k and v of what later bars ask are one product."""

    def __init__(self, source: DependencyLayer, pack: Pack) -> None:
        nn.Module.__init__(self)
        cross = self.cross_attn = source.cross_attn
        self.kv_proj = pack(stacked([cross.k_proj, cross.v_proj]))
        cross.q_proj, cross.out_proj = cast(nn.Linear, pack(cross.q_proj)), cast(nn.Linear, pack(cross.out_proj))
        del cross.k_proj, cross.v_proj
        self.norm = PackedNorm(source.norm)

    def memory(self, context: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.kv_proj(context).unflatten(-1, (2 * self.cross_attn.n_heads, -1)).transpose(1, 2)
        k, v = heads.chunk(2, dim=1)
        return k, v


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

    def project(self, query: Tensor, memory: Tensor, rotary: RotaryTables | None) -> tuple[Tensor, Tensor, Tensor]:
        """As Attention.project; memory is query, and rotary is given. q and k are rotated together."""
        heads = self.qkv_proj(query).unflatten(-1, (3 * self.n_heads, -1)).transpose(1, 2)
        qk, v = heads.split((2 * self.n_heads, self.n_heads), dim=1)
        q, k = rotate(qk, cast(RotaryTables, rotary)).chunk(2, dim=1)
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
    _replace_linears(twin, _pack_for(precision, device, for_compiler, streamed=_is_streamed(twin)))
    return twin


def copies_of_weights(network: nn.Module, precision: str, device: torch.device, compiled: int = 0) -> int:
    """How many times the engine holds a network's weights beside the network itself, at most.

    compiled: steps that are (EngineConfig.compile_rows), each with weights packed for it and those they are made of.
    """
    if device.type != "cpu":
        return 0
    return (2 if precision == "fp32" and _is_streamed(network) else 1) + 2 * compiled


def _is_streamed(network: nn.Module) -> bool:
    weights = sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Linear))
    return weights > STREAMED_WEIGHTS


def _pack_for(precision: str, device: torch.device, for_compiler: bool, *, streamed: bool) -> Pack:
    if precision == "int8":
        return Int8Linear
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and not for_compiler:
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        return lambda linear: PackedLinear(linear, dtype, streamed=streamed)
    return CastLinear if precision == "bf16" else (lambda linear: linear)


def _replace_linears(module: nn.Module, pack: Pack) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, Attention) and isinstance(module, TransformerBlock):
            setattr(module, name, PackedAttention(child, pack))
        elif isinstance(child, FeedForward):
            setattr(module, name, PackedFeedForward(child, pack))
        elif isinstance(child, TokenEmbedding):
            setattr(module, name, FusedEmbedding(child))
        elif isinstance(child, DependencyLayer):
            setattr(module, name, PackedDependencyLayer(child, pack))
        elif isinstance(child, RMSNorm):
            setattr(module, name, PackedNorm(child))
        elif isinstance(child, nn.Linear):
            setattr(module, name, pack(child))
        else:
            _replace_linears(child, pack)
