"""DeepSeek V2 and V3, and GLM-4-MoE, which has their experts: latent attention, grouped routers, shared experts.

Legend: n head elements without, r with rotary positions, v head size of the values, l size of the latent.

Source: transformers 5.23, models/deepseek_v3/modeling_deepseek_v3.py, models/deepseek_v2/modeling_deepseek_v2.py and
models/glm4_moe/modeling_glm4_moe.py.
"""

from estimator.attention import Heads
from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.moe import adapted, experts, experts_per_token, normalized, num_experts, top
from estimator.blocks.parts import gated_mlp, rotary_width, rotated
from estimator.dtypes import DType
from estimator.modules import add_number
from estimator.operators import (
    add,
    alias,
    cast,
    concatenate,
    linear,
    masked_fill,
    multiply,
    part,
    saving_output,
    scale,
    softmax,
    split,
    subtract,
)
from estimator.tape import Gradients, Node, Value


def _heads(layer: Layer) -> Heads:
    number = layer.integer("num_attention_heads")
    head_dim = layer.integer("qk_nope_head_dim") + layer.integer("qk_rope_head_dim")
    return Heads(num_heads=number, num_key_value_heads=number, head_dim=head_dim, value_head_dim=layer.integer("v_head_dim"))


def latent_attention(layer: Layer, hidden: Value, around: Surroundings) -> tuple[Value, Value | None]:
    """Keys and values come from a small latent; a part of each key is shared by all heads and rotated.

    Source: DeepseekV3Attention.forward; DeepseekV2Attention.forward, which rotates complex numbers.
    """
    m, heads = layer.modules, _heads(layer)
    nope, rope, latent = layer.integer("qk_nope_head_dim"), layer.integer("qk_rope_head_dim"), layer.integer("kv_lora_rank")
    query = _query(layer, hidden)
    query_pass, query_rotary = split(query, (nope, rope), nope + rope)
    compressed = m.linear("self_attn.kv_a_proj_with_mqa", hidden)
    compact, key_rotary = split(compressed, (latent, rope), latent + rope)
    compact = m.rms_norm("self_attn.kv_a_layernorm", compact, latent)
    if around.sin is None:
        query_rotary, key_rotary = _rotated_complex(query_rotary, key_rotary, around)
    elif layer.config.get("rope_interleave", True):
        query_rotary, key_rotary = _rotated_interleaved(query_rotary, key_rotary, around)
    else:
        query_rotary, key_rotary = rotated(query_rotary, key_rotary, around)
    compressing = not layer.modules.recipe.stack.caches_expanded_latents
    if compressing:
        compact, key_rotary = layer.remember(compact, key_rotary)
    whole_query = concatenate([query_pass, query_rotary])
    key, value = _expanded(layer, compact, key_rotary, heads)
    if not compressing:
        key, value = layer.remember(key, value)
    probability = layer.number("attention_dropout", 0.0)
    output, weights = layer.attend_and_weights(whole_query, key, value, heads, around, probability=probability, heads_first=True)
    output = m.linear("self_attn.o_proj", output)
    del query, compressed
    return output, weights


def _query(layer: Layer, hidden: Value) -> Value:
    m = layer.modules
    if m.has("self_attn.q_proj.weight"):
        return m.linear("self_attn.q_proj", hidden)
    rank = layer.integer("q_lora_rank")
    return m.linear("self_attn.q_b_proj", m.rms_norm("self_attn.q_a_layernorm", m.linear("self_attn.q_a_proj", hidden), rank))


def _rotated_interleaved(query: Value, key: Value, around: Surroundings) -> tuple[Value, Value]:
    """Pairs of neighbours are rotated with half of cos and sin. Source: apply_rotary_pos_emb_interleave."""
    assert around.cos is not None
    assert around.sin is not None
    cos, sin = part(around.cos, 1, 2), part(around.sin, 1, 2)
    query_even, query_odd = part(query, 1, 2), part(query, 1, 2)
    key_even, key_odd = part(key, 1, 2), part(key, 1, 2)
    query_rotated = _pairs_rotated(query_even, query_odd, cos, sin)
    key_rotated = _pairs_rotated(key_even, key_odd, cos, sin)
    return query_rotated, key_rotated


