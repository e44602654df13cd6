"""What several families share: rotary positions and gated MLPs."""

from collections.abc import Mapping

from estimator.blocks.layer import Layer, Surroundings
from estimator.modules import add_number
from estimator.operators import activation, add, cast, concatenate, multiply, negate, part, power, saving_output, scale
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


def rotated_in_float32(query: Value, key: Value, around: Surroundings) -> tuple[Value, Value]:
    """With cos and sin in float32 the products are float32 too, and cast back at the end.

    Source: transformers, models/olmo2/modeling_olmo2.py, apply_rotary_pos_emb.
    """
    query_rotated, key_rotated = rotated(query, key, around)
    return cast(query_rotated, query.dtype), cast(key_rotated, key.dtype)


def rotary_width(config: Mapping[str, object], head_dim: int) -> int:
    """How many elements of each head are rotated. Source: transformers, modeling_rope_utils.py, `partial_rotary_factor`."""
    parameters = config.get("rope_parameters")
    share = parameters.get("partial_rotary_factor") if isinstance(parameters, Mapping) else None
    if share is None:
        share = config.get("partial_rotary_factor")
    return int(head_dim * share) if isinstance(share, (int, float)) else head_dim


def partly_rotated(query: Value, key: Value, around: Surroundings, width: int, head_dim: int) -> tuple[Value, Value, tuple[Value, ...]]:
    """The first `width` elements of each head are rotated, the rest joined to them.

    Returns:
        Query, key, and the pieces, which the attention's frame holds on to.

    Source: transformers, models/phi/modeling_phi.py, PhiAttention.forward.
    """
    query_rotary, query_rest = part(query, width, head_dim), part(query, head_dim - width, head_dim)
    key_rotary, key_rest = part(key, width, head_dim), part(key, head_dim - width, head_dim)
    query_rotary, key_rotary = rotated(query_rotary, key_rotary, around)
    query_rotated = concatenate([query_rotary, query_rest])
    key_rotated = concatenate([key_rotary, key_rest])
    return query_rotated, key_rotated, (query_rotary, query_rest, key_rotary, key_rest)


# Gemma's configs hold both of the first two, and its MLP reads the first.
_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function")


def activated(layer: Layer, x: Value) -> Value:
    """The activation of an MLP: one operator, but for `gelu_new` and `gelu_fast`, which are written out.

    Source: transformers, activations.py, ACT2FN, NewGELUActivation and FastGELUActivation.
    """
    kind = next((found for name in _ACTIVATIONS if (found := layer.config.get(name))), None)
    match kind:
        case "gelu" | "gelu_pytorch_tanh" | "silu" | "swish":
            return activation(x)
        case "relu":
            return saving_output(x)
        case "gelu_new":
            return multiply(scale(x), add_number(saving_output(scale(add(x, scale(power(x)))))))
        case "gelu_fast":
            inner = multiply(scale(x), add_number(multiply(scale(x), x)))
            return multiply(scale(x), add_number(saving_output(inner)))
    raise NotImplementedError(f"activation {kind!r}")


def gated_mlp(layer: Layer, x: Value, name: str = "mlp") -> Value:
    """Source: transformers, models/llama/modeling_llama.py, LlamaMLP."""
    m = layer.modules
    return m.linear(f"{name}.down_proj", multiply(activated(layer, m.linear(f"{name}.gate_proj", x)), m.linear(f"{name}.up_proj", x)))
