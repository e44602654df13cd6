"""Mixture-of-experts layers with fused experts and grouped matrix products: Mixtral, Qwen-MoE, OLMoE.

Routing is taken as balanced; only the sum of the rows matters, which is T·m whatever the balance.

Legend: T tokens, m experts per token, E experts, h hidden size, f width of one expert.

Source: transformers, integrations/moe.py, grouped_mm_experts_forward (the default where the card can); models/mixtral/modeling_mixtral.py,
MixtralTopKRouter and MixtralSparseMoeBlock; models/qwen3_moe/modeling_qwen3_moe.py, models/qwen2_moe/modeling_qwen2_moe.py.
"""

from collections.abc import Callable, Mapping
from functools import partial

from estimator.blocks import llama
from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.parts import activated, gated_mlp, rotated
from estimator.dtypes import DType
from estimator.extent import Extent
from estimator.kernels import Kernel
from estimator.modules import Modules
from estimator.operators import (
    add,
    batched_product,
    cast,
    clamp_in_place,
    gathered,
    linear,
    multiply,
    saving_output,
    scale,
    softmax,
    split,
)
from estimator.tape import Gradients, Node, Value


def experts_per_token(config: Mapping[str, object]) -> int:
    value = config.get("num_experts_per_tok")
    assert isinstance(value, int)
    return value


def num_experts(config: Mapping[str, object]) -> int:
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        value = config.get(name)
        if isinstance(value, int):
            return value
    raise KeyError("number of experts")


def adapted(m: Modules, name: str) -> tuple[Value, list[Value]]:
    """A parameter that is used as such (not through a linear layer), with its adapter folded in: a second tensor of its size.

    Returns:
        The weight to use, and the factors, which stay as long as it does.

    Source: peft, tuners/lora/layer.py, ParamWrapper: _LoraFactorsProxy for stacks of experts, _LoraParameterProxy for the rest.
    """
    weight = m.parameter(name)
    if not m.has(f"{name}.lora_A.weight"):
        return weight, []
    a, b = m.parameter(f"{name}.lora_A.weight"), m.parameter(f"{name}.lora_B.weight")
    if len(m.tensors[name].shape) == 3:
        left, right = cast(b, weight.dtype), cast(a, weight.dtype)
        return _folded(weight, left, right), [left, right]
    delta = cast(scale(batched_product(b, a, weight.extent)), weight.dtype)
    return add(weight, delta), [delta]


def _folded(weight: Value, left: Value, right: Value) -> Value:
    """`torch.baddbmm(weight, left, right)` outside autocast."""
    tape = weight.tape
    extents = left.extent, right.extent
    trained = weight.requires_grad

    def backward(node: Node, gradient: Value) -> Gradients:
        operands = node.unpacked()
        results = [gradient.view() if trained else None, *(tape.new(e, gradient.dtype) for e in extents)]
        del operands
        return results

    node = tape.node([weight, left, right], backward, [right, left])
    y = tape.new(weight.extent, weight.dtype)
    y.node = node
    return y


def grouped_product(x: Value, weight: Value, offsets: Value, fan_in: int, fan_out: int) -> Value:
    """`F.grouped_mm`: the input is cast to the weight's type; what is saved is as for a linear layer. Autocast does not know it.

    Source: transformers, integrations/moe.py, _grouped_mm; torch, derivatives.yaml, _grouped_mm.
    """
    x.tape.kernels.add(Kernel.EXPERTS)
    x = cast(x, weight.dtype)
    x_trained, weight_trained = x.requires_grad, weight.requires_grad
    x_extent, weight_extent = x.extent, weight.extent

    def backward(node: Node, gradient: Value) -> Gradients:
        operands = node.unpacked()
        tape = gradient.tape
        results: list[Value | None] = [None, None]
        if x_trained:
            results[0] = tape.new(x_extent, gradient.dtype)
        if weight_trained:
            results[1] = tape.new(weight_extent, gradient.dtype)
        del operands
        return results

    saved = ([weight] if x_trained else []) + ([x] if weight_trained else []) + [offsets]
    node = x.tape.node([x, weight], backward, saved)
    y = x.tape.new(x.extent.scaled(fan_out, fan_in), x.dtype)
    y.node = node
    return y


def summed_over_choices(x: Value, choices: int) -> Value:
    """Sum over the experts of a token, in float32 under autocast: the gradient, expanded and seen as one row per pair, is copied."""
    dtype = x.dtype

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.tape.new(extent, dtype)]

    extent = x.extent
    node = x.tape.node([x], backward)
    y = x.tape.new(extent.scaled(1, choices), DType.FLOAT32 if x.tape.autocast_enabled else x.dtype)
    y.node = node
    return y


