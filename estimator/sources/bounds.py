"""What a config may hold, checked before any process works on it: a config is a stranger's input.

Every bound lies several times above the largest published model, and keeps what is built from the config within seconds and a few GiB.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from estimator.errors import ConfigError

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_VALUES = 200_000
MAX_LIST_LENGTH = 65_536
MAX_TEXT_LENGTH = 65_536
MAX_LABELS = 65_536
MAX_PARAMETERS = 20 * 10**12
"""Ten times the largest model published so far (Kimi-K2 1.0e12, DeepSeek-V4-Pro 1.6e12)."""
MAX_MODULES = 2**20
"""Layers × experts. Where experts are modules of their own, each costs about 0.1 ms to build; the limit on time does the rest."""
MAX_INTEGER = 2**53
"""Beyond this, JSON readers disagree about integers."""
MAX_FLOAT = 3.4028234663852886e38
"""The largest float32: what models compute with."""

_MODEL_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Which integers a size may be."""

    names: re.Pattern[str]
    low: int
    high: int
    exact: bool
    """Whether the names are those of sizes alone; else the field may also hold a flag, a factor or a word, which is then let through."""


def _bound(names: str, low: int, high: int, *, exact: bool = True) -> Bound:
    # Flags and factors share endings with sizes: `use_sliding_window`, `scale_depth`, `pad_key_length`.
    return Bound(names=re.compile(rf"(?!use_|is_|has_|no_|pad_|scale_|tie_)(?:{names})"), low=low, high=high, exact=exact)


# The first that matches a field's whole name decides. Names are those of transformers' config classes, text, vision and audio parts alike.
@cache
def _bounds() -> tuple[Bound, ...]:
    return (
        _bound(r"num_hidden_layers|n_layers?|num_layers|num_decoder_layers|encoder_layers|decoder_layers|num_blocks", 1, 512),
        _bound(
            r"num_key_value_heads|num_kv_heads|num_attention_heads|n_heads?|num_heads|encoder_attention_heads|decoder_attention_heads",
            1,
            2**13,
        ),
        _bound(r"vocab_size", 1, 2**24),
        _bound(r"head_dim|kv_lora_rank|q_lora_rank|moe_intermediate_size|qk_nope_head_dim|qk_rope_head_dim|v_head_dim", 0, 2**17),
        _bound(r"num_experts|num_local_experts|n_routed_experts|n_shared_experts|moe_num_experts|num_experts_per_tok", 0, 2**15),
        _bound(r"max_position_embeddings|n_positions|n_ctx", 1, 2**31),
        _bound(r".*_layers|depth|depths|layers_.*|.*_depth", 0, 512, exact=False),
        _bound(r".*_vocab_size|vocab_size_.*", 0, 2**24, exact=False),
        _bound(r"hidden_size|d_model|n_embd|dim|embed_dim|n_embed", 1, 2**17),
        _bound(r".*_heads|n_head_.*|.*_groups|n_group|num_kv", 0, 2**13, exact=False),
        _bound(r".*experts|.*_experts_.*|moe_topk|moe_k", 0, 2**15, exact=False),
        _bound(r"intermediate_size|ffn_dim|ffn_hidden_size|n_inner|d_ff|.*_ffn_dim|.*_intermediate_size", 0, 2**20),
        _bound(r"image_size|patch_size|.*_image_size|.*_patch_size|tile_size", 0, 2**16, exact=False),
        _bound(r".*chunk_size", -1, 2**24, exact=False),  # of audio samples in some
        _bound(r".*_position_embeddings|max_seq_len|seq_length|.*_length|sliding_window|.*_window", -1, 2**31, exact=False),
        _bound(r"block_sizes|block_repeats|attention_types|.*_per_block|num_blocks_.*", 0, 512, exact=False),
        _bound(r"attn_layer_period|expert_layer_period|decoder_sparse_step", 1, 2**16, exact=False),
        _bound(r"expand|expand_.*|.*_expand|.*_kernel|kernel_.*|.*_kernels", 0, 2**12, exact=False),
        _bound(r"num_labels|num_classes|num_.*|n_.*", -1, 2**20, exact=False),
        _bound(r".*_dim|.*_dims|.*_size|.*_rank|.*_width|d_.*|.*channels", -1, 2**20, exact=False),
    )


