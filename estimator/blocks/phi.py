"""Phi and Phi-3: rotary positions on a part of each head; Phi-3 joins q, k, v and gate, up into one projection each.

Source: transformers, models/phi/modeling_phi.py and models/phi3/modeling_phi3.py.
"""

from estimator.attention import Heads
from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.parts import activated, partly_rotated, rotary_width, rotate_half
from estimator.blocks.parts import rotated as rotated_whole
from estimator.operators import add, alias, concatenate, dropout, multiply, part, split
from estimator.tape import Value


def attention(layer: Layer, hidden: Value, around: Surroundings) -> tuple[Value, Value | None]:
    """Source: PhiAttention.forward."""
    m = layer.modules
    heads = layer.heads()
    query = m.linear("self_attn.q_proj", hidden)
    key = m.linear("self_attn.k_proj", hidden)
    value = m.linear("self_attn.v_proj", hidden)
    if m.has("self_attn.q_layernorm.weight"):
        query = m.layer_norm("self_attn.q_layernorm", query, heads.head_dim)
        key = m.layer_norm("self_attn.k_layernorm", key, heads.head_dim)
    query, key, held = partly_rotated(query, key, around, rotary_width(layer.config, heads.head_dim), heads.head_dim)
    key, value = layer.remember(key, value)
    output, weights = layer.attend_and_weights(
        query, key, value, heads, around, probability=layer.number("attention_dropout", 0.0), heads_first=True
    )
    output = m.linear("self_attn.dense", output)
    del held
    return output, weights


def mlp(layer: Layer, hidden: Value) -> Value:
    """Source: PhiMLP.forward."""
    m = layer.modules
    hidden = m.linear("mlp.fc1", hidden)
    hidden = activated(layer, hidden)
    return m.linear("mlp.fc2", hidden)


def decoder_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    """Attention and MLP side by side. Source: PhiDecoderLayer.forward."""
    probability = layer.number("resid_pdrop", 0.0)
    residual = hidden
    hidden = layer.modules.layer_norm("input_layernorm", hidden, layer.integer("hidden_size"))
    attended, _ = attention(layer, hidden, around)
    attended = dropout(attended, probability)
    forwarded = dropout(mlp(layer, hidden), probability)
    return add(add(attended, forwarded), residual)


def rotated(x: Value, around: Surroundings, width: int, head_dim: int) -> Value:
    """One of query and key. Source: models/phi3, apply_rotary_pos_emb."""
    cos, sin = around.cos, around.sin
    assert cos is not None
    assert sin is not None
    # A slice of everything is an alias; one of nothing still gets a gradient of the full size.
    rotary = part(x, width, head_dim) if width < head_dim else alias(x)
    rest = part(x, head_dim - width, head_dim)
    return concatenate([add(multiply(rotary, cos), multiply(rotate_half(rotary), sin)), rest])


def fused_attention(layer: Layer, hidden: Value, around: Surroundings) -> tuple[Value, Value | None]:
    """Source: Phi3Attention.forward."""
    m = layer.modules
    heads = layer.heads()
    query_key_value = m.linear("self_attn.qkv_proj", hidden)
    query, key, value = _slices(query_key_value, heads)
    joins = m.recipe.stack.phi3_joins_rotated
    if joins:
        query, key = _rotated(query, key, around, rotary_width(layer.config, heads.head_dim), heads.head_dim)
    else:
        query, key = rotated_whole(query, key, around)
    key, value = layer.remember(key, value)
    output, weights = layer.attend_and_weights(
        query, key, value, heads, around, probability=layer.number("attention_dropout", 0.0), heads_first=joins
    )
    return m.linear("self_attn.o_proj", output), weights


def _slices(query_key_value: Value, heads: Heads) -> tuple[Value, Value, Value]:
    a, k = heads.num_heads, heads.num_key_value_heads
    query, key, value = (part(query_key_value, n, a + 2 * k) for n in (a, k, k))
    return query, key, value


def _rotated(query: Value, key: Value, around: Surroundings, width: int, head_dim: int) -> tuple[Value, Value]:
    query_rotated = rotated(query, around, width, head_dim)
    key_rotated = rotated(key, around, width, head_dim)
    return query_rotated, key_rotated


def fused_mlp(layer: Layer, hidden: Value) -> Value:
    """Source: Phi3MLP.forward."""
    m = layer.modules
    up = m.linear("mlp.gate_up_proj", hidden)
    gate, up = split(up, (1, 1), 2)
    up = multiply(up, activated(layer, gate))
    return m.linear("mlp.down_proj", up)


def fused_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    """Source: Phi3DecoderLayer.forward."""
    m = layer.modules
    width, probability = layer.integer("hidden_size"), layer.number("resid_pdrop", 0.0)
    residual = hidden
    hidden = m.rms_norm("input_layernorm", hidden, width)
    hidden, _ = fused_attention(layer, hidden, around)
    hidden = add(residual, dropout(hidden, probability))
    residual = hidden
    hidden = m.rms_norm("post_attention_layernorm", hidden, width)
    hidden = fused_mlp(layer, hidden)
    return add(residual, dropout(hidden, probability))
