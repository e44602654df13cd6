"""What a decoder layer is given beside its input."""

from collections.abc import Mapping
from dataclasses import dataclass

from estimator.attention import Heads, eager, expanded, flash, scaled_dot_product
from estimator.modules import Modules
from estimator.operators import clone
from estimator.phases import Item
from estimator.recipe import Attention
from estimator.tape import Extent, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Tensors the model makes once and hands to every layer."""

    cos: Value | None = None
    sin: Value | None = None
    mask: Value | None = None
    """Bool for sdpa, in the model's type for eager; None where the kernel's causal flag does."""
    sliding_mask: Value | None = None
    others: tuple[Value, ...] = ()
    """Held as long as the rest, but not looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer: its modules, the config, and what is its own."""

    modules: Modules
    config: Mapping[str, object]
    index: int
    model_type: str
    attention: Attention
    layer_type: str = "full_attention"
    cache: list[Value] | None = None
    """Where keys and values go in inference."""
    handed_out: list[Value] | None = None
    """Where a layer puts what it returns beside the hidden states."""

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
        self.remember(key, value)
        mask = around.sliding_mask if self.layer_type == "sliding_attention" else around.mask
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
                heads_first=heads_first,
            )
        stack = self.modules.recipe.stack
        if self.attention is not Attention.SDPA:
            if stack.flash_repeats_key_values(self.model_type):
                query, key, value, heads = expanded(query, key, value, heads)
            output = flash(query, key, value, heads)
            return (clone(output) if heads_first else output), None
        if mask is not None or not stack.sdpa_groups_queries or not heads.fit_grouped_kernels:
            query, key, value, heads = expanded(query, key, value, heads)
        capability = self.modules.recipe.compute_capability
        return scaled_dot_product(query, key, value, mask, heads, capability, heads_first=heads_first), None

    def remember(self, key: Value, value: Value) -> None:
        """In inference, keys and values are copied into the cache.

        Source: transformers, cache_utils.py, DynamicLayer.update; models/deepseek_v3 (5.x) caches the latent instead.
        """
        if self.cache is None:
            return
        latent = self.config.get("kv_lora_rank")
        if isinstance(latent, int) and not self.modules.recipe.stack.caches_expanded_latents:
            rotary = self.integer("qk_rope_head_dim")
            self.cache.append(key.tape.new(Extent(latent + rotary, 1, 1), key.dtype, Item.KV_CACHE))
            return
        self.cache.extend(x.tape.new(x.extent, x.dtype, Item.KV_CACHE) for x in (key, value))
