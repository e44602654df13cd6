"""Llama and the families that share its layer: Mistral, Qwen2, Qwen3 and others.

Source: transformers, models/llama/modeling_llama.py, LlamaAttention and LlamaDecoderLayer; models/qwen3/modeling_qwen3.py for the norms of
queries and keys.
"""

from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.parts import gated_mlp, rotated
from estimator.operators import add
from estimator.tape import Value


def attention(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    m = layer.modules
    heads = layer.heads()
    if m.has("self_attn.q_norm.weight"):
        query = m.rms_norm("self_attn.q_norm", m.linear("self_attn.q_proj", hidden), heads.head_dim)
        key = m.rms_norm("self_attn.k_norm", m.linear("self_attn.k_proj", hidden), heads.head_dim)
    else:
        query = m.linear("self_attn.q_proj", hidden)
        key = m.linear("self_attn.k_proj", hidden)
    value = m.linear("self_attn.v_proj", hidden)
    query, key = rotated(query, key, around)
    output = layer.attend(query, key, value, heads, around, probability=layer.number("attention_dropout", 0.0))
    return m.linear("self_attn.o_proj", output)


def decoder_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    m = layer.modules
    width = layer.integer("hidden_size")
    residual = hidden
    hidden = m.rms_norm("input_layernorm", hidden, width)
    hidden = attention(layer, hidden, around)
    hidden = add(residual, hidden)
    residual = hidden
    hidden = m.rms_norm("post_attention_layernorm", hidden, width)
    hidden = gated_mlp(layer, hidden)
    return add(residual, hidden)