# Sizes that are lists, one entry per layer or stage, and of which architectures; everywhere else they are one integer.
# Source: the annotations of transformers 5.23's config classes; config.json of tencent/Hunyuan-A13B-Instruct and apple/OpenELM-3B.
_LISTS: Mapping[str, frozenset[str]] = {
    "embed_dim": frozenset({"cvt", "florence_vision"}),
    "intermediate_size": frozenset({"gemma3n", "gemma3n_text"}),
    "moe_intermediate_size": frozenset({"ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "hunyuan"}),
    "num_attention_heads": frozenset({"clap", "clap_audio_model", "glpn", "levit", "pvt", "pvt_v2", "segformer"}),
    "num_heads": frozenset(
        [
            "cvt",
            "dinat",
            "donut-swin",
            "florence2",
            "florence_vision",
            "hiera",
            "maskformer",
            "maskformer-swin",
            "swin",
            "swin2sr",
            "swinv2",
            "vision-encoder-decoder",
        ]
    ),
    "num_kv_heads": frozenset({"openelm"}),
}
# Sizes that have to be given as a number where they are given, and the architectures whose classes take a null all the same.
# Source: the annotations of transformers 5.23's config classes.
_NOT_NULL: Mapping[str, frozenset[str]] = {
    "hidden_size": frozenset({"esmfold2"}),
    "num_hidden_layers": frozenset({"dpt"}),
    "num_attention_heads": frozenset({"dpt"}),
    "vocab_size": frozenset({"esm", "rag", "wav2vec2", "wav2vec2-bert", "wav2vec2-conformer"}),
    **dict.fromkeys(("n_embd", "n_embed", "n_layer", "n_head", "num_layers", "dim", "embed_dim", "max_position_embeddings"), frozenset()),
}
# Sizes written as one number per tower, and as a length in seconds times a rate, which leaves a float.
# Source: transformers 5.23, LxmertConfig.num_hidden_layers; MusicFlamingoConfig.max_position_embeddings.
_MAPPINGS: Mapping[str, frozenset[str]] = {"num_hidden_layers": frozenset({"lxmert"})}
_FLOATS: Mapping[str, frozenset[str]] = {"max_position_embeddings": frozenset({"musicflamingo"})}
_ROPE = ("rope_scaling", "rope_parameters")

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "n_embed")
_INTERMEDIATE = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff", "moe_intermediate_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_VOCABULARY = ("vocab_size",)


def check(config: object) -> dict[str, Any]:
    """The config, if every value is within bounds.

    Args:
        config: the content of a config.json.

    Raises:
        ConfigError: naming the field, its value and what would be accepted; one entry per field, at most ten.
    """
    if not isinstance(config, Mapping):
        raise _error("", type(config).__name__, "a JSON object")
    _check_shape(config)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not _MODEL_TYPE.fullmatch(model_type):
        raise _error("model_type", model_type, "the name of an architecture, for instance 'llama'")
    wrong = [error for path, part, kind in _typed_parts(config) for error in _check_part(path, part, kind)][:10]
    if wrong:
        raise ConfigError(wrong[0].message, errors=[entry for error in wrong for entry in error.errors])
    for path, part in _parts(config, ""):
        _check_products(path, part)
    return _without_infinities(config)


def check_built(config: Mapping[str, Any], facts: Mapping[str, object], *, is_hollow: bool) -> None:
    """What shows once the classes have put their defaults to what a config leaves out.

    Heads of no width are refused where a class takes the 0 by its word; to others it means that none is given.

    Args:
        config: as `check` accepted it.
        facts: of the text config, every default in it.
        is_hollow: whether the model has weights without elements, or cannot be built.

    Raises:
        ConfigError: naming the field, its value and what would be accepted.
    """
    for error in _check_heads("", facts):
        raise error
    for path, part in _parts(config, "") if is_hollow else ():
        if part.get("head_dim") == 0:
            accepted = f"an integer from 1 to {2**17}, or none: hidden_size / num_attention_heads"
            raise _error(f"{path}.head_dim".removeprefix("."), 0, accepted)


def _without_infinities(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_infinities(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name != _MAY_BE_INFINITE
    }


def _check_shape(config: Mapping[str, Any]) -> None:
    """Depth, number of values, lengths, and values that JSON has no word for. Iterative: depth is what is being checked."""
    pending: list[tuple[str, object, int]] = [("", config, 1)]
    num_values = 0
    while pending:
        path, value, depth = pending.pop()
        num_values += 1
        if num_values > MAX_VALUES:
            raise _error(path, "the whole config", f"at most {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise _error(path[:200], f"nested {depth} deep", f"at most {MAX_DEPTH} levels")
        if isinstance(value, Mapping):
            for key, item in value.items():
                if not isinstance(key, str) or len(key) > 256:
                    raise _error(path, f"the key {_shown(key)}", "names of at most 256 characters")
                pending.append((f"{path}.{key}".removeprefix("."), item, depth + 1))
        elif isinstance(value, list):
            if len(value) > MAX_LIST_LENGTH:
                raise _error(path, f"a list of {len(value)}", f"at most {MAX_LIST_LENGTH} entries")
            pending.extend((path, item, depth + 1) for item in value)
        elif isinstance(value, str):
            if len(value) > MAX_TEXT_LENGTH:
                raise _error(path, f"a text of {len(value)} characters", f"at most {MAX_TEXT_LENGTH}")
        elif isinstance(value, float):
            if not math.isfinite(value) and not (value > 0 and path.endswith(_MAY_BE_INFINITE)):
                raise _error(path, value, "a finite number")
            if math.isfinite(value) and abs(value) > MAX_FLOAT:
                raise _error(path, value, f"a number of magnitude at most {MAX_FLOAT:.3g}")
        elif isinstance(value, int):
            if abs(value) > MAX_INTEGER:
                raise _error(path, value, f"an integer of magnitude at most {MAX_INTEGER}")
        elif value is not None:
            raise _error(path, type(value).__name__, "a JSON value")


def _parts(config: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config and the configs in it: `text_config`, `vision_config` and whatever else is an object."""
    yield path, config
    for name, value in config.items():
        if isinstance(value, Mapping) and name not in _NOT_SIZES:
            yield from _parts(value, f"{path}.{name}".removeprefix("."))


_LABELS = ("id2label", "label2id")
# Objects whose entries are no sizes of modules, and are never given to transformers as such.
_NOT_SIZES = (
    "quantization_config",
    "compression_config",
    "id2label",
    "label2id",
    "task_specific_params",
    "auto_map",
    *_ROPE,
)
# Mamba-2 configs are written with an upper limit of Infinity, which is no JSON; it has no bearing on shapes and is left out.
_MAY_BE_INFINITE = "time_step_limit"


def _typed_parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Every part with its architecture; a part that names none has that of the whole."""
    whole = config["model_type"]
    for path, part in _parts(config, ""):
        own = part.get("model_type")
        yield path, part, own if isinstance(own, str) else whole


def _check_part(path: str, part: Mapping[str, Any], model_type: str) -> Iterator[ConfigError]:
    for name, value in part.items():
        where = f"{path}.{name}".removeprefix(".")
        if name in _LABELS and isinstance(value, Mapping) and len(value) > MAX_LABELS:
            yield _error(where, f"an object of {len(value)}", f"at most {MAX_LABELS} entries")
        elif name in _ROPE and isinstance(value, Mapping):
            yield from _check_rope(where, value)
        else:
            yield from _check_field(where, name, value, model_type)
    yield from _check_heads(path, part)


def _check_field(path: str, name: str, value: object, model_type: str) -> Iterator[ConfigError]:
    bound = next((b for b in _bounds() if b.names.fullmatch(name)), None)
    if bound is None:
        return
    accepted = f"an integer from {bound.low} to {bound.high}"
    is_null_refused = name in _NOT_NULL and model_type not in _NOT_NULL[name]
    if (value is None and is_null_refused) or (bound.exact and isinstance(value, list) and model_type not in _LISTS.get(name, ())):
        yield _error(path, value, accepted)
        return
    if isinstance(value, Mapping) and model_type in _MAPPINGS.get(name, ()):
        value = list(value.values())
    if isinstance(value, float) and value.is_integer() and model_type in _FLOATS.get(name, ()):
        value = int(value)
    for number in _flat(value):
        is_integer = isinstance(number, int) and not isinstance(number, bool)
        if (isinstance(number, int) and is_integer and not bound.low <= number <= bound.high) or (bound.exact and not is_integer):
            yield _error(path, number, accepted)
            return


def _check_rope(path: str, rope: Mapping[str, Any]) -> Iterator[ConfigError]:
    """Of rotary positions: their kind is a word, their factors are numbers above zero; a model may have one set per kind of layer.

    Source: transformers, modeling_rope_utils.py, RopeParameters.
    """
    for name, value in rope.items():
        where = f"{path}.{name}"
        if isinstance(value, Mapping):
            yield from _check_rope(where, value)
        elif name in ("rope_type", "type"):
            if not isinstance(value, str):
                yield _error(where, value, "a word, for instance 'default', 'linear' or 'yarn'")
        elif name in _ROPE_POSITIVE:
            numbers = value if name in _ROPE_LISTS and isinstance(value, list) else [value]
            for number in numbers:
                if number is not None and not (_is_number(number) and 0 < number <= _MAX_ROPE):
                    yield _error(where, number, f"a number above 0 and at most {_MAX_ROPE:g}")
                    break


_ROPE_LISTS = ("short_factor", "long_factor")
_ROPE_POSITIVE = ("factor", "rope_theta", "attention_factor", "original_max_position_embeddings", "high_freq_factor", *_ROPE_LISTS)
_MAX_ROPE = 1e12
"""A thousand times the largest published base (1e9, Mistral 3); factors are far below."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_heads(path: str, part: Mapping[str, Any]) -> Iterator[ConfigError]:
    """Every key and value head serves as many query heads as the next: true of all configs that transformers and publications have.

    Source: transformers, integrations/sdpa_attention.py, repeat_kv by num_attention_heads // num_key_value_heads.
    """
    heads, shared = part.get("num_attention_heads"), part.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and shared > 0 and heads % shared:
        yield _error(f"{path}.num_key_value_heads".removeprefix("."), shared, f"a divisor of num_attention_heads ({heads})")


def _flat(value: object) -> Iterator[object]:
    """The value, or the entries of a list of sizes (one per layer or stage) and of pairs in it; nulls mean the default."""
    for item in value if isinstance(value, list) else (value,):
        yield from (entry for entry in (item if isinstance(item, list) else (item,)) if entry is not None)


def _check_products(path: str, part: Mapping[str, Any]) -> None:
    """Number of modules and of parameters, from what nearly every architecture has: attention, MLPs, experts, embeddings."""
    layers, hidden, experts = _largest(part, _LAYERS), _largest(part, _HIDDEN), max(1, _largest(part, _EXPERTS))
    intermediate, vocabulary = _largest(part, _INTERMEDIATE), _largest(part, _VOCABULARY)
    where = f"{path}." if path else ""
    if layers * experts > MAX_MODULES:
        raise _error(f"{where}num_hidden_layers × experts", f"{layers} × {experts}", f"a product of at most {MAX_MODULES}")
    dense = layers * 4 * hidden * hidden + 2 * vocabulary * hidden
    # `intermediate_size` is that of one expert in some configs and of the dense layers in others: the smallest given one is an expert's.
    smallest = min((n for name in _INTERMEDIATE if (n := _largest(part, (name,))) > 0), default=0)
    estimate = dense + 3 * layers * hidden * max(intermediate, experts * smallest)
    if estimate > MAX_PARAMETERS:
        sizes = (
            f"{estimate:.3g} from {layers} layers, hidden {hidden}, intermediate {intermediate}, {experts} experts, vocabulary {vocabulary}"
        )
        raise _error(f"{where}num_parameters", sizes, f"at most {MAX_PARAMETERS:.3g} parameters")


def _largest(part: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """The largest integer under any of the names, in lists too; 0 without one."""
    found = [0]
    for name in names:
        value = part.get(name)
        found.extend(item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))
    return max(found)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _error(path: str, value: object, accepted: str) -> ConfigError:
    field = f"model.config.{path}" if path else "model.config"
    shown = value if isinstance(value, str) and " " in value else _shown(value)
    return ConfigError(f"{field}: {shown} is out of bounds; accepted: {accepted}", field=field)
