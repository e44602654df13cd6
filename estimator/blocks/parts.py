"""What several families share: rotary positions and gated MLPs."""

from estimator.blocks.layer import Layer, Surroundings
from estimator.operators import activation, add, concatenate, multiply, negate, part
from estimator.tape import Value


def rotate_half(x: Value) -> Value:
    """(-second half, first half) of each head. Source: transformers, models/llama/modeling_llama.py, rotate_half."""
    first = part(x, 1, 2)
    second = part(x, 1, 2)
    return concatenate([negate(second), first])


def rotated(query: Value, key: Value, around: Surroundings) -> tuple[Value, Value]:
    """Source: transformers, models/llama/modeling_llama.py, apply_rotary_pos_emb."""
    cos, sin = around.cos, around.sin
    assert cos is not None
    assert sin is not None
    query_rotated = add(multiply(query, cos), multiply(rotate_half(query), sin))
    key_rotated = add(multiply(key, cos), multiply(rotate_half(key), sin))
    return query_rotated, key_rotated


def gated_mlp(layer: Layer, x: Value) -> Value:
    """Source: transformers, models/llama/modeling_llama.py, LlamaMLP."""
    m = layer.modules
    return m.linear("mlp.down_proj", multiply(activation(m.linear("mlp.gate_proj", x)), m.linear("mlp.up_proj", x)))
