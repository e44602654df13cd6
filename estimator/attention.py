"""Attention kernels: what each keeps for the backward pass and takes while it runs.

Legend: B micro-batch, S sequence length, T = B·S tokens, a heads, k key/value heads, d head size.
"""

from dataclasses import dataclass

from estimator.dtypes import DType
from estimator.operators import (
    add,
    batched_product,
    cast,
    clone,
    contiguous_copy,
    dropout,
    lower_precision,
    saving_output,
    scale,
    softmax,
)
from estimator.tape import Extent, Gradients, Node, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Sizes of one attention layer."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    value_head_dim: int

    @property
    def groups(self) -> int:
        return self.num_heads // self.num_key_value_heads


def _rounded_head_dim(head_dim: int) -> int:
    """Head size of the flash kernels' float32 accumulators.

    Source: flash-attention, csrc/flash_attn/flash_api.cpp, mha_bwd, head_size_rounded.
    """
    step = 32 if head_dim <= 128 else 64
    return -(-head_dim // step) * step


def flash(query: Value, key: Value, value: Value, heads: Heads) -> Value:
    """Flash attention without a mask: keeps q, k, v, its output and one float32 per head and token.

    The backward pass accumulates dq in float32, and for grouped queries expands dk and dv to all heads.

    Source: torch, ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_fwd and mha_bwd; flash-attention 2, flash_api.cpp.
    """
    tape = query.tape
    query, key, value = lower_precision(query), lower_precision(key), lower_precision(value)
    extents = [v.extent for v in (query, key, value)]
    tokens = query.extent.scaled(1, heads.num_heads * heads.head_dim)
    per_head = tokens.scaled(heads.num_heads)

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        results = [tape.new(e, gradient.dtype) for e in extents]
        taken = [
            tape.workspace(per_head.scaled(_rounded_head_dim(heads.head_dim)), DType.FLOAT32),
            tape.workspace(per_head, DType.FLOAT32),
        ]
        if heads.groups > 1:
            taken += [tape.workspace(per_head.scaled(heads.head_dim), gradient.dtype) for _ in range(2)]
        del saved, taken
        return results

    node = tape.node([query, key, value], backward, [query, key, value])
    output = tape.new(per_head.scaled(heads.value_head_dim), query.dtype)
    tape.save_output(node, output)
    tape.save_output(node, tape.new(per_head, DType.FLOAT32))
    output.node = node
    return output


def _repeated(x: Value, groups: int) -> Value:
    """Key or value heads copied for every query head of their group."""
    return x if groups == 1 else contiguous_copy(x, x.extent.scaled(groups))


def memory_efficient(query: Value, key: Value, value: Value, mask: Value, heads: Heads) -> Value:
    """sdpa with a mask: key and value are expanded to all heads, and each layer turns the boolean mask into one of its own in the query's type.

    Source: transformers, integrations/sdpa_attention.py, use_gqa_in_sdpa; torch, ATen/native/transformers/attention.cpp,
    convert_boolean_attn_mask.
    """
    key, value = _repeated(key, heads.groups), _repeated(value, heads.groups)
    tape = query.tape
    query, key, value = lower_precision(query), lower_precision(key), lower_precision(value)
    extents = [v.extent for v in (query, key, value)]
    per_head = query.extent.scaled(1, heads.head_dim)
    bias = tape.new(mask.extent, query.dtype)

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        results = [tape.new(e, gradient.dtype) for e in extents]
        taken = [tape.workspace(per_head, DType.FLOAT32), tape.workspace(per_head.scaled(heads.head_dim), DType.FLOAT32)]
        del saved, taken
        return results

    node = tape.node([query, key, value], backward, [query, key, value, bias])
    output = tape.new(per_head.scaled(heads.value_head_dim), query.dtype)
    tape.save_output(node, output)
    tape.save_output(node, tape.new(per_head, DType.FLOAT32))
    output.node = node
    return output


def eager(query: Value, key: Value, value: Value, mask: Value | None, heads: Heads, *, probability: float = 0.0, softcap: bool = False) -> Value:
    """Attention written out: scores of S x S per head, their float32 softmax and its copy in the query's type.

    Source: transformers, models/llama/modeling_llama.py, eager_attention_forward (gemma2 adds the soft cap).
    """
    key, value = _repeated(key, heads.groups), _repeated(value, heads.groups)
    scores = Extent(heads.num_heads, 1, 2)
    # Heads lie between tokens and head size in memory: batched products need a copy.
    if heads.groups == 1:
        weights = scale(batched_product(clone(query), clone(key), scores))
    else:
        weights = scale(batched_product(clone(query), key, scores))
    if softcap:
        weights = _softcapped(weights)
    if mask is not None:
        weights = add(weights, mask)
    weights = cast(softmax(weights, DType.FLOAT32), query.dtype)
    weights = dropout(weights, probability)
    result = query.extent.scaled(heads.value_head_dim, heads.head_dim)
    output = batched_product(weights, clone(value) if heads.groups == 1 else value, result)
    return clone(output)


def _softcapped(weights: Value) -> Value:
    weights = scale(weights)
    weights = saving_output(weights)
    return scale(weights)
