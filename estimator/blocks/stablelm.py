"""StableLM: layer norms around Llama's parts, rotary positions on a part of each head.

Source: transformers, models/stablelm/modeling_stablelm.py.
"""

from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.parts import gated_mlp, partly_rotated, rotary_width
from estimator.operators import add, dropout
from estimator.tape import Value


def attention(layer: Layer, hidden: Value, around: Surroundings) -> tuple[Value, Value | None]:
    """Source: StableLmAttention.forward."""
    m = layer.modules
    heads = layer.heads()
    query = m.linear("self_attn.q_proj", hidden)
    key = m.linear("self_attn.k_proj", hidden)
    value = m.linear("self_attn.v_proj", hidden)
    query, key, held = partly_rotated(query, key, around, rotary_width(layer.config, heads.head_dim), heads.head_dim)
    key, value = layer.remember(key, value)
    output, weights = layer.attend_and_weights(
        query, key, value, heads, around, probability=layer.number("attention_dropout", 0.0), heads_first=True
    )
    output = m.linear("self_attn.o_proj", output)
    del held
    return output, weights


def decoder_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    """Source: StableLmDecoderLayer.forward."""
    m = layer.modules
    width, probability = layer.integer("hidden_size"), layer.number("hidden_dropout", 0.0)
    residual = hidden
    hidden = m.layer_norm("input_layernorm", hidden, width)
    attended, _ = attention(layer, hidden, around)
    if layer.config.get("use_parallel_residual"):
        forwarded = gated_mlp(layer, hidden)
        forwarded = dropout(forwarded, probability)
        return add(add(residual, attended), forwarded)
    residual = add(residual, attended)
    forwarded = gated_mlp(layer, m.layer_norm("post_attention_layernorm", residual, width))
    forwarded = dropout(forwarded, probability)
    return add(residual, forwarded)
