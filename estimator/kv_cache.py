"""Keys and values kept while text is generated: how many tokens each layer stores, before and after a forward pass, and looks back at.

Legend: P prompt length, N new tokens, W window, K keys that attention looks at, S tokens of the pass (P for the prompt, then 1).
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from estimator.extent import Extent
from estimator.inventory import Inventory
from estimator.recipe import CacheKind, Inference, Recipe

QUERIES = Extent(1, 0, 1)
KEYS = Extent(1, keys=1)
_KEYS_BEFORE = Extent(1, keys=1, offset=-1)


class Update(StrEnum):
    """How a layer's cache takes up new keys and values."""

    JOINED = "joined"
    """One new tensor of what was there and what is new, for keys, then for values: old and new stand side by side for a moment."""
    JOINED_TOGETHER = "joined together"
    """The same, but the old keys stay until the new values are there: so do layers with a window."""
    WRITTEN = "written"
    """Into a tensor of fixed length."""
    SHIFTED = "shifted"
    """Into a full window of fixed length, by way of rolled copies."""
    PASSED = "passed"
    """The prompt is longer than a window of fixed length: its last tokens are written, attention looks at the prompt itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What one layer's cache holds around one forward pass, in tokens."""

    before: Extent | None
    """Stored when the pass begins."""
    stored: Extent
    """Stored afterwards. Less may be in use: a window keeps W - 1 tokens, as a view of what was there to look at."""
    attended: Extent
    update: Update


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """One forward pass of generation, for both kinds of layers."""

    full: Span
    sliding: Span
    mask: Extent
    """Keys that the mask for all positions covers."""
    sliding_mask: Extent
    sliding_masked: bool
    """Whether sdpa needs a mask for the window, padded or not."""
    masks_all: bool
    """Whether every mask is made, needed or not."""
    prepared: bool
    """Whether masks are made before the model is called: only those that some layer uses, with one row for each sequence."""
    decoding: bool
    """Whether the pass is one token long."""


def is_cache_modelled(inventory: Inventory) -> bool:
    """Whether every layer of the model is attention with keys and values (or a latent) of known size."""
    return {"full_attention", "sliding_attention"}.issuperset(layer_types(inventory))


def layer_types(inventory: Inventory) -> tuple[str, ...]:
    """What each layer looks back at.

    Source: transformers, cache_utils.py, get_layer_types_and_kwargs.
    """
    types = inventory.config.get("layer_types")
    if isinstance(types, (list, tuple)):
        return tuple(map(str, types))
    return ("sliding_attention" if inventory.config.get("sliding_window") else "full_attention",) * inventory.num_layers


def capacity(recipe: Recipe, inference: Inference) -> int:
    """Length of a static cache [tokens]: the last new token is never cached.

    Source: transformers, generation/utils.py, generate (`max_cache_length = generation_config.max_length - 1`) and _prepare_static_cache.
    """
    total = inference.prompt_length + inference.max_new_tokens
    return total - 1 if recipe.stack.static_cache_spares_last_token else total


def prefill_spans(inventory: Inventory, recipe: Recipe, inference: Inference) -> Spans:
    """The pass that reads the prompt.

    Source: transformers, cache_utils.py, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer and StaticSlidingWindowLayer: update and
    get_mask_sizes; masking_utils.py, _ignore_causal_mask_sdpa: up to the window's length the causal flag alone is enough.
    """
    prompt, window = inference.prompt_length, _window(inventory)
    if inference.cache is CacheKind.DYNAMIC:
        everything = Span(before=None, stored=QUERIES, attended=QUERIES, update=Update.JOINED)  # nothing old is in the way
        return _spans(inventory, recipe, everything, everything, sliding_masked=window is not None and prompt >= window)
    limit = capacity(recipe, inference)
    full = Span(before=None, stored=KEYS, attended=KEYS, update=Update.WRITTEN)
    if window is None or window > limit or not recipe.stack.caches_have_windows:
        return _spans(inventory, recipe, full, full, sliding_masked=window is not None and window <= limit)
    held = Extent(window)
    if prompt > window:
        sliding = Span(before=None, stored=held, attended=QUERIES, update=Update.PASSED)
    else:
        sliding = Span(before=None, stored=held, attended=held, update=Update.WRITTEN)
    return _spans(inventory, recipe, full, sliding, sliding_masked=True)


def decode_spans(inventory: Inventory, recipe: Recipe, inference: Inference, *, first: bool) -> Spans:
    """A pass of one token: the first one after the prompt, or the last one.

    After a prompt longer than the window, the window is a view of all the prompt's keys, until the first of these passes.

    Source: as for `prefill_spans`.
    """
    window, seen = _window(inventory), num_keys(recipe, inference, first=first)
    if inference.cache is CacheKind.DYNAMIC:
        full = Span(before=_KEYS_BEFORE, stored=KEYS, attended=KEYS, update=Update.JOINED)
        sliding_masked = window is not None and seen >= window
        if window is None or not recipe.stack.caches_have_windows:
            return _spans(inventory, recipe, full, full, sliding_masked=sliding_masked, decoding=True)
        if seen <= window:
            growing = replace(full, update=Update.JOINED_TOGETHER)
            return _spans(inventory, recipe, full, growing, sliding_masked=sliding_masked, decoding=True)
        held = Extent(window)
        sliding = Span(before=_KEYS_BEFORE if first else held, stored=held, attended=held, update=Update.JOINED_TOGETHER)
        return _spans(inventory, recipe, full, sliding, sliding_masked=True, decoding=True)
    full = Span(before=KEYS, stored=KEYS, attended=KEYS, update=Update.WRITTEN)
    if window is None or window > capacity(recipe, inference) or not recipe.stack.caches_have_windows:
        return _spans(inventory, recipe, full, full, sliding_masked=True, decoding=True)
    held = Extent(window)
    sliding = Span(before=held, stored=held, attended=held, update=Update.SHIFTED if seen > window else Update.WRITTEN)
    return _spans(inventory, recipe, full, sliding, sliding_masked=True, decoding=True)


def num_keys(recipe: Recipe, inference: Inference, *, first: bool) -> int:
    """Keys that a layer without a window looks at in the first or the last pass of one token."""
    if inference.cache is CacheKind.STATIC:
        return capacity(recipe, inference)
    return inference.prompt_length + (1 if first else inference.max_new_tokens - 1)


def _window(inventory: Inventory) -> int | None:
    window = inventory.config.get("sliding_window")
    return window if isinstance(window, int) and window > 0 else None


def _spans(inventory: Inventory, recipe: Recipe, full: Span, sliding: Span, *, sliding_masked: bool, decoding: bool = False) -> Spans:
    """Masks are sized by the first layer of their kind, or by the first layer of all.

    Source: transformers, masking_utils.py, find_first_full_attention_index and create_sliding_window_causal_mask; compilable caches skip
    no mask while they decode.
    """
    assert recipe.inference is not None
    types = layer_types(inventory)
    static = recipe.inference.cache is CacheKind.STATIC
    of_first = sliding if types[0] == "sliding_attention" else full
    return Spans(
        full=full,
        sliding=sliding,
        mask=(full if "full_attention" in types else of_first).attended,
        sliding_mask=(sliding if "sliding_attention" in types else of_first).attended,
        sliding_masked=sliding_masked,
        masks_all=static and decoding,
        prepared=static,
        decoding=decoding,
    )
