"""GPT-2 and GPT-BigCode: learned positions, layer norms, dropouts, queries, keys and values from one product.

Source: transformers, models/gpt2/modeling_gpt2.py, GPT2Attention, GPT2MLP, GPT2Block and GPT2Model.forward;
models/gpt_bigcode/modeling_gpt_bigcode.py, the same.
"""

from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.parts import activated
from estimator.operators import add, dropout, split
from estimator.tape import Value


def attention(layer: Layer, hidden: Value, around: Surroundings) -> tuple[Value, Value | None]:
    m, heads = layer.modules, layer.heads()
    sizes = (heads.num_heads, heads.num_key_value_heads, heads.num_key_value_heads)
    query, key, value = split(m.linear("attn.c_attn", hidden), sizes, sum(sizes))
    if layer.handed_out is not None:
        layer.handed_out.append(key.view())
    # GPT-2's softmax is not asked for float32: without autocast it stays in the type of the scores.
    in_float32 = m.tape.autocast_enabled or layer.config.get("multi_query") is not None
    key, value = layer.remember(key, value)
    output, weights = layer.attend_and_weights(
        query, key, value, heads, around, probability=layer.number("attn_pdrop", 0.0), softmax_in_float32=in_float32
    )
    output = m.linear("attn.c_proj", output)
    output = dropout(output, layer.number("resid_pdrop", 0.0))
    return output, weights


def mlp(layer: Layer, hidden: Value) -> Value:
    m = layer.modules
    hidden = m.linear("mlp.c_fc", hidden)
    hidden = activated(layer, hidden)
    hidden = m.linear("mlp.c_proj", hidden)
    return dropout(hidden, layer.number("resid_pdrop", 0.0))


def decoder_layer(layer: Layer, hidden: Value, around: Surroundings) -> Value:
    m, width = layer.modules, layer.integer("hidden_size")
    residual = hidden
    hidden = m.layer_norm("ln_1", hidden, width)
    # Both stay locals of the block to its end.
    attended, weights = attention(layer, hidden, around)
    hidden = add(attended, residual)
    residual = hidden
    hidden = m.layer_norm("ln_2", hidden, width)
    forward = mlp(layer, hidden)
    hidden = add(residual, forward)
    del attended, weights
    return hidden