def route(layer: Layer, hidden: Value, *, casts_logits: bool, normalizes: bool, casts_back: bool) -> tuple[Value, Value, list[Value]]:
    """The router: weights and indices of the chosen experts, and what its frame hands out beside them.

    Args:
        casts_logits: whether the logits are cast to float32 before the softmax (else inside it).
        normalizes: whether the chosen weights are divided by their sum, in place.
        casts_back: whether the weights return to the type of the logits.
    """
    m = layer.modules
    width, experts, chosen = layer.integer("hidden_size"), num_experts(layer.config), experts_per_token(layer.config)
    weight, factors = adapted(m, "mlp.gate.weight")
    logits = linear(hidden, weight, None, width, experts)
    probabilities = softmax(cast(logits, DType.FLOAT32)) if casts_logits else softmax(logits, DType.FLOAT32)
    weights, indices = top(probabilities, experts, chosen)
    if normalizes:
        weights = normalized(weights, chosen)
    if casts_back:
        weights = cast(weights, logits.dtype)
    del weight, factors
    return weights, indices, [logits]


def top(x: Value, experts: int, chosen: int) -> tuple[Value, Value]:
    """`torch.topk`: saves the indices."""
    before = x.extent

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        result = gradient.tape.new(before, gradient.dtype)
        del saved
        return [result]

    node = x.tape.node([x], backward)
    extent = x.extent.scaled(chosen, experts)
    values, indices = x.tape.new(extent, x.dtype), x.tape.new(extent, DType.INT64)
    x.tape.save_output(node, indices)
    values.node = node
    return values, indices


def normalized(x: Value, chosen: int) -> Value:
    """`x /= x.sum(-1, keepdim=True)`: in place, so that a copy of the dividend is saved beside the divisor; autocast sums in float32."""
    tape = x.tape
    extent, dtype = x.extent, x.dtype

    def sum_backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.view(extent)]

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        results = [tape.new(extent, dtype), tape.new(extent, dtype)]
        del saved
        return results

    total_node = tape.node([x], sum_backward)
    total = tape.new(extent.scaled(1, chosen), DType.FLOAT32 if tape.autocast_enabled else dtype)
    total.node = total_node
    original = tape.new(extent, dtype)
    node = tape.node([x, total], backward, [total, original])
    return Value(tape, extent, dtype, x.storage, node)


def experts(layer: Layer, hidden: Value, weights: Value, indices: Value, expert_width: int) -> Value:
    """All experts at once on tokens sorted by expert."""
    if layer.copies_experts:
        return experts_copied(layer, hidden, weights, expert_width, partial(gate, layer))
    m = layer.modules
    tape = m.tape
    width, chosen = layer.integer("hidden_size"), experts_per_token(layer.config)
    pairs = weights.extent
    with tape.recording(False):
        sorted_ids, order = tape.new(pairs, DType.INT64), tape.new(pairs, DType.INT64)
        token_of_pair = tape.new(pairs, DType.INT64)
    selected = gathered(hidden, hidden.extent.scaled(chosen), token_of_pair)
    del token_of_pair
    sorted_weights = gathered(weights, pairs, order)
    counted = tape.new(pairs, DType.INT32)
    offsets = tape.new(Extent(num_experts(layer.config)), DType.INT32)
    # Folded weights are cached until the module returns.
    gate_up, up_factors = adapted(m, "mlp.experts.gate_up_proj")
    projected = grouped_product(selected, gate_up, offsets, width, 2 * expert_width)
    projected = gate(layer, projected)
    down, down_factors = adapted(m, "mlp.experts.down_proj")
    projected = grouped_product(projected, down, offsets, expert_width, width)
    weighted = multiply(projected, sorted_weights)
    inverse = tape.new(pairs, DType.INT64)
    weighted = gathered(weighted, weighted.extent, inverse)
    final = summed_over_choices(weighted, chosen)
    result = cast(final, hidden.dtype)
    del sorted_ids, counted, selected, final, gate_up, down, up_factors, down_factors
    return result


def experts_copied(
    layer: Layer,
    hidden: Value,
    weights: Value,
    expert_width: int,
    gate: Callable[[Value], Value],
) -> Value:
    """The weights of every chosen expert are copied for every token: quick for few tokens, and as large as the experts chosen.

    Source: transformers, integrations/moe.py, batched_mm_experts_forward.
    """
    m, tape = layer.modules, layer.modules.tape
    width, chosen = layer.integer("hidden_size"), experts_per_token(layer.config)
    pairs = weights.extent
    selected = tape.new(hidden.extent.scaled(chosen), hidden.dtype)
    gate_up, up_factors = adapted(m, "mlp.experts.gate_up_proj")
    copies = tape.new(pairs.scaled(2 * expert_width * width), gate_up.dtype)
    bias = _copied_bias(m, "mlp.experts.gate_up_proj_bias", pairs.scaled(2 * expert_width))
    projected = gate(tape.new(pairs.scaled(2 * expert_width), copies.dtype))
    down, down_factors = adapted(m, "mlp.experts.down_proj")
    # The same local: the copies of the first weights stay until those of the second are there.
    copies = tape.new(pairs.scaled(width * expert_width), down.dtype)
    bias = _copied_bias(m, "mlp.experts.down_proj_bias", pairs.scaled(width))
    projected = tape.new(pairs.scaled(width), copies.dtype)
    weighted = multiply(projected, weights)
    final = summed_over_choices(weighted, chosen)
    result = cast(final, hidden.dtype)
    del selected, copies, bias, final, gate_up, down, up_factors, down_factors
    return result


