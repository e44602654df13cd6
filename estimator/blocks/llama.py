"""Llama and the families that share its layer: Mistral, Qwen2, Qwen3, Granite, SmolLM3 and others.

Source: transformers, models/llama/modeling_llama.py, LlamaAttention and LlamaDecoderLayer; models/qwen3/modeling_qwen3.py for the norms of
queries and keys; models/smollm3/modeling_smollm3.py for layers without rotation.
"""

from collections.abc import Mapping

from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.parts import gated_mlp, rotated
from estimator.operators import add, heads_ahead, scale
from estimator.tape import Value


def rotates(config: Mapping[str, object], index: int) -> bool:
    """Whether the layer has rotary positions. Source: SmolLM3Attention, use_rope."""
    flags = config.get("no_rope_layers")
    return bool(flags[index]) if isinstance(flags, (list, tuple)) and index < len(flags) else True


def attention(layer: Layer, hidden: Value, around: Surroundings) -> tuple[Value, Value | None]:
    m = layer.modules
    heads = layer.heads()
    has_rotation = rotates(layer.config, layer.index)
    has_norms = m.has("self_attn.q_norm.weight")
    query = m.linear("self_attn.q_proj", hidden)
    query = heads_ahead(query) if has_rotation else query
    query = m.rms_norm("self_attn.q_norm", query, heads.head_dim) if has_norms else query
    key = m.linear("self_attn.k_proj", hidden)
    key = heads_ahead(key) if has_rotation else key
    key = m.rms_norm("self_attn.k_norm", key, heads.head_dim) if has_norms else key
    value = m.linear("self_attn.v_proj", hidden)
    if has_rotation:
        query, key = rotated(query, key, around)
    key, value = layer.remember(key, value)
    output, weights = layer.attend_and_weights(query, key, value, heads, around, probability=layer.number("attention_dropout", 0.0))
    return m.linear("self_attn.o_proj", output), weights


def decoder_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    m = layer.modules
    width = layer.integer("hidden_size")
    residual = hidden
    hidden = m.rms_norm("input_layernorm", hidden, width)
    hidden, _ = attention(layer, hidden, around)
    hidden = add(residual, hidden)
    residual = hidden
    hidden = m.rms_norm("post_attention_layernorm", hidden, width)
    hidden = gated_mlp(layer, hidden)
    return add(residual, hidden)


def scaled_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    """What is added to the residual is scaled first. Source: transformers, models/granite/modeling_granite.py,
    GraniteDecoderLayer.forward."""
    m = layer.modules
    width = layer.integer("hidden_size")
    residual = hidden
    hidden = m.rms_norm("input_layernorm", hidden, width)
    hidden, _ = attention(layer, hidden, around)
    hidden = add(residual, scale(hidden))
    residual = hidden
    hidden = m.rms_norm("post_attention_layernorm", hidden, width)
    hidden = gated_mlp(layer, hidden)
    return add(residual, scale(hidden))
