"""gpt-oss: attention with a sink per head, experts with biases and a clamped gate.

Source: transformers, models/gpt_oss/modeling_gpt_oss.py; integrations/moe.py, grouped_mm_experts_forward.
"""

from estimator.attention import Heads, by_heads, repeated, scores_extent
from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.moe import adapted, experts_copied, experts_per_token, grouped_product, num_experts, summed_over_choices, top
from estimator.blocks.olmo import rms_norm
from estimator.dtypes import DType
from estimator.extent import Extent
from estimator.kernels import Kernel
from estimator.modules import add_number
from estimator.operators import (
    add,
    batched_product,
    cast,
    clamp,
    clone,
    concatenate,
    dropout,
    gathered,
    linear,
    multiply,
    part,
    promoted,
    saving_output,
    scale,
    softmax,
    split,
    subtract,
)
from estimator.recipe import Attention
from estimator.tape import Gradients, Node, Value


def attention(layer: Layer, hidden: Value, around: Surroundings) -> tuple[Value, Value | None]:
    """Source: GptOssAttention.forward."""
    m, heads = layer.modules, layer.heads()
    query = m.linear("self_attn.q_proj", hidden)
    key = m.linear("self_attn.k_proj", hidden)
    value = m.linear("self_attn.v_proj", hidden)
    query, key = _rotated(query, key, around)
    key, value = layer.remember(key, value)
    probability = layer.number("attention_dropout", 0.0)
    weights: Value | None = None
    if layer.attention is Attention.EAGER:
        mask = around.sliding_mask if layer.layer_type == "sliding_attention" else around.mask
        output, weights = _with_sinks(query, key, value, m.parameter("self_attn.sinks"), mask, heads, probability, one_query=layer.decoding)
    else:
        output, _ = layer.attend_and_weights(query, key, value, heads, around, probability=probability, heads_first=True)
    return m.linear("self_attn.o_proj", output), weights


def _rotated(query: Value, key: Value, around: Surroundings) -> tuple[Value, Value]:
    query_rotated = _halves_rotated(query, around)
    key_rotated = _halves_rotated(key, around)
    return query_rotated, key_rotated


def _halves_rotated(x: Value, around: Surroundings) -> Value:
    """Source: _apply_rotary_emb."""
    cos, sin = around.cos, around.sin
    assert cos is not None
    assert sin is not None
    first, second = split(x, (1, 1), 2)
    first_rotated = subtract(multiply(first, cos), multiply(second, sin))
    second_rotated = add(multiply(second, cos), multiply(first, sin))
    return concatenate([first_rotated, second_rotated])


def _with_sinks(
    query: Value, key: Value, value: Value, sinks: Value, mask: Value | None, heads: Heads, probability: float, *, one_query: bool
) -> tuple[Value, Value]:
    """Eager attention whose softmax has one more column, which nobody attends to.

    Tensors of S + 1 columns are counted with S of them, but for the probabilities, which are kept.

    Source: eager_attention_forward.
    """
    query.tape.kernels.add(Kernel.EAGER)
    key, value = repeated(key, heads.groups), repeated(value, heads.groups)
    weights = scale(batched_product(query, key, scores_extent(query, key, heads)))
    if mask is not None:
        weights = add(weights, mask)
    combined = _joined(weights, sinks)
    combined = subtract(combined, _largest(combined, heads.num_heads))
    probabilities = softmax(combined, combined.dtype)
    column = _saved_column(probabilities, heads.num_heads)
    scores = part(probabilities, 1, 1)
    weights = cast(dropout(scores, probability), value.dtype)
    result = query.extent.scaled(heads.value_head_dim, heads.head_dim)
    output = batched_product(weights, by_heads(value) if heads.groups == 1 else value, result)
    output = output if one_query else clone(output)
    del column, combined
    return output, weights


def _joined(weights: Value, sinks: Value) -> Value:
    """The scores with one more column, the same for every token of a head."""
    extent, sinks_extent = weights.extent, sinks.extent

    def backward(node: Node, gradient: Value) -> Gradients:
        # The column is summed over rows and tokens.
        return [gradient.view(extent), gradient.tape.new(sinks_extent, gradient.dtype)]

    node = weights.tape.node([weights, sinks], backward)
    y = weights.tape.new(extent, promoted(weights.dtype, sinks.dtype))
    y.node = node
    return y


