"""KronosTokenizer: normalised candles to pairs of tokens and back."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from torch import Tensor, nn

from model.checkpoint import PretrainedMixin
from model.layers import TransformerBlock, after_each_block, run_blocks
from model.quantizer import TokenQuantizer, bits_to_index, index_to_bits


class KronosTokenizer(PretrainedMixin, nn.Module):
    """Causal transformer autoencoder around a binary spherical quantiser.

    A config of n layers means n − 1 blocks: the published checkpoints count the quantiser's projection as one.
    """

    def __init__(
        self,
        d_in: int,
        d_model: int,
        n_heads: int,
        ff_dim: int,
        n_enc_layers: int,
        n_dec_layers: int,
        ffn_dropout_p: float,
        attn_dropout_p: float,
        resid_dropout_p: float,
        s1_bits: int,
        s2_bits: int,
        beta: float,
        gamma0: float,
        gamma: float,
        zeta: float,
        group_size: int,
    ) -> None:
        super().__init__()
        self.s1_bits, self.s2_bits = s1_bits, s2_bits
        dropouts = (ffn_dropout_p, attn_dropout_p, resid_dropout_p)
        self.embed = nn.Linear(d_in, d_model)
        self.head = nn.Linear(d_model, d_in)
        self.encoder = nn.ModuleList(
            TransformerBlock(d_model, n_heads, ff_dim, *dropouts) for _ in range(n_enc_layers - 1)
        )
        self.decoder = nn.ModuleList(
            TransformerBlock(d_model, n_heads, ff_dim, *dropouts) for _ in range(n_dec_layers - 1)
        )
        self.quant_embed = nn.Linear(d_model, s1_bits + s2_bits)
        self.post_quant_embed_pre = nn.Linear(s1_bits, d_model)
        self.post_quant_embed = nn.Linear(s1_bits + s2_bits, d_model)
        self.tokenizer = TokenQuantizer(s1_bits, s2_bits, beta, gamma0, gamma, zeta, group_size)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, d_in] → (unit vectors, quantised vectors), both [B, T, K]."""
        return self.tokenizer(self.quant_embed(run_blocks(self.encoder, self.embed(x))))

    def _reconstruct(self, embedded: Tensor) -> Tensor:
        """embedded code [B, T, D] → candles [B, T, d_in]."""
        return self.head(run_blocks(self.decoder, embedded))

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
        """The training pass over normalised candles x [B, T, d_in].

        Returns ((reconstruction from s1 alone, reconstruction from both), quantiser loss, quantised vectors [B, T, K],
        index over all bits int64 [B, T]).
        """
        unit, quantized = self._quantize(x)
        from_s1 = self._reconstruct(self.post_quant_embed_pre(quantized[..., : self.s1_bits]))
        from_both = self._reconstruct(self.post_quant_embed(quantized))
        return (from_s1, from_both), self.tokenizer.bsq.loss(unit, quantized), quantized, bits_to_index(quantized)

    def encode(self, x: Tensor, half: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Normalised candles [B, T, d_in] → one index of all bits, or the pair (s1, s2) if half; int64 [B, T]."""
        _, quantized = self._quantize(x)
        return self.tokenizer.tokens(quantized) if half else bits_to_index(quantized)

    def encode_in_shares(self, x: Tensor) -> Generator[None, None, tuple[Tensor, Tensor]]:
        """encode(x, half=True), which pauses after each block."""
        hidden = self.embed(x)
        for after in after_each_block(self.encoder, hidden):
            hidden = after
            yield
        _, quantized = self.tokenizer(self.quant_embed(hidden))
        return self.tokenizer.tokens(quantized)

    def decode(self, x: Any, half: bool = False) -> Tensor:
        """The inverse of encode: int64 [B, T], or the pair (s1, s2) with half=True → candles [B, T, d_in]."""
        if half:
            s1, s2 = x
            quantized = self.tokenizer.vectors(s1, s2)
        else:
            quantized = index_to_bits(x, self.s1_bits + self.s2_bits) * self.tokenizer.bsq.scale
        return self._reconstruct(self.post_quant_embed(quantized))
