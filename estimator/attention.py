"""Attention kernels: what each keeps for the backward pass and takes while it runs.

Legend: B micro-batch, S sequence length, T = B·S tokens, a heads, k key/value heads, d head size.
"""

from dataclasses import dataclass, replace

from estimator.dtypes import DType
from estimator.extent import Extent
from estimator.kernels import Kernel
from estimator.operators import (
    add,
    all_lower_precision,
    batched_product,
    cast,
    clone,
    contiguous_copy,
    dropout,
    expanded_view,
    saving_output,
    scale,
    softmax,
)
from estimator.tape import Gradients, Node, Tape, Value


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

    @property
    def fit_grouped_kernels(self) -> bool:
        """Whether transformers hands sdpa grouped heads of these sizes.

        Source: transformers, integrations/sdpa_attention.py, use_gqa_in_sdpa.
        """
        return self.head_dim == self.value_head_dim <= 256


def rounded_head_dim(head_dim: int) -> int:
    """Head size of the flash kernels' float32 accumulators.

    Source: flash-attention, csrc/flash_attn/flash_api.cpp, mha_bwd, head_size_rounded.
    """
    step = 32 if head_dim <= 128 else 64
    return -(-head_dim // step) * step


def scores_extent(query: Value, key: Value, heads: Heads, *, num_key_heads: int | None = None) -> Extent:
    """Scores of every query with every key.

    Args:
        num_key_heads: heads in `key`; as many as in the query if None.
    """
    tokens = query.extent.scaled(1, heads.head_dim)
    per_sequence = key.extent.scaled(1, (num_key_heads or heads.num_heads) * heads.head_dim)
    return tokens.times(per_sequence._replace(batch=0))


def expanded(query: Value, key: Value, value: Value, heads: Heads) -> tuple[Value, Value, Value, Heads]:
    """Key and value heads repeated for all query heads before the kernel."""
    alone = replace(heads, num_key_value_heads=heads.num_heads)
    return query, _spread(key, heads), _spread(value, heads), alone


def _spread(x: Value, heads: Heads) -> Value:
    """Key or value heads for every query head: several are copied, a single one is seen many times.

    Source: transformers, models/llama/modeling_llama.py, repeat_kv: the reshape of an expanded tensor.
    """
    if heads.groups > 1 and heads.num_key_value_heads == 1:
        return expanded_view(x, x.extent.scaled(heads.groups))
    return repeated(x, heads.groups)


def flash(query: Value, key: Value, value: Value, heads: Heads, *, instead_of_float32: DType = DType.FLOAT32) -> Value:
    """Flash attention without a mask: keeps q, k, v, its output and one float32 per head and token.

    Args:
        instead_of_float32: what float32 is cast to outside of autocast, before the kernel is called.

    The backward pass accumulates dq in float32, and for grouped queries expands dk and dv to all heads. Its accumulators are counted for
    the sequence's own length; the kernel rounds that up to 128, so that up to 127 tokens a sequence are missing from them.

    Source: torch, ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_fwd and mha_bwd; flash-attention 2, flash_api.cpp.
    """
    tape = query.tape
    tape.kernels.add(Kernel.FLASH)
    if query.dtype is DType.FLOAT32 and not tape.autocast_enabled:
        query, key, value = (cast(x, instead_of_float32) for x in (query, key, value))
    query, key, value = all_lower_precision(query, key, value)
    extents = [v.extent for v in (query, key, value)]
    tokens = query.extent.scaled(1, heads.num_heads * heads.head_dim)
    per_head = tokens.scaled(heads.num_heads)

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        results = [tape.new(e, gradient.dtype) for e in extents]
        taken = [
            tape.workspace(per_head.scaled(rounded_head_dim(heads.head_dim)), DType.FLOAT32),
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


def scaled_dot_product(
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None,
    heads: Heads,
    compute_capability: tuple[int, int],
    *,
    heads_first: bool = False,
    one_query: bool = False,
) -> Value:
    """`F.scaled_dot_product_attention`: flash where it can, the memory-efficient kernel else, plain operators for grouped heads without
    flash.

    Flash takes 16-bit types from compute capability 8.0 on, no mask, and head sizes up to 256, the same for keys and values; the
    memory-efficient kernel takes no grouped heads.

    Args:
        heads_first: whether the query lies in memory head after head: flash gives its output the same layout, and
            `transpose(1, 2).contiguous()` copies it then.
        one_query: whether there is one for each sequence, which sees all keys; several see none after them, by the kernel's flag, and of a
            longer cache as many keys as there are queries.

    Source: torch, ATen/native/transformers/cuda/sdp_utils.cpp, can_use_flash_attention and can_use_mem_efficient_attention.
    """
    if mask is not None:
        return memory_efficient(query, key, value, mask, heads)
    tape = query.tape
    if not one_query:
        key, value = (x.view(Extent(x.extent.coefficient, 1, 1)) if x.extent.keys else x for x in (key, value))
    dtype = tape.autocast_dtype if tape.autocast_enabled and tape.autocast_dtype is not None else query.dtype
    has_flash = compute_capability >= (8, 0)
    fits_flash = dtype.is_half and heads.head_dim == heads.value_head_dim <= 256
    if has_flash and (fits_flash or not tape.cuda_kernels):
        output = flash(query, key, value, heads)
        return clone(output) if heads_first else output
    if heads.groups == 1:
        return memory_efficient(query, key, value, None, heads)
    return written_out(query, key, value, heads, one_query=one_query)


def written_out(
    query: Value, key: Value, value: Value, heads: Heads, *, mask: Value | None = None, one_query: bool = False, broadcasts: bool = False
) -> Value:
    """sdpa's fallback: everything in float32, scores of S x S per head, keys and values repeated for all heads.

    Args:
        mask: boolean; None where the causal flag does, or one query sees all keys.
        one_query: whether there is one for each sequence.
        broadcasts: whether one key/value head is left to broadcasting, instead of being repeated on request (`enable_gqa`).

    Source: torch, ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math.
    """
    tape = query.tape
    tape.kernels.add(Kernel.WRITTEN_OUT)
    arguments = all_lower_precision(query, key, value)  # autocast holds on to its casts until the call returns
    dtype = arguments[0].dtype
    autocasts, tape.autocast_enabled = tape.autocast_enabled, False
    accumulated = query, key, value = [cast(x, DType.FLOAT32) for x in arguments]
    scaled = scale(query)
    bias = _converted(mask, dtype) if mask is not None else None if one_query else _causal_bias(tape)
    if not broadcasts:
        key, value = repeated(key, heads.groups), repeated(value, heads.groups)
    weights = _scores(scaled, scale(key), heads, broadcasts=broadcasts, one_query=one_query)
    weights = softmax(weights)
    result = query.extent.scaled(heads.value_head_dim, heads.head_dim)
    returned = cast(weights, dtype)  # the weights are handed back too, and made first
    output = cast(batched_product(weights, _broadcast(value, heads.groups) if broadcasts else value, result), dtype)
    tape.autocast_enabled = autocasts
    del arguments, accumulated, scaled, bias, returned
    return output


def _converted(mask: Value, dtype: DType) -> Value:
    """A boolean mask as numbers to add: of every sequence, even where they share the mask.

    Source: torch, ATen/native/transformers/attention.cpp, convert_boolean_attn_mask.
    """
    return mask.tape.new(mask.extent._replace(batch=1), dtype)


def _causal_bias(tape: Tape) -> Value:
    """The triangle of the causal flag, as booleans and then as numbers."""
    triangle = tape.new(Extent(1, 0, 2), DType.BOOL)
    bias = tape.new(Extent(1, 0, 2), DType.FLOAT32)
    del triangle
    return bias


def _scores(query: Value, key: Value, heads: Heads, *, broadcasts: bool, one_query: bool) -> Value:
    """Queries lie token after token: the batched product needs a copy of them."""
    extent = scores_extent(query, key, heads, num_key_heads=heads.num_key_value_heads if broadcasts else None)
    query = query if one_query else by_heads(query)
    return batched_product(query, _broadcast(key, heads.groups) if broadcasts else key, extent)


def _broadcast(x: Value, groups: int) -> Value:
    """One key/value head as a batched product takes it for every query head: copied, but for one sequence seen many times."""
    return expanded_view(x, x.extent.scaled(groups)) if x.tape.one_sequence else repeated(x, groups)


def by_heads(x: Value) -> Value:
    """Heads one after the other, for a batched product: a copy, but of one sequence, whose heads are merely seen as the batch.

    What is saved of a view is all that it was made from.
    """
    return x if x.tape.one_sequence else clone(x)


def repeated(x: Value, groups: int) -> Value:
    """Key or value heads copied for every query head of their group."""
    return x if groups == 1 else contiguous_copy(x, x.extent.scaled(groups))


def memory_efficient(query: Value, key: Value, value: Value, mask: Value | None, heads: Heads) -> Value:
    """sdpa with a mask: key and value are expanded to all heads, and each layer turns the boolean mask into one of its own in the query's
    type.

    Source: transformers, integrations/sdpa_attention.py, use_gqa_in_sdpa; torch, ATen/native/transformers/attention.cpp,
    convert_boolean_attn_mask.
    """
    query, key, value, heads = expanded(query, key, value, heads)
    tape = query.tape
    tape.kernels.add(Kernel.MEMORY_EFFICIENT)
    query, key, value = all_lower_precision(query, key, value)
    extents = [v.extent for v in (query, key, value)]
    per_head = query.extent.scaled(1, heads.head_dim)
    converted = None if mask is None else _converted(mask, query.dtype)
    saved = [query, key, value] if converted is None else [query, key, value, converted]

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        results = [tape.new(e, gradient.dtype) for e in extents]
        taken = [tape.workspace(per_head, DType.FLOAT32), tape.workspace(per_head.scaled(heads.head_dim), DType.FLOAT32)]
        del saved, taken
        return results

    node = tape.node([query, key, value], backward, saved)
    output = tape.new(per_head.scaled(heads.value_head_dim), query.dtype)
    tape.save_output(node, output)
    tape.save_output(node, tape.new(per_head, DType.FLOAT32))
    output.node = node
    del saved, converted  # the mask of its own lives as long as the call, where a checkpoint drops what is saved too
    return output


def eager(
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None,
    heads: Heads,
    *,
    probability: float = 0.0,
    softcap: bool = False,
    in_float32: bool = True,
    queries_first: bool = False,
    keys_first: bool = False,
    values_first: bool = False,
    one_query: bool = False,
) -> tuple[Value, Value]:
    """Attention written out: scores of S x S per head, their softmax and its copy in the query's type.

    Args:
        queries_first, keys_first, values_first: whether they lie in memory head after head, as batched products need them.
        one_query: whether there is one query for each sequence, so that heads and tokens need not change places in the result.

    Returns:
        The output, and the weights, which it hands back too.

    Source: transformers, models/llama/modeling_llama.py, eager_attention_forward (gemma2 adds the soft cap).
    """
    query.tape.kernels.add(Kernel.EAGER)
    # Batched products want heads one after the other: so lie the copies of several key heads, and of others what came heads first.
    copied = heads.groups > 1 and heads.num_key_value_heads > 1
    alone = heads.groups == 1
    scores = scores_extent(query, key, heads, num_key_heads=heads.num_key_value_heads)
    query, key, value, _ = expanded(query, key, value, heads)
    lies_by_heads = copied or (keys_first and alone)
    product = batched_product(query if queries_first else by_heads(query), key if lies_by_heads else by_heads(key), scores)
    weights = scale(product)
    del product
    if softcap:
        weights = scale(weights)
        weights = saving_output(weights)
        weights = scale(weights)
    if mask is not None:
        weights = add(weights, mask)
    weights = cast(softmax(weights, DType.FLOAT32 if in_float32 else None), query.dtype)
    weights = dropout(weights, probability)
    result = query.extent.scaled(heads.value_head_dim, heads.head_dim)
    output = batched_product(weights, value if copied or (values_first and alone) else by_heads(value), result)
    return (output if one_query else clone(output)), weights
