"""Falcon: one product for queries, keys and values, attention and MLP side by side, an attention mask in every case.

With one key/value head for all queries (the 7 B models) no fused kernel of sdpa takes the unequal heads: attention is written out.

Source: transformers, models/falcon/modeling_falcon.py, FalconAttention, FalconMLP and FalconDecoderLayer.
"""

from collections.abc import Mapping
from dataclasses import replace

from estimator.attention import Heads, flash, memory_efficient, written_out
from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.parts import activated, rotated
from estimator.dtypes import DType
from estimator.extent import Extent
from estimator.operators import add, add_in_place, contiguous_copy, dropout, expanded_view, gathered, part
from estimator.recipe import Attention
from estimator.tape import Value


def refuses(config: Mapping[str, object]) -> str | None:
    """Positions by attention bias and separate heads belong to the RW models."""
    if config.get("alibi"):
        return "alibi positions"
    if not config.get("new_decoder_architecture") and not config.get("multi_query"):
        return "separate key and value heads"
    return None


def _one_head(fused: Value, extent: Extent) -> Value:
    """`fused[..., [-2], :]`: indexing with a list copies."""
    return gathered(fused, extent, fused.tape.new(Extent(1), DType.INT64))


def _split_heads(layer: Layer, fused: Value, heads: Heads) -> tuple[Value, Value, Value]:
    total = heads.num_heads + 2 * heads.num_key_value_heads
    query = part(fused, heads.num_heads, total)
    grouped = fused.extent.scaled(heads.num_key_value_heads, total)
    key, value = _one_head(fused, grouped), _one_head(fused, grouped)
    if not layer.config.get("new_decoder_architecture"):
        return query, key, value
    whole = query.extent
    if heads.num_key_value_heads == 1:  # heads of one group are together as they lie, and seeing one of them many times copies nothing
        return query, expanded_view(key, whole), expanded_view(value, whole)
    copies = [contiguous_copy(x, whole) for x in (query, key, value)]
    query, key, value = copies
    return query, key, value


def attention(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    m, heads = layer.modules, layer.heads()
    fused = m.linear("self_attention.query_key_value", hidden)
    query, key, value = _split_heads(layer, fused, heads)
    if layer.config.get("new_decoder_architecture"):
        heads = replace(heads, num_key_value_heads=heads.num_heads)
    query, key = rotated(query, key, around)
    key, value = layer.remember(key, value)
    output = _kernel(layer, query, key, value, heads, around)
    output = m.linear("self_attention.dense", output)
    del fused
    return output


def _kernel(layer: Layer, query: Value, key: Value, value: Value, heads: Heads, around: Surroundings) -> Value:
    if layer.attention is Attention.EAGER:
        raise NotImplementedError("eager attention of Falcon")
    if layer.attention is not Attention.SDPA:
        return flash(query, key, value, heads, instead_of_float32=layer.flash_instead_of_float32)
    if heads.groups > 1:
        return written_out(query, key, value, heads, mask=around.mask, one_query=layer.decoding, broadcasts=True)
    assert around.mask is not None
    return memory_efficient(query, key, value, around.mask, heads)


def mlp(layer: Layer, hidden: Value) -> Value:
    m = layer.modules
    return m.linear("mlp.dense_4h_to_h", activated(layer, m.linear("mlp.dense_h_to_4h", hidden)))


def decoder_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    m, width = layer.modules, layer.integer("hidden_size")
    probability = layer.number("hidden_dropout", 0.0)
    residual = hidden
    is_new, is_parallel = bool(layer.config.get("new_decoder_architecture")), bool(layer.config.get("parallel_attn"))
    if m.has("ln_attn.weight"):
        normed, mlp_input = m.layer_norm("ln_attn", hidden, width), m.layer_norm("ln_mlp", hidden, width)
        attended = attention(layer, normed, around)
    else:
        mlp_input = normed = m.layer_norm("input_layernorm", hidden, width)
        attended = attention(layer, normed, around)
        if not is_new and not is_parallel:
            residual = add(residual, dropout(attended, layer.number("attention_dropout", 0.0)))
            mlp_input = m.layer_norm("post_attention_layernorm", residual, width)
    output = mlp(layer, mlp_input)
    if is_new or is_parallel:
        output = add_in_place(output, attended)
    return add(residual, dropout(output, probability))