def _copied_bias(m: Modules, name: str, extent: Extent) -> Value | None:
    """The bias of each pair of a token and an expert, if there is one. It is added in place."""
    stored = m.optional(name)
    return None if stored is None else m.tape.new(extent, stored.dtype)


def gate(layer: Layer, x: Value) -> Value:
    first, second = split(x, (1, 1), 2)
    return multiply(activated(layer, first), second)


def mixtral_block(layer: Layer, hidden: Value) -> Value:
    weights, indices, _ = route(layer, hidden, casts_logits=True, normalizes=True, casts_back=False)
    return experts(layer, hidden, weights, indices, layer.integer("intermediate_size"))


def qwen_block(layer: Layer, hidden: Value) -> Value:
    """Qwen2-MoE, Qwen3-MoE and OLMoE; Qwen2-MoE adds a gated shared expert."""
    normalizes = bool(layer.config.get("norm_topk_prob"))
    # OLMoE calls it intermediate_size, and takes no notice of the other name
    expert_width = layer.integer("intermediate_size" if layer.model_type == "olmoe" else "moe_intermediate_size")
    m = layer.modules
    if not m.has("mlp.shared_expert.gate_proj.weight"):
        weights, indices, _ = route(layer, hidden, casts_logits=False, normalizes=normalizes, casts_back=True)
        return experts(layer, hidden, weights, indices, expert_width)
    shared = m.linear(
        "mlp.shared_expert.down_proj",
        multiply(activated(layer, m.linear("mlp.shared_expert.gate_proj", hidden)), m.linear("mlp.shared_expert.up_proj", hidden)),
    )
    weights, indices, _ = route(layer, hidden, casts_logits=False, normalizes=normalizes, casts_back=True)
    routed = experts(layer, hidden, weights, indices, expert_width)
    shared = multiply(saving_output(m.linear("mlp.shared_expert_gate", hidden)), shared)
    return add(routed, shared)


def mixtral_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    m, width = layer.modules, layer.integer("hidden_size")
    residual = hidden
    hidden = m.rms_norm("input_layernorm", hidden, width)
    hidden, _ = llama.attention(layer, hidden, around)
    hidden = add(residual, hidden)
    residual = hidden
    hidden = m.rms_norm("post_attention_layernorm", hidden, width)
    hidden = mixtral_block(layer, hidden)
    return add(residual, hidden)


def qwen_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    """Layers without experts have a plain gated MLP."""
    m, width = layer.modules, layer.integer("hidden_size")
    residual = hidden
    hidden = m.rms_norm("input_layernorm", hidden, width)
    hidden, _ = llama.attention(layer, hidden, around)
    hidden = add(residual, hidden)
    residual = hidden
    hidden = m.rms_norm("post_attention_layernorm", hidden, width)
    hidden = qwen_block(layer, hidden) if m.has("mlp.gate.weight") else gated_mlp(layer, hidden)
    return add(residual, hidden)


def olmoe_attention(layer: Layer, hidden: Value, around: Surroundings) -> tuple[Value, Value | None]:
    """Norms over all heads at once. Source: transformers, models/olmoe/modeling_olmoe.py, OlmoeAttention.forward."""
    m, heads = layer.modules, layer.heads()
    query = m.rms_norm("self_attn.q_norm", m.linear("self_attn.q_proj", hidden), heads.num_heads * heads.head_dim)
    key = m.rms_norm("self_attn.k_norm", m.linear("self_attn.k_proj", hidden), heads.num_key_value_heads * heads.head_dim)
    value = m.linear("self_attn.v_proj", hidden)
    if layer.config.get("clip_qkv") is not None:
        query, key, value = clamp_in_place(query), clamp_in_place(key), clamp_in_place(value)
    query, key = rotated(query, key, around)
    key, value = layer.remember(key, value)
    output, weights = layer.attend_and_weights(query, key, value, heads, around, probability=layer.number("attention_dropout", 0.0))
    return m.linear("self_attn.o_proj", output), weights


def olmoe_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    m, width = layer.modules, layer.integer("hidden_size")
    residual = hidden
    hidden = m.rms_norm("input_layernorm", hidden, width)
    hidden, _ = olmoe_attention(layer, hidden, around)
    hidden = add(residual, hidden)
    residual = hidden
    hidden = m.rms_norm("post_attention_layernorm", hidden, width)
    hidden = qwen_block(layer, hidden)
    return add(residual, hidden)
