"""The published sizes: a change in the networks that alters a parameter count would no longer load their weights."""

import pytest
import torch

from model import Kronos, KronosTokenizer
from model.checkpoint import parameter_count

DROPOUTS = {"ffn_dropout_p": 0.2, "attn_dropout_p": 0.0, "resid_dropout_p": 0.2}


@pytest.mark.parametrize(
    ("n_layers", "d_model", "n_heads", "ff_dim", "parameters"),
    [(4, 256, 4, 512, 4_108_032), (8, 512, 8, 1024, 24_741_376), (12, 832, 16, 2048, 102_310_592)],
    ids=["mini", "small", "base"],
)
def test_model_parameters(n_layers, d_model, n_heads, ff_dim, parameters):
    shape = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "ff_dim": ff_dim}
    with torch.device("meta"):
        model = Kronos(s1_bits=10, s2_bits=10, token_dropout_p=0.0, learn_te=True, **shape, **DROPOUTS)
    assert parameter_count(model) == parameters


@pytest.mark.parametrize("group_size", [4, 5], ids=["base", "2k"])
def test_tokenizer_parameters(group_size):
    loss = {"beta": 0.05, "gamma0": 1.0, "gamma": 1.1, "zeta": 0.05, "group_size": group_size}
    shape = {"d_in": 6, "d_model": 256, "n_heads": 4, "ff_dim": 512, "n_enc_layers": 4, "n_dec_layers": 4}
    with torch.device("meta"):
        tokenizer = KronosTokenizer(s1_bits=10, s2_bits=10, **shape, **loss, **DROPOUTS)
    assert parameter_count(tokenizer) == 3_958_042
