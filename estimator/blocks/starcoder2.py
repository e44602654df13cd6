"""StarCoder2: Llama's attention between layer norms, an MLP without gate, dropout on both residual branches.

Source: transformers, models/starcoder2/modeling_starcoder2.py, Starcoder2Attention, Starcoder2MLP and Starcoder2DecoderLayer.
"""

from estimator.blocks import llama
from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.parts import activated
from estimator.operators import add, dropout
from estimator.tape import Value


def mlp(layer: Layer, hidden: Value) -> Value:
    m = layer.modules
    hidden = m.linear("mlp.c_fc", hidden)
    hidden = activated(layer, hidden)
    return m.linear("mlp.c_proj", hidden)


def decoder_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    m, width = layer.modules, layer.integer("hidden_size")
    probability = layer.number("residual_dropout", 0.0)
    residual = hidden
    hidden = m.layer_norm("input_layernorm", hidden, width)
    hidden, _ = llama.attention(layer, hidden, around)
    hidden = dropout(hidden, probability)
    hidden = add(residual, hidden)
    residual = hidden
    hidden = m.layer_norm("post_attention_layernorm", hidden, width)
    hidden = dropout(mlp(layer, hidden), probability)
    return add(residual, hidden)
