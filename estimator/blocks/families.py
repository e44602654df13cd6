"""Which families of models are known block by block, and what lies around their layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from estimator.blocks import cohere, deepseek, falcon, gemma, gpt2, gpt_oss, llama, moe, neox, olmo, phi, stablelm, starcoder2
from estimator.blocks.layer import Layer, Surroundings
from estimator.blocks.parts import rotary_width
from estimator.dtypes import DType
from estimator.extent import Extent
from estimator.kv_cache import QUERIES, Spans
from estimator.modules import Modules
from estimator.operators import add, dropout
from estimator.recipe import Attention
from estimator.tape import Tape, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What stands around the layers of one model: the modules beside them, the config, and the batch."""

    tape: Tape
    modules: Modules
    """Named relative to the decoder: `embed_tokens`, `norm`."""
    config: Mapping[str, object]
    attention: Attention
    masked: bool
    """Whether an attention mask is materialised."""
    sliding_masked: bool
    """Whether the layers with a window need one."""
    padded: bool = False
    """Whether batches carry padding."""
    spans: Spans | None = None
    """How far caches reach, in inference."""

    @property
    def width(self) -> int:
        value = self.config["hidden_size"]
        assert isinstance(value, int)
        return value

    def positions(self, number: int) -> Extent:
        """So many elements for each position: the same in all sequences of a training batch, of each sequence its own in generation."""
        return Extent(number, 0 if self.spans is None else 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family embeds, repeats and ends."""

    layer: Callable[[Layer, Value, Surroundings], Value]
    embed: Callable[[Frame], Value]
    surround: Callable[[Frame, Value], Surroundings]
    enter: Callable[[Frame, Value, list[Value]], Value] = lambda frame, embedded, beside: embedded
    """From the embedding's output to the first layer's input; what else stays alive to the end of the model's forward goes to the list."""
    finish: Callable[[Frame, Value], Value]
    scales_embeddings: bool = False
    """Whether the model multiplies the embedding's output by a number (and not the embedding itself)."""
    scales_logits: bool = False
    """Whether the head's output is multiplied by a number."""
    variant: Callable[[Mapping[str, object], int], object] = lambda config, index: None
    """What the config alone says about a layer and its tensors do not: layers that differ in it are no copies of each other."""
    refuses: Callable[[Mapping[str, object]], str | None] = lambda config: None
    """Why a config of the family is not modelled, if it is not."""


def _refused_by(name: str) -> Callable[[Mapping[str, object]], str | None]:
    """A field of the config that turns on what has no form here."""
    return lambda config: name if config.get(name) else None


def embed_tokens(frame: Frame) -> Value:
    return frame.modules.embedding("embed_tokens", Extent(frame.width, 1, 1))


def embed_scaled(frame: Frame) -> Value:
    """Gemma's embedding multiplies its output by a number."""
    return frame.modules.embedding("embed_tokens", Extent(frame.width, 1, 1), scaled=True)


def head_dim(config: Mapping[str, object]) -> int:
    stated = config.get("head_dim")
    if isinstance(stated, int):
        return stated
    width, heads = config["hidden_size"], config["num_attention_heads"]
    assert isinstance(width, int)
    assert isinstance(heads, int)
    return width // heads


def rotary(frame: Frame, hidden: Value) -> Surroundings:
    """cos and sin of one sequence, in the type of the hidden states, and the masks.

    Source: transformers, models/llama/modeling_llama.py, LlamaRotaryEmbedding.forward; masking_utils.py.
    """
    return _rotary(frame, hidden.dtype, hidden.dtype)


def rotary_float32(frame: Frame, hidden: Value) -> Surroundings:
    """In the type of the hidden states before 4.52. Source: transformers, models/olmo2/modeling_olmo2.py, Olmo2RotaryEmbedding.forward."""
    in_full = frame.modules.recipe.stack.olmo_rotates_in_float32
    return _rotary(frame, DType.FLOAT32 if in_full else hidden.dtype, hidden.dtype)


def _rotary_halves(frame: Frame, hidden: Value) -> Surroundings:
    """Source: transformers, models/gpt_oss/modeling_gpt_oss.py, GptOssRotaryEmbedding.forward: one angle for each pair."""
    return _rotary(frame, hidden.dtype, hidden.dtype, head_dim(frame.config) // 2)


def _rotary_latent(frame: Frame, hidden: Value) -> Surroundings:
    """Source: transformers, models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3RotaryEmbedding.forward."""
    return _rotary(frame, hidden.dtype, hidden.dtype, _rope_head_dim(frame.config))


def _rotary_complex(frame: Frame, hidden: Value) -> Surroundings:
    """Complex numbers. Source: transformers, models/deepseek_v2/modeling_deepseek_v2.py, DeepseekV2RotaryEmbedding.forward."""
    return Surroundings(
        cos=frame.tape.new(frame.positions(_rope_head_dim(frame.config)), DType.FLOAT32), mask=mask(frame, hidden.dtype, frame.masked)
    )


def _rope_head_dim(config: Mapping[str, object]) -> int:
    value = config["qk_rope_head_dim"]
    assert isinstance(value, int)
    return value


def _rotary(frame: Frame, dtype: DType, mask_dtype: DType, width: int | None = None) -> Surroundings:
    if width is None:
        width = rotary_width(frame.config, head_dim(frame.config))
        if width % 2:  # cos and sin come out one wider, and the model stops
            raise NotImplementedError(f"rotary positions of an odd width, {width},")
    with frame.tape.recording(False):
        cos, sin = (frame.tape.new(frame.positions(width), dtype) for _ in range(2))
        # Where layer types have frequencies of their own, so do their cos and sin: as large.
        own = _num_frequency_sets(frame.config) > 1
        sliding_cos, sliding_sin = (frame.tape.new(frame.positions(width), dtype) if own else None for _ in range(2))
    full, sliding = _mask_kinds(frame)
    return Surroundings(
        cos=cos,
        sin=sin,
        mask=mask(frame, mask_dtype, frame.masked) if full else None,
        sliding_mask=mask(frame, mask_dtype, frame.sliding_masked, sliding=True) if sliding else None,
        sliding_cos=sliding_cos,
        sliding_sin=sliding_sin,
    )


def _rotary_masked(frame: Frame, hidden: Value) -> Surroundings:
    """A mask in every case. Source: transformers, models/falcon/modeling_falcon.py, FalconModel.forward."""
    return replace(rotary(frame, hidden), mask=mask(frame, hidden.dtype, needed=True))


def _with_both_masks(surround: Callable[[Frame, Value], Surroundings]) -> Callable[[Frame, Value], Surroundings]:
    """A mask of the last few positions is made even where no layer has a window; for a window of 0 no kernel has a flag.

    Source: transformers, models/gemma2/modeling_gemma2.py, Gemma2Model.forward; models/qwen2_moe/configuration_qwen2_moe.py.
    """

    def both(frame: Frame, hidden: Value) -> Surroundings:
        around = surround(frame, hidden)
        if around.sliding_mask is not None:
            return around
        needed = frame.sliding_masked or frame.config.get("sliding_window") == 0
        unused = None if frame.spans is not None and frame.spans.prepared else mask(frame, hidden.dtype, needed, sliding=True)
        return around if unused is None else replace(around, others=(*around.others, unused))

    return both


def _num_frequency_sets(config: Mapping[str, object]) -> int:
    """Source: transformers, models/gemma3/modeling_gemma3.py, Gemma3TextModel.forward."""
    types, parameters = config.get("layer_types"), config.get("rope_parameters")
    if not isinstance(types, (list, tuple)) or not isinstance(parameters, Mapping):
        return 1
    return max(1, len(set(types) & set(parameters)))


def _mask_kinds(frame: Frame) -> tuple[bool, bool]:
    """Whether a mask for all and one for the last few positions is asked for."""
    types = frame.config.get("layer_types")
    if isinstance(types, (list, tuple)):
        return "full_attention" in types or frame.spans is None or not frame.spans.prepared, "sliding_attention" in types
    sliding = bool(frame.config.get("sliding_window"))
    return not sliding, sliding


def mask(frame: Frame, dtype: DType, needed: bool, *, sliding: bool = False) -> Value | None:
    """sdpa takes a boolean mask, eager one in the model's type and always.

    Without padding a boolean mask is one for all sequences, unless it is made before the model is called.

    Source: transformers, masking_utils.py, sdpa_mask and eager_mask; generation/utils.py, prepare_inputs_for_generation (`.contiguous()`).
    """
    spans = frame.spans
    length = QUERIES if spans is None else spans.sliding_mask if sliding else spans.mask
    if frame.attention is Attention.EAGER:
        return frame.tape.new(Extent(1, 1, 1).times(length), dtype)
    if not needed or frame.attention is not Attention.SDPA:
        return None
    prepared = spans is not None and spans.prepared and (frame.masked or sliding)
    shared = spans is not None and not (frame.padded or prepared)
    return frame.tape.new(Extent(1, 0 if shared else 1, 1).times(length), DType.BOOL)


def finish_rms(frame: Frame, hidden: Value) -> Value:
    return frame.modules.rms_norm("norm", hidden, frame.width)


def finish_layer_norm(name: str) -> Callable[[Frame, Value], Value]:
    def finish(frame: Frame, hidden: Value) -> Value:
        return frame.modules.layer_norm(name, hidden, frame.width)

    return finish


def _embed_with_dropout(frame: Frame) -> Value:
    probability = frame.config.get("embd_pdrop")
    return dropout(embed_tokens(frame), float(probability) if isinstance(probability, (int, float)) else 0.0)


def _finish_gemma(frame: Frame, hidden: Value) -> Value:
    return gemma.norm(frame.modules, "norm", hidden, frame.width)


def _finish_olmo(frame: Frame, hidden: Value) -> Value:
    return olmo.plain_norm(hidden, frame.width)


def _finish_olmo2(frame: Frame, hidden: Value) -> Value:
    return olmo.rms_norm(frame.modules, "norm", hidden, frame.width)


def _finish_cohere(frame: Frame, hidden: Value) -> Value:
    return cohere.norm(frame.modules, "norm", hidden, frame.width)


def number(config: Mapping[str, object], name: str) -> float:
    """A number of the config, 0 where it has none."""
    value = config.get(name)
    return float(value) if isinstance(value, (int, float)) else 0.0


def embedded_as(name: str) -> Callable[[Frame], Value]:
    def embed(frame: Frame) -> Value:
        return frame.modules.embedding(name, Extent(frame.width, 1, 1))

    return embed


def masks_alone(frame: Frame, hidden: Value) -> Surroundings:
    return Surroundings(mask=mask(frame, hidden.dtype, frame.masked))


def _enter_gpt2(frame: Frame, embedded: Value, beside: list[Value]) -> Value:
    """Source: transformers, models/gpt2/modeling_gpt2.py, GPT2Model.forward."""
    positions = frame.modules.embedding("wpe", frame.positions(frame.width))
    beside.append(positions)
    return dropout(add(embedded, positions), number(frame.config, "embd_pdrop"))


def dropped(name: str) -> Callable[[Frame, Value, list[Value]], Value]:
    """Dropout on the embeddings, with the probability that the config calls `name`."""

    def enter(frame: Frame, embedded: Value, beside: list[Value]) -> Value:
        return dropout(embedded, number(frame.config, name))

    return enter


_LLAMA = Family(layer=llama.decoder_layer, embed=embed_tokens, surround=rotary, finish=finish_rms)
_GEMMA = Family(layer=gemma.sandwich_layer, embed=embed_scaled, surround=_with_both_masks(rotary), finish=_finish_gemma)
_OLMO2 = Family(layer=olmo.post_norm_layer, embed=embed_tokens, surround=rotary_float32, finish=_finish_olmo2)
_GPT2 = Family(
    layer=gpt2.decoder_layer, embed=embedded_as("wte"), surround=masks_alone, enter=_enter_gpt2, finish=finish_layer_norm("ln_f")
)
_QWEN_MOE = Family(layer=moe.qwen_layer, embed=embed_tokens, surround=rotary, finish=finish_rms)
_COHERE = Family(layer=cohere.decoder_layer, embed=embed_tokens, surround=rotary, finish=_finish_cohere, scales_logits=True)

FAMILIES: Mapping[str, Family] = {
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, surround=_with_both_masks(rotary)),
    "deepseek_v2": Family(layer=deepseek.decoder_layer, embed=embed_tokens, surround=_rotary_complex, finish=finish_rms),
    "deepseek_v3": Family(layer=deepseek.decoder_layer, embed=embed_tokens, surround=_rotary_latent, finish=finish_rms),
    "falcon": Family(
        layer=falcon.decoder_layer,
        embed=embedded_as("word_embeddings"),
        surround=_rotary_masked,
        finish=finish_layer_norm("ln_f"),
        refuses=falcon.refuses,
    ),
    "gemma": Family(layer=gemma.decoder_layer, embed=embed_scaled, surround=rotary, finish=_finish_gemma),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "glm4_moe": Family(layer=deepseek.decoder_layer, embed=embed_tokens, surround=rotary, finish=finish_rms),
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neox": Family(
        layer=neox.decoder_layer,
        embed=embedded_as("embed_in"),
        surround=rotary,
        enter=dropped("hidden_dropout"),
        finish=finish_layer_norm("final_layer_norm"),
    ),
    "gpt_oss": Family(layer=gpt_oss.decoder_layer, embed=embed_tokens, surround=_with_both_masks(_rotary_halves), finish=_finish_olmo2),
    "granite": Family(
        layer=llama.scaled_layer, embed=embed_tokens, surround=rotary, finish=finish_rms, scales_embeddings=True, scales_logits=True
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Family(
        layer=moe.mixtral_layer, embed=embed_tokens, surround=rotary, finish=finish_rms, refuses=_refused_by("router_jitter_noise")
    ),
    "olmo": Family(layer=olmo.decoder_layer, embed=embed_tokens, surround=rotary_float32, finish=_finish_olmo),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, surround=_with_both_masks(rotary_float32)),
    "olmoe": Family(layer=moe.olmoe_layer, embed=embed_tokens, surround=rotary, finish=finish_rms),
    "phi": Family(layer=phi.decoder_layer, embed=_embed_with_dropout, surround=rotary, finish=finish_layer_norm("final_layernorm")),
    "phi3": Family(layer=phi.fused_layer, embed=embed_tokens, surround=rotary, finish=finish_rms),
    "qwen2": _LLAMA,
    "qwen2_moe": replace(_QWEN_MOE, surround=_with_both_masks(rotary)),
    "qwen3": _LLAMA,
    "qwen3_moe": _QWEN_MOE,
    "smollm3": Family(layer=llama.decoder_layer, embed=embed_tokens, surround=rotary, finish=finish_rms, variant=llama.rotates),
    "stablelm": Family(
        layer=stablelm.decoder_layer,
        embed=embed_tokens,
        surround=rotary,
        finish=finish_layer_norm("norm"),
        refuses=_refused_by("qk_layernorm"),  # norms of single heads run on parts that lie apart in memory
    ),
    "starcoder2": Family(
        layer=starcoder2.decoder_layer,
        embed=embed_tokens,
        surround=rotary,
        enter=dropped("embedding_dropout"),
        finish=finish_layer_norm("norm"),
    ),
}
