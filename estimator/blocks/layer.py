"""What a decoder layer is given beside its input."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import assert_never

from estimator.attention import Heads, eager, expanded, flash, scaled_dot_product
from estimator.dtypes import DType
from estimator.extent import Extent
from estimator.kv_cache import QUERIES, Span, Update
from estimator.modules import Modules
from estimator.operators import clone, concatenate
from estimator.phases import Item
from estimator.recipe import Attention
from estimator.tape import Tape, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Tensors the model makes once and hands to every layer."""

    cos: Value | None = None
    sin: Value | None = None
    mask: Value | None = None
    """Bool for sdpa, in the model's type for eager; None where the kernel's causal flag does."""
    sliding_mask: Value | None = None
    sliding_cos: Value | None = None
    """Where layers with a window have frequencies of their own."""
    sliding_sin: Value | None = None
    others: tuple[Value, ...] = ()
    """Held as long as the rest, but not looked at."""
    unmade: tuple[Tape, Extent, DType] | None = None
    """What cos and sin are like where every layer makes its own."""

    def of(self, *, is_sliding: bool) -> "Surroundings":
        """What a layer of one kind is given, and a checkpoint of it holds on to."""
        mask, sliding_mask = (None, self.sliding_mask) if is_sliding else (self.mask, None)
        own = is_sliding and self.sliding_cos is not None
        cos, sin = (self.sliding_cos, self.sliding_sin) if own else (self.cos, self.sin)
        return Surroundings(cos=cos, sin=sin, mask=mask, sliding_mask=sliding_mask, unmade=self.unmade)

    def without_rotations(self) -> "Surroundings":
        """Cos and sin are left to the layers; for models with one set of frequencies."""
        assert self.sliding_cos is None
        return self if self.cos is None else replace(self, cos=None, sin=None, unmade=(self.cos.tape, self.cos.extent, self.cos.dtype))

    def in_layer(self) -> "Surroundings":
        """With cos and sin that the layer makes, where the model made none."""
        if self.unmade is None:
            return self
        tape, extent, dtype = self.unmade
        with tape.recording(False):
            return replace(self, cos=tape.new(extent, dtype), sin=tape.new(extent, dtype), unmade=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer: its modules, the config, and what is its own."""

    modules: Modules
    config: Mapping[str, object]
    index: int
    model_type: str
    attention: Attention
    layer_type: str = "full_attention"
    span: Span | None = None
    """How far the layer's cache reaches, in inference."""
    cache: list[Value] | None = None
    """Keys and values that are there before; those that are there after take their place."""
    decoding: bool = False
    """Whether there is one query for each sequence."""
    compiled: bool = False
    """Whether torch.compile runs the layer."""
    handed_out: list[Value] | None = None
    """Where a layer puts what it returns beside the hidden states."""
    keeps_cache: bool = False
    """Whether keys and values are stored in training too."""

    @property
    def copies_experts(self) -> bool:
        """Whether the weights of the chosen experts are copied for every token."""
        return self.decoding and self.modules.recipe.stack.decodes_experts_one_by_one

    @property
    def flash_instead_of_float32(self) -> DType:
        """What float32 queries, keys and values become outside of autocast under flash_attention_2: of a quantized model, as
        `prepare_model_for_kbit_training` leaves it, the type that it was loaded in. The kernel takes no other float32.

        Source: transformers 5.23, integrations/flash_attention.py, get_target_dtype; 4.45, models/llama/modeling_llama.py,
        LlamaFlashAttention2.forward (`_pre_quantization_dtype`).
        """
        recipe = self.modules.recipe
        return DType.FLOAT32 if recipe.quantization is None else recipe.dtype

    def integer(self, name: str) -> int:
        value = self.config[name]
        assert isinstance(value, int), name
        return value

    def number(self, name: str, default: float) -> float:
        value = self.config.get(name)
        return float(value) if isinstance(value, (int, float)) else default

    def heads(self) -> Heads:
        """Head counts and sizes as most configs name them."""
        num_heads = self.integer("num_attention_heads")
        stated = self.config.get("head_dim")
        head_dim = stated if isinstance(stated, int) else self.integer("hidden_size") // num_heads
        key_value = self.config.get("num_key_value_heads")
        return Heads(
            num_heads=num_heads,
            num_key_value_heads=key_value if isinstance(key_value, int) else num_heads,
            head_dim=head_dim,
            value_head_dim=head_dim,
        )

    def attend_and_weights(
        self,
        query: Value,
        key: Value,
        value: Value,
        heads: Heads,
        around: Surroundings,
        *,
        probability: float = 0.0,
        softcap: bool = False,
        softmax_in_float32: bool = True,
        heads_first: bool = False,
    ) -> tuple[Value, Value | None]:
        """The attention kernel of the recipe, with this layer's mask; and the weights of eager attention, which blocks hold in a local to
        their end.

        Args:
            heads_first: whether query and key lie in memory head after head, as a concatenation leaves them, and not token after token.
        """
        mask = around.sliding_mask if self.layer_type == "sliding_attention" else around.mask
        cached = self.span is not None or (self.keeps_cache and self.modules.recipe.stack.first_keys_are_joined)
        if self.attention is Attention.EAGER:
            return eager(
                query,
                key,
                value,
                mask,
                heads,
                probability=probability,
                softcap=softcap,
                in_float32=softmax_in_float32,
                queries_first=heads_first or self.decoding,
                keys_first=heads_first or cached,
                values_first=cached,
                one_query=self.decoding,
            )
        stack = self.modules.recipe.stack
        copies_output = heads_first and not self.decoding  # one query lies the same way round in both layouts
        if self.attention is not Attention.SDPA:
            if stack.flash_repeats_key_values(self.model_type):
                query, key, value, heads = expanded(query, key, value, heads)
            output = flash(query, key, value, heads, instead_of_float32=self.flash_instead_of_float32)
            return (clone(output) if copies_output else output), None
        repeats = mask is not None or not stack.sdpa_groups_queries or not heads.fit_grouped_kernels
        if stack.sdpa_copies_inputs(self.model_type, masked=mask is not None) and not self.decoding:
            query = query if heads_first else clone(query)
            if not cached and not (repeats and heads.groups > 1):  # else they lie head after head already
                key, value = key if heads_first else clone(key), clone(value)
            copies_output = True
        if repeats:
            if self.decoding and stack.sdpa_packs_queries and not self.compiled:
                # The queries of a group are looked at as queries of one head.
                heads = replace(heads, num_key_value_heads=heads.num_heads)
            else:
                query, key, value, heads = expanded(query, key, value, heads)
        capability = self.modules.recipe.compute_capability
        return scaled_dot_product(query, key, value, mask, heads, capability, heads_first=copies_output, one_query=self.decoding), None

    def remember(self, key: Value, value: Value) -> tuple[Value, Value]:
        """In inference, keys and values go to the cache, and what attention looks at comes from there.

        Source: transformers, cache_utils.py, DynamicLayer.update, StaticLayer.lazy_initialization and update,
        StaticSlidingWindowLayer.update; generation is the same in models/deepseek_v3 (5.x), with the latent for a key.
        """
        span, cache = self.span, self.cache
        if span is None or cache is None:
            return self._stored_in_training(key, value) if self.keeps_cache else (key, value)
        tape = key.tape
        new = (key, value)
        if span.before is None and span.update is not Update.JOINED:
            cache.extend(tape.new(_of(x, span.stored), x.dtype, Item.KV_CACHE) for x in new)
        match span.update:
            case Update.JOINED | Update.JOINED_TOGETHER:
                old = list(cache) if span.update is Update.JOINED_TOGETHER else []
                for index, x in enumerate(new):
                    if span.before is not None and not self.modules.recipe.stack.keeps_earlier_cache(self.model_type):
                        _relabelled(cache[index], Item.TEMPORARY)
                    joined = tape.new(_of(x, span.stored), x.dtype, Item.KV_CACHE)
                    cache[index : index + 1] = [joined]
                    del joined
                del old
            case Update.WRITTEN:
                positions = [tape.new(QUERIES, DType.INT64) for _ in range(2)]
                del positions
            case Update.SHIFTED:
                rolled = [tape.new(x.extent, x.dtype) for x in cache]
                del rolled
            case Update.PASSED:
                return key, value
            case _:
                assert_never(span.update)
        key, value = (cached.view(_of(x, span.attended)) for cached, x in zip(cache, new, strict=True))
        return key, value

    def _stored_in_training(self, key: Value, value: Value) -> tuple[Value, Value]:
        """Keys and values joined to a cache that holds nothing yet, and for a layer with a window its length as a tensor.

        Source: transformers, cache_utils.py, DynamicLayer.update and DynamicSlidingWindowLayer.__init__ (since 5.0).
        """
        assert self.handed_out is not None
        stack = self.modules.recipe.stack
        if stack.first_keys_are_joined:
            key, value = concatenate([key]), concatenate([value])
        self.handed_out.extend((key.view(), value.view()))
        if self.layer_type == "sliding_attention" and stack.transformers >= (5,):
            self.handed_out.append(key.tape.new(Extent(1), DType.INT64))
        return key, value


def _of(x: Value, length: Extent) -> Extent:
    """Keys or values of so many tokens instead of those of the pass."""
    return Extent(x.extent.coefficient, x.extent.batch).times(length)


def _relabelled(x: Value, item: Item) -> None:
    if x.storage is not None:
        x.storage.relabel(item)
