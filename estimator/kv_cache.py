"""Keys and values kept while text is generated, and what one decoding step adds.

Legend: B sequences, P prompt length, N new tokens, L layers, k key/value heads, d head size, V vocabulary, h hidden size.
"""

from estimator.blocks.families import head_dim
from estimator.dtypes import DType
from estimator.inventory import Inventory
from estimator.phases import Item
from estimator.recipe import CacheKind, Inference, Recipe
from estimator.units import allocated

# What a decoding step holds beside cache and logits: a few vectors of the MLP's width per sequence.
_WIDE_VECTORS = 4


def is_cache_modelled(inventory: Inventory) -> bool:
    """Whether every layer of the model is attention with keys and values (or a latent) of known size."""
    types = inventory.config.get("layer_types")
    if not isinstance(types, (list, tuple)):
        return True
    return set(map(str, types)) <= {"full_attention", "sliding_attention"}


def elements_per_token(inventory: Inventory, recipe: Recipe) -> tuple[int, int]:
    """Cached scalars of one token in one layer: of the first and of the second tensor.

    Source: transformers, cache_utils.py, DynamicLayer; models/deepseek_v3 (5.x): one latent and one rotary key.
    """
    config = inventory.config
    latent, rotary = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if isinstance(latent, int) and isinstance(rotary, int):
        if not recipe.stack.caches_expanded_latents:
            return latent, rotary
        heads, plain, value = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
        assert isinstance(heads, int)
        assert isinstance(plain, int)
        assert isinstance(value, int)
        return heads * (plain + rotary), heads * value
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    assert isinstance(heads, int)
    return heads * head_dim(config), heads * head_dim(config)


def cached_tokens(inventory: Inventory, recipe: Recipe, inference: Inference) -> list[int]:
    """Positions that each layer holds at the last decoding step.

    The last token is never cached. A sliding layer keeps its window less one; a static cache is allocated in full at first use.

    Source: transformers, cache_utils.py, DynamicSlidingWindowLayer and StaticLayer; generation/utils.py, _prepare_cache_for_generation.
    """
    total = inference.prompt_length + inference.max_new_tokens
    window = inventory.config.get("sliding_window")
    types = inventory.config.get("layer_types")
    tokens = []
    for index in range(inventory.num_layers):
        sliding = types[index] == "sliding_attention" if isinstance(types, (list, tuple)) else isinstance(window, int)
        length = total if inference.cache is CacheKind.STATIC else max(inference.prompt_length, total - 1)
        if sliding and isinstance(window, int):
            length = min(length, window if inference.cache is CacheKind.STATIC else window - 1)
        tokens.append(length)
    return tokens


def cache_dtype(recipe: Recipe) -> DType:
    """Type of the keys: that of the activations, which is the load type outside autocast."""
    return recipe.dtype


def decode_items(inventory: Inventory, recipe: Recipe, inference: Inference) -> dict[Item, int]:
    """What is alive at the last decoding step, beside what is stored [bytes].

    A dynamic cache grows by concatenation: the old and the new keys of one layer stand side by side.

    Source: transformers, cache_utils.py, DynamicLayer.update; generation/utils.py, _sample (float32 copy of the logits).
    """
    width = cache_dtype(recipe).itemsize
    first, second = elements_per_token(inventory, recipe)
    batch = inference.batch_size
    tokens = cached_tokens(inventory, recipe, inference)
    cache = sum(allocated(batch * n * first * width) + allocated(batch * n * second * width) for n in tokens)
    grown = max(allocated(batch * n * max(first, second) * width) for n in tokens) if inference.cache is CacheKind.DYNAMIC else 0
    vocabulary, hidden = inventory.config["vocab_size"], inventory.config.get("intermediate_size") or inventory.config["hidden_size"]
    assert isinstance(vocabulary, int)
    assert isinstance(hidden, int)
    logits = allocated(batch * vocabulary * width) + allocated(batch * vocabulary * DType.FLOAT32.itemsize)
    return {
        Item.KV_CACHE: cache,
        Item.TEMPORARY: grown + _WIDE_VECTORS * allocated(batch * hidden * width),
        Item.LOGITS: logits,
    }