def _pairs_rotated(even: Value, odd: Value, cos: Value, sin: Value) -> Value:
    return concatenate([subtract(multiply(even, cos), multiply(odd, sin)), add(multiply(odd, cos), multiply(even, sin))])


def _rotated_complex(query: Value, key: Value, around: Surroundings) -> tuple[Value, Value]:
    """A complex number is two float32. Source: models/deepseek_v2, apply_rotary_emb."""
    frequencies = around.cos
    assert frequencies is not None
    query_complex, key_complex = cast(query, DType.FLOAT32), cast(key, DType.FLOAT32)
    query_rotated = cast(multiply(query_complex, frequencies), query.dtype)
    key_rotated = cast(multiply(key_complex, frequencies), key.dtype)
    return query_rotated, key_rotated


def _expanded(layer: Layer, latent: Value, rotary: Value, heads: Heads) -> tuple[Value, Value]:
    """Keys and values of all heads; keys are copied into a new tensor part by part. Source: expand_kv."""
    nope, value_dim = layer.integer("qk_nope_head_dim"), heads.value_head_dim
    together = layer.modules.linear("self_attn.kv_b_proj", latent)
    key_pass, value = split(together, (nope, value_dim), nope + value_dim)
    rotary = _shared_by_heads(rotary, heads.num_heads)
    key = together.tape.new(together.extent.scaled(heads.head_dim, nope + value_dim), together.dtype)
    key = _copied_into(key, key_pass)
    key = _copied_into(key, rotary)
    return key, value


def _shared_by_heads(x: Value, num_heads: int) -> Value:
    """`x.expand(…)`: a view; its gradient is summed over heads."""

    def backward(node: Node, gradient: Value) -> Gradients:
        return [gradient.view()]

    node = x.tape.node([x], backward)
    y = x.view(x.extent.scaled(num_heads))
    y.node = node
    return y


def _copied_into(whole: Value, x: Value) -> Value:
    """`whole[…, a:b].copy_(x)`: the gradient of the whole is copied, and zeroed where `x` went.

    Source: torch, csrc/autograd/functions/tensor.cpp, CopySlices::apply.
    """
    extent = x.extent
    overwritten = whole.requires_grad

    def backward(node: Node, gradient: Value) -> Gradients:
        tape = gradient.tape
        rest = tape.new(gradient.extent, gradient.dtype)
        piece = tape.new(extent, gradient.dtype)
        zeros = tape.new(extent, gradient.dtype) if overwritten else None
        del zeros
        return [rest if overwritten else None, piece]

    node = whole.tape.node([whole, x], backward)
    return Value(whole.tape, whole.extent, whole.dtype, whole.storage, node)


def route(layer: Layer, hidden: Value) -> tuple[Value, Value, Value]:
    """Sigmoid scores; the experts of some groups are chosen by biased scores, and weighted by their own.

    Returns:
        Logits, weights and indices of the chosen experts.

    Source: DeepseekV3TopkRouter.forward.
    """
    logits = _router_logits(layer, hidden)
    number, chosen = num_experts(layer.config), experts_per_token(layer.config)
    scores = saving_output(logits)
    biased = cast(add_number(scores), DType.FLOAT32)
    with biased.tape.recording(False):
        mask = biased.tape.new(biased.extent, DType.BOOL)
        biased = masked_fill(biased, mask)
        indices = biased.tape.new(logits.extent.scaled(chosen, number), DType.INT64)
    weights = _picked(scores, indices)
    if layer.config.get("norm_topk_prob"):
        weights = normalized(weights, chosen)
    weights = scale(weights)
    del mask, biased
    return logits, weights, indices


