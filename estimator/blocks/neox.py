"""GPT-NeoX (Pythia): one product for queries, keys and values, partial rotary positions, attention and MLP side by side.

Source: transformers, models/gpt_neox/modeling_gpt_neox.py, GPTNeoXAttention, GPTNeoXMLP and GPTNeoXLayer.
"""

from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.parts import activated, partly_rotated, rotary_width
from estimator.operators import add, dropout, split
from estimator.tape import Value


def attention(layer: Layer, hidden: Value, around: Surroundings) -> tuple[Value, Value | None]:
    m, heads = layer.modules, layer.heads()
    fused = m.linear("attention.query_key_value", hidden)
    query, key, value = split(fused, (1, 1, 1), 3)
    query, key = partly_rotated(query, key, around, rotary_width(layer.config, heads.head_dim), heads.head_dim)[:2]
    key, value = layer.remember(key, value)
    output, weights = layer.attend_and_weights(
        query, key, value, heads, around, probability=layer.number("attention_dropout", 0.0), heads_first=True
    )
    output = m.linear("attention.dense", output)
    del fused  # a local of the attention to its end
    return output, weights


def mlp(layer: Layer, hidden: Value) -> Value:
    m = layer.modules
    # The argument lives as long as the call.
    inner = m.linear("mlp.dense_h_to_4h", hidden)
    inner = activated(layer, inner)
    return m.linear("mlp.dense_4h_to_h", inner)


def decoder_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    m, width = layer.modules, layer.integer("hidden_size")
    probability = layer.number("hidden_dropout", 0.0)
    attended, _ = attention(layer, m.layer_norm("input_layernorm", hidden, width), around)
    attended = dropout(attended, probability)
    if layer.config.get("use_parallel_residual", True):
        forward = dropout(mlp(layer, m.layer_norm("post_attention_layernorm", hidden, width)), probability)
        return add(add(forward, attended), hidden)
    attended = add(attended, hidden)
    forward = dropout(mlp(layer, m.layer_norm("post_attention_layernorm", attended, width)), probability)
    return add(forward, attended)
