"""Which families of models are known block by block, and what lies around their layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from estimator.blocks import llama
from estimator.blocks.layer import Layer, Surroundings
from estimator.dtypes import DType
from estimator.modules import Modules
from estimator.operators import embedding, scale
from estimator.recipe import Attention
from estimator.tape import Extent, Tape, Value


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

    @property
    def width(self) -> int:
        value = self.config["hidden_size"]
        assert isinstance(value, int)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family embeds, repeats and ends."""

    layer: Callable[[Layer, Value, Surroundings], Value]
    embed: Callable[[Frame], Value]
    surround: Callable[[Frame, Value], Surroundings]
    finish: Callable[[Frame, Value], Value]


def embed_tokens(frame: Frame) -> Value:
    return embedding(frame.modules.parameter("embed_tokens.weight"), Extent(frame.width, 1, 1))


def embed_scaled(frame: Frame) -> Value:
    """Gemma and Granite multiply the embeddings by a number."""
    return scale(embed_tokens(frame))


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
    share = frame.config.get("partial_rotary_factor")
    width = int(head_dim(frame.config) * (float(share) if isinstance(share, (int, float)) else 1.0))
    with frame.tape.recording(False):
        cos = frame.tape.new(Extent(width, 0, 1), hidden.dtype)
        sin = frame.tape.new(Extent(width, 0, 1), hidden.dtype)
    return Surroundings(cos=cos, sin=sin, mask=mask(frame, hidden.dtype, frame.masked), sliding_mask=mask(frame, hidden.dtype, frame.sliding_masked))


def mask(frame: Frame, dtype: DType, needed: bool) -> Value | None:
    """sdpa takes a boolean mask, eager one in the model's type and always."""
    if frame.attention is Attention.EAGER:
        return frame.tape.new(Extent(1, 1, 2), dtype)
    return frame.tape.new(Extent(1, 1, 2), DType.BOOL) if needed and frame.attention is Attention.SDPA else None


def finish_rms(frame: Frame, hidden: Value) -> Value:
    return frame.modules.rms_norm("norm", hidden, frame.width)


_LLAMA = Family(layer=llama.decoder_layer, embed=embed_tokens, surround=rotary, finish=finish_rms)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