def _largest(x: Value, num_heads: int) -> Value:
    """`x.max(dim=-1).values`: saves the indices; the gradient is written into zeros."""
    before = x.extent

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        result = gradient.tape.new(before, gradient.dtype)
        del saved
        return [result]

    node = x.tape.node([x], backward)
    rows = Extent(num_heads, 1, 1)
    y, indices = x.tape.new(rows, x.dtype), x.tape.new(rows, DType.INT64)
    x.tape.save_output(node, indices)
    y.node = node
    return y


def _saved_column(probabilities: Value, num_heads: int) -> Value:
    """The sink's column of what softmax saved."""
    column = probabilities.tape.new(Extent(num_heads, 1, 1), probabilities.dtype)
    if isinstance(probabilities.node, Node):
        probabilities.tape.save_output(probabilities.node, column)
    return column


def mixture(layer: Layer, hidden: Value) -> tuple[Value, Value]:
    """Source: GptOssMLP.forward and GptOssTopKRouter.forward."""
    m = layer.modules
    width, number, chosen = layer.integer("hidden_size"), num_experts(layer.config), experts_per_token(layer.config)
    weight, factors = adapted(m, "mlp.router.weight")
    logits = linear(hidden, weight, m.parameter("mlp.router.bias"), width, number)
    values, indices = top(logits, number, chosen)
    weights = softmax(values, values.dtype)
    del weight, factors, values
    output = experts(layer, hidden, weights, indices)
    del logits
    return output, weights


def experts(layer: Layer, hidden: Value, weights: Value, indices: Value) -> Value:
    """Source: integrations/moe.py, grouped_mm_experts_forward, with biases."""
    if layer.copies_experts:
        return experts_copied(layer, hidden, weights, layer.integer("intermediate_size"), gate)
    m, tape = layer.modules, hidden.tape
    width, expert_width, chosen = layer.integer("hidden_size"), layer.integer("intermediate_size"), experts_per_token(layer.config)
    pairs = weights.extent
    with tape.recording(False):
        sorted_ids, order = tape.new(pairs, DType.INT64), tape.new(pairs, DType.INT64)
        token_of_pair = tape.new(pairs, DType.INT64)
    selected = gathered(hidden, hidden.extent.scaled(chosen), token_of_pair)
    del token_of_pair
    sorted_weights = gathered(weights, pairs, order)
    counted = tape.new(pairs, DType.INT32)
    offsets = tape.new(Extent(num_experts(layer.config)), DType.INT32)
    gate_up, up_factors = adapted(m, "mlp.experts.gate_up_proj")
    bias = gathered(m.parameter("mlp.experts.gate_up_proj_bias"), pairs.scaled(2 * expert_width), sorted_ids)
    projected = _biased(grouped_product(selected, gate_up, offsets, width, 2 * expert_width), bias)
    projected = gate(projected)
    down, down_factors = adapted(m, "mlp.experts.down_proj")
    bias = gathered(m.parameter("mlp.experts.down_proj_bias"), pairs.scaled(width), sorted_ids)
    projected = _biased(grouped_product(projected, down, offsets, expert_width, width), bias)
    weighted = multiply(projected, sorted_weights)
    inverse = tape.new(pairs, DType.INT64)
    weighted = gathered(weighted, weighted.extent, inverse)
    final = summed_over_choices(weighted, chosen)
    result = cast(final, hidden.dtype)
    del indices, counted, selected, final, gate_up, down, up_factors, down_factors, bias
    return result


def _biased(x: Value, bias: Value) -> Value:
    """`x.add_(bias)`: in place."""

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.view(), gradient.view()]

    node = x.tape.node([x, bias], backward)
    return Value(x.tape, x.extent, x.dtype, x.storage, node)


def gate(gate_up: Value) -> Value:
    """Source: GptOssExperts._apply_gate."""
    gates, up = part(gate_up, 1, 2), part(gate_up, 1, 2)
    gates = clamp(gates)
    up = clamp(up)
    glu = multiply(gates, saving_output(scale(gates)))
    return multiply(add_number(up), glu)


def decoder_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    """Source: GptOssDecoderLayer.forward."""
    m, width = layer.modules, layer.integer("hidden_size")
    residual = hidden
    hidden = rms_norm(m, "input_layernorm", hidden, width)
    hidden, _ = attention(layer, hidden, around)
    hidden = add(residual, hidden)
    residual = hidden
    hidden = rms_norm(m, "post_attention_layernorm", hidden, width)
    # The same local: the attention's weights go when the experts are done.
    hidden, _ = mixture(layer, hidden)
    return add(residual, hidden)
