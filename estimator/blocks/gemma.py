"""Gemma, Gemma 2 and Gemma 3: norms that multiply by 1 + weight in float32, and from Gemma 2 on norms after attention and MLP too.

Source: transformers, models/gemma/modeling_gemma.py, models/gemma2/modeling_gemma2.py and models/gemma3/modeling_gemma3.py.
"""

from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.parts import gated_mlp, rotated
from estimator.dtypes import DType
from estimator.modules import Modules, add_number
from estimator.operators import add, cast, heads_ahead, mean, multiply, rsqrt, square
from estimator.tape import Value


def norm(modules: Modules, name: str, x: Value, width: int) -> Value:
    """Everything in float32, the weight's offset included; only the result is cast back.

    Source: transformers, models/gemma/modeling_gemma.py, GemmaRMSNorm.
    """
    output = _normalized(cast(x, DType.FLOAT32), width)
    output = multiply(output, add_number(cast(modules.parameter(f"{name}.weight"), DType.FLOAT32)))
    return cast(output, x.dtype)


def _normalized(x: Value, width: int) -> Value:
    return multiply(x, rsqrt(add_number(mean(square(x), width))))


def attention(layer: Layer, hidden: Value, around: Surroundings) -> tuple[Value, Value | None]:
    m = layer.modules
    heads = layer.heads()
    query = heads_ahead(m.linear("self_attn.q_proj", hidden))
    key = heads_ahead(m.linear("self_attn.k_proj", hidden))
    value = m.linear("self_attn.v_proj", hidden)
    if m.has("self_attn.q_norm.weight"):
        query = norm(m, "self_attn.q_norm", query, heads.head_dim)
        key = norm(m, "self_attn.k_norm", key, heads.head_dim)
    query, key = rotated(query, key, around)
    # Gemma 3 does not hand its soft cap on to the kernel.
    softcap = "self_attn.q_norm.weight" not in m.tensors and layer.config.get("attn_logit_softcapping") is not None
    probability = layer.number("attention_dropout", 0.0)
    key, value = layer.remember(key, value)
    output, weights = layer.attend_and_weights(query, key, value, heads, around, probability=probability, softcap=softcap)
    return m.linear("self_attn.o_proj", output), weights


def decoder_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    """Gemma 1: the order of Llama."""
    m = layer.modules
    width = layer.integer("hidden_size")
    residual = hidden
    hidden = norm(m, "input_layernorm", hidden, width)
    hidden, _ = attention(layer, hidden, around)
    hidden = add(residual, hidden)
    residual = hidden
    hidden = norm(m, "post_attention_layernorm", hidden, width)
    hidden = gated_mlp(layer, hidden)
    return add(residual, hidden)


def sandwich_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    """Gemma 2 and 3: a norm before and a norm after each of attention and MLP."""
    m = layer.modules
    width = layer.integer("hidden_size")
    residual = hidden
    hidden = norm(m, "input_layernorm", hidden, width)
    hidden, _ = attention(layer, hidden, around)
    hidden = norm(m, "post_attention_layernorm", hidden, width)
    hidden = add(residual, hidden)
    residual = hidden
    hidden = norm(m, "pre_feedforward_layernorm", hidden, width)
    hidden = gated_mlp(layer, hidden)
    hidden = norm(m, "post_feedforward_layernorm", hidden, width)
    return add(residual, hidden)