def route_softmax(layer: Layer, hidden: Value) -> tuple[Value, Value, Value]:
    """Source: DeepseekV2TopkRouter.forward."""
    logits = _router_logits(layer, hidden)
    number, chosen = num_experts(layer.config), experts_per_token(layer.config)
    scores = softmax(logits, DType.FLOAT32)
    if layer.config.get("topk_method") == "group_limited_greedy":
        scores = masked_fill(scores, scores.tape.new(scores.extent, DType.BOOL))
    weights, indices = top(scores, number, chosen)
    weights = scale(weights)
    return logits, weights, indices


def _router_logits(layer: Layer, hidden: Value) -> Value:
    """Cast to float32 first; autocast casts back to its own type."""
    weight, factors = adapted(layer.modules, "mlp.gate.weight")
    width = layer.integer("hidden_size")
    logits = linear(cast(hidden, DType.FLOAT32), cast(weight, DType.FLOAT32), None, width, num_experts(layer.config))
    del weight, factors
    return logits


def _picked(x: Value, indices: Value) -> Value:
    """`x.gather(1, indices)`: saves both."""
    before = x.extent

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        result = gradient.tape.new(before, gradient.dtype)
        del saved
        return [result]

    node = x.tape.node([x], backward, [x, indices])
    y = x.tape.new(indices.extent, x.dtype)
    y.node = node
    return y


def mixture(layer: Layer, hidden: Value) -> Value:
    """Routed experts and the shared one. Source: DeepseekV3MoE.forward."""
    router = route_softmax if layer.model_type == "deepseek_v2" else route
    logits, weights, indices = router(layer, hidden)
    routed = experts(layer, hidden, weights, indices, layer.integer("moe_intermediate_size"))
    output = add(routed, gated_mlp(layer, hidden, "mlp.shared_experts"))
    del logits
    return output


def decoder_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    """The first layers have a plain MLP. Source: DeepseekV3DecoderLayer.forward."""
    m, width = layer.modules, layer.integer("hidden_size")
    attend = latent_attention if m.has("self_attn.kv_b_proj.weight") else attention
    residual = hidden
    hidden = m.rms_norm("input_layernorm", hidden, width)
    hidden, _ = attend(layer, hidden, around)
    hidden = add(residual, hidden)
    residual = hidden
    hidden = m.rms_norm("post_attention_layernorm", hidden, width)
    hidden = mixture(layer, hidden) if m.has("mlp.gate.weight") else gated_mlp(layer, hidden)
    return add(residual, hidden)


def attention(layer: Layer, hidden: Value, around: Surroundings) -> tuple[Value, Value | None]:
    """GLM: a part of each head is rotated. Source: Glm4MoeAttention.forward."""
    m, heads = layer.modules, layer.heads()
    query = m.linear("self_attn.q_proj", hidden)
    key = m.linear("self_attn.k_proj", hidden)
    value = m.linear("self_attn.v_proj", hidden)
    if m.has("self_attn.q_norm.weight"):
        query = m.rms_norm("self_attn.q_norm", query, heads.head_dim)
        key = m.rms_norm("self_attn.k_norm", key, heads.head_dim)
    query, key = _partly_rotated(query, key, around, rotary_width(layer.config, heads.head_dim), heads.head_dim)
    probability = layer.number("attention_dropout", 0.0)
    key, value = layer.remember(key, value)
    output, weights = layer.attend_and_weights(query, key, value, heads, around, probability=probability, heads_first=True)
    return m.linear("self_attn.o_proj", output), weights


def _partly_rotated(query: Value, key: Value, around: Surroundings, width: int, head_dim: int) -> tuple[Value, Value]:
    """Source: models/glm4_moe, apply_rotary_pos_emb."""
    query_rotary, query_rest = _slices(query, width, head_dim)
    key_rotary, key_rest = _slices(key, width, head_dim)
    query_rotated, key_rotated = rotated(query_rotary, key_rotary, around)
    query_rotated = concatenate([query_rotated, query_rest])
    key_rotated = concatenate([key_rotated, key_rest])
    return query_rotated, key_rotated


def _slices(x: Value, width: int, head_dim: int) -> tuple[Value, Value]:
    # A slice of everything is an alias; one of nothing still gets a gradient of the full size.
    return part(x, width, head_dim) if width < head_dim else alias(x), part(x, head_dim - width, head_dim)
