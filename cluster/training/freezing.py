"""What a finetune of depth 1 to 5 trains. The rest of the network keeps the parent's weights, bit for bit.

| depth | predictor | tokenizer |
|---|---|---|
| 1 | both heads | the output layer |
| 2 | + last block, final norm, dependency layer | + last decoder block |
| 3 | + the upper half of the blocks | + the decoder whole; up to here the codes stay as they are |
| 4 | + all blocks | + last encoder block and the projection to the code |
| 5 | + embeddings: everything | everything |
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from model.kronos import Kronos
from model.tokenizer import KronosTokenizer


def freeze(network: nn.Module, depth: int) -> None:
    """Turns off the gradient of all that lies deeper, in place. depth: 1 to 5, as in the table above."""
    trained = {id(p) for module in _levels(network)[:depth] for part in module for p in part.parameters()}
    if depth < 5:
        for parameter in network.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)


def _levels(network: nn.Module) -> list[Iterable[nn.Module]]:
    """What each of the depths 1 to 4 adds."""
    if isinstance(network, Kronos):
        blocks = list(network.transformer)
        return [
            [network.head],
            [*blocks[-1:], network.norm, network.dep_layer],
            blocks[len(blocks) // 2 :],
            blocks,
        ]
    if isinstance(network, KronosTokenizer):
        return [
            [network.head],
            list(network.decoder)[-1:],
            [network.decoder, network.post_quant_embed, network.post_quant_embed_pre],
            [*list(network.encoder)[-1:], network.quant_embed],
        ]
    raise TypeError(f"no levels for {type(network).__name__}")


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]
