"""OLMo, OLMo 2 and OLMo 3: rotary positions in float32; a norm without weights, later norms after attention and MLP.

Source: transformers, models/olmo/modeling_olmo.py, models/olmo2/modeling_olmo2.py and models/olmo3/modeling_olmo3.py.
"""

from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.parts import gated_mlp, rotated_in_float32
from estimator.dtypes import DType
from estimator.modules import Modules, add_number
from estimator.operators import add, cast, clamp_in_place, layer_norm, mean, multiply, rsqrt, square
from estimator.tape import Value


def rms_norm(modules: Modules, name: str, x: Value, width: int) -> Value:
    """The weight multiplies in float32, before 4.52 in the input's type. Source: Olmo2RMSNorm.forward."""
    before = x.dtype
    hidden = cast(x, DType.FLOAT32)
    variance = mean(square(hidden), width)
    hidden = multiply(hidden, rsqrt(add_number(variance)))
    weight = modules.parameter(f"{name}.weight")
    if not modules.recipe.stack.olmo2_norm_weighs_in_float32:
        return multiply(weight, cast(hidden, before))
    return cast(multiply(weight, hidden), before)


def plain_norm(x: Value, width: int) -> Value:
    """Source: OlmoLayerNorm.forward."""
    return cast(layer_norm(cast(x, DType.FLOAT32), None, None, width), x.dtype)


def attention(layer: Layer, hidden: Value, around: Surroundings) -> tuple[Value, Value | None]:
    """Source: OlmoAttention.forward; Olmo2Attention.forward for the norms over all heads at once."""
    m = layer.modules
    heads = layer.heads()
    if m.has("self_attn.q_norm.weight"):
        query = rms_norm(m, "self_attn.q_norm", m.linear("self_attn.q_proj", hidden), heads.num_heads * heads.head_dim)
        key = rms_norm(m, "self_attn.k_norm", m.linear("self_attn.k_proj", hidden), heads.num_key_value_heads * heads.head_dim)
    else:
        query = m.linear("self_attn.q_proj", hidden)
        key = m.linear("self_attn.k_proj", hidden)
    value = m.linear("self_attn.v_proj", hidden)
    if layer.config.get("clip_qkv") is not None:
        query, key, value = clamp_in_place(query), clamp_in_place(key), clamp_in_place(value)
    query, key = rotated_in_float32(query, key, around)
    key, value = layer.remember(key, value)
    output, weights = layer.attend_and_weights(query, key, value, heads, around, probability=layer.number("attention_dropout", 0.0))
    return m.linear("self_attn.o_proj", output), weights


def decoder_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    """Source: OlmoDecoderLayer.forward."""
    width = layer.integer("hidden_size")
    residual = hidden
    hidden = plain_norm(hidden, width)
    hidden, _ = attention(layer, hidden, around)
    hidden = add(residual, hidden)
    residual = hidden
    hidden = plain_norm(hidden, width)
    hidden = gated_mlp(layer, hidden)
    return add(residual, hidden)


def post_norm_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    """Source: Olmo2DecoderLayer.forward."""
    m = layer.modules
    width = layer.integer("hidden_size")
    residual = hidden
    hidden, _ = attention(layer, hidden, around)
    hidden = rms_norm(m, "post_attention_layernorm", hidden, width)
    hidden = add(residual, hidden)
    residual = hidden
    hidden = gated_mlp(layer, hidden)
    hidden = rms_norm(m, "post_feedforward_layernorm", hidden, width)
    return add(residual, hidden)
