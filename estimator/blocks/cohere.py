"""Cohere's Command R: attention and MLP side by side, layer norms and interleaved rotary positions in float32.

Source: transformers, models/cohere/modeling_cohere.py and models/cohere2/modeling_cohere2.py.
"""

from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.parts import gated_mlp, rotated
from estimator.dtypes import DType
from estimator.modules import Modules, add_number
from estimator.operators import add, cast, mean, multiply, rsqrt, square, subtract
from estimator.tape import Value


def norm(modules: Modules, name: str, x: Value, width: int) -> Value:
    """Source: CohereLayerNorm.forward."""
    before = x.dtype
    hidden = cast(x, DType.FLOAT32)
    average = mean(hidden, width)
    variance = mean(square(subtract(hidden, average)), width)
    hidden = multiply(subtract(hidden, average), rsqrt(add_number(variance)))
    hidden = multiply(cast(modules.parameter(f"{name}.weight"), DType.FLOAT32), hidden)
    return cast(hidden, before)


def rotated_interleaved(query: Value, key: Value, around: Surroundings) -> tuple[Value, Value]:
    """Even and odd elements instead of halves: as large. Source: apply_rotary_pos_emb."""
    before = query.dtype
    query, key = cast(query, DType.FLOAT32), cast(key, DType.FLOAT32)
    query_rotated, key_rotated = rotated(query, key, around)
    return cast(query_rotated, before), cast(key_rotated, before)


def attention(layer: Layer, hidden: Value, around: Surroundings) -> tuple[Value, Value | None]:
    """Source: CohereAttention.forward; Cohere2Attention.forward, which rotates in layers with a window alone."""
    m = layer.modules
    heads = layer.heads()
    query = m.linear("self_attn.q_proj", hidden)
    key = m.linear("self_attn.k_proj", hidden)
    value = m.linear("self_attn.v_proj", hidden)
    if m.has("self_attn.q_norm.weight"):
        query = norm(m, "self_attn.q_norm", query, heads.head_dim)
        key = norm(m, "self_attn.k_norm", key, heads.head_dim)
    if layer.model_type != "cohere2" or layer.layer_type == "sliding_attention":
        query, key = rotated_interleaved(query, key, around)
    key, value = layer.remember(key, value)
    output, weights = layer.attend_and_weights(query, key, value, heads, around, probability=layer.number("attention_dropout", 0.0))
    return m.linear("self_attn.o_proj", output), weights


def decoder_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    """Source: CohereDecoderLayer.forward."""
    residual = hidden
    hidden = norm(layer.modules, "input_layernorm", hidden, layer.integer("hidden_size"))
    attended, _ = attention(layer, hidden, around)
    forwarded = gated_mlp(layer, hidden)
    return add(add(residual, attended), forwarded)
