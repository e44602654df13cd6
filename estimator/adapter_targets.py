"""Which modules and parameters PEFT adapts: its defaults, its matching rules, and its rewriting of expert names."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from estimator.errors import RequestError
from estimator.recipe import Adapter

ALL_LINEAR = "all-linear"

_QUERY_VALUE = ("q_proj", "v_proj")
_FUSED = ("query_key_value",)
_BERT = ("query", "value")

# Source: peft 0.21.2, utils/constants.py, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.
DEFAULT_TARGETS: Mapping[str, tuple[str, ...] | str] = {
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("bart", "opt", "gptj", "gpt_neo"), _QUERY_VALUE),
    **dict.fromkeys(("llama", "llama4", "mistral", "mixtral", "stablelm", "qwen2", "qwen3"), _QUERY_VALUE),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _QUERY_VALUE),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "falcon", "RefinedWeb", "RefinedWebModel"), _FUSED),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), _BERT),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "blip-2": ("q", "v", *_QUERY_VALUE),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": (*_QUERY_VALUE, "fc1", "fc2"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}

# Types whose config class calls itself otherwise. Source: transformers, models/auto/configuration_auto.py.
_SAME_CLASS = {"gpt-sw3": "gpt2"}

# Families whose experts were single modules before transformers 5, by the names these had.
# Source: transformers 5.23, conversion_mapping.py, _MODEL_TO_CONVERSION_PATTERN; peft adds mixtral itself.
MIXTRAL_LIKE = frozenset({"minimax", "minimax_m2", "mixtral"})
QWEN2_MOE_LIKE = frozenset(
    {
        *("Dots3NoteTextModel", "UnlimitedOcrTextModel", "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
        *("dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe"),
        *("longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text"),
        *("qwen3_omni_moe_thinker", "solar_open"),
    }
)
# Old module name → fused parameter. Source: peft, utils/transformers_weight_conversion.py, _MOE_TARGET_MODULE_MAPPING.
_MIXTRAL_NAMES = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_QWEN2_MOE_NAMES = {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
# Source: same file, _MOE_FUSED_TARGETS.
_FUSED_PARAMETER = "gate_up_proj"

# Mamba's kernels read these weights themselves, past the adapter. Source: peft, tuners/tuners_utils.py, _check_lora_target_modules_mamba.
_MAMBA_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_MAMBA_REFUSED = frozenset({"out_proj", "conv1d"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What to adapt, in the form that PEFT's matching reads."""

    modules: frozenset[str] | str | None
    """Names and suffixes, or one regular expression; None where only parameters are targeted."""
    parameters: frozenset[str] = frozenset()
    """Suffixes of parameter names."""
    rank_pattern: tuple[tuple[str, int], ...] = ()
    """(regular expression for the end of a name, rank), the first match counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleNames:
    """What the rules read of a model: names only."""

    model_type: str
    modules: tuple[str, ...]
    linear: frozenset[str]
    """nn.Linear, classes derived from it, and Conv1D."""
    output_embedding: str | None
    parameters: tuple[str, ...]


def resolve(adapter: Adapter, names: ModuleNames, *, rewrites_experts: bool) -> Targets:
    """The targets after PEFT has filled in defaults, resolved `all-linear` and rewritten expert names.

    Args:
        adapter: the user's choices.
        names: names of the model's modules and parameters.
        rewrites_experts: whether names of single experts become fused parameters.

    Returns:
        what `Matcher` matches.

    Raises:
        RequestError: if the model type has no default and nothing is named, or only one half of a fused pair is.

    Source: peft, tuners/lora/model.py, LoraModel._prepare_adapter_config; tuners/tuners_utils.py, BaseTuner.inject_adapter and
    _maybe_include_all_linear_layers; utils/transformers_weight_conversion.py, _convert_peft_config_moe.
    """
    parameters = frozenset(adapter.target_parameters)
    mapping = expert_names(names.model_type) if rewrites_experts else {}
    if mapping:
        rewritten = _rewrite(adapter, names, mapping)
        if rewritten is not None:
            return rewritten
    modules: frozenset[str] | str | None
    if adapter.target_modules is None:
        modules = _default_targets(adapter, names)
    elif not isinstance(adapter.target_modules, str):
        modules = frozenset(adapter.target_modules)
    elif is_all_linear(adapter):
        modules = all_linear(names)
    else:
        modules = adapter.target_modules
    return Targets(modules=modules, parameters=parameters, rank_pattern=adapter.rank_pattern)


def is_all_linear(adapter: Adapter) -> bool:
    """Whether the shorthand for every linear layer is used, in any case of letters."""
    return isinstance(adapter.target_modules, str) and adapter.target_modules.lower() == ALL_LINEAR


def all_linear(names: ModuleNames) -> frozenset[str]:
    """Every linear module but the output embedding."""
    return names.linear - {names.output_embedding or ""}


def expert_names(model_type: str) -> Mapping[str, str]:
    """Old names of expert projections → fused parameters, empty where nothing was fused."""
    if model_type in MIXTRAL_LIKE:
        return _MIXTRAL_NAMES
    if model_type in QWEN2_MOE_LIKE:
        return _QWEN2_MOE_NAMES
    return {}


def _default_targets(adapter: Adapter, names: ModuleNames) -> frozenset[str] | str | None:
    default = DEFAULT_TARGETS.get(_SAME_CLASS.get(names.model_type, names.model_type))
    if default is None:
        if adapter.target_parameters:
            return None
        raise RequestError(
            f"peft.target_modules: PEFT has no default for model type {names.model_type!r}; name modules, for instance "
            f"{_examples(names)}, or use 'all-linear'",
            field="peft.target_modules",
        )
    return default if isinstance(default, str) else frozenset(default)


def _rewrite(adapter: Adapter, names: ModuleNames, mapping: Mapping[str, str]) -> Targets | None:
    """Targets with single experts' names turned into fused parameters; None where a regular expression matches nothing."""
    if adapter.target_modules is None:
        wanted: frozenset[str] = frozenset()
    elif isinstance(adapter.target_modules, str):
        wanted = _leaf_names(adapter, names, mapping)
        if not wanted:
            return None
    else:
        wanted = frozenset(adapter.target_modules)
    parameters = set(adapter.target_parameters)
    remaining = set()
    halves = set()
    for target in sorted(wanted):
        old = next((name for name in mapping if target == name or target.endswith(f".{name}")), None)
        if old is None:
            remaining.add(target)
            continue
        parameters.add(mapping[old])
        if mapping[old] == _FUSED_PARAMETER:
            halves.add(old)
    needed = [name for name, fused in mapping.items() if fused == _FUSED_PARAMETER]
    if 0 < len(halves) < len(needed):
        missing = ", ".join(sorted(set(needed) - halves))
        raise RequestError(
            f"peft.target_modules: {', '.join(halves)} is fused with {missing} into {_FUSED_PARAMETER}: target both or neither",
            field="peft.target_modules",
        )
    ranks = dict(adapter.rank_pattern)
    if halves:
        # Two adapters of rank r side by side in one tensor: rank 2r.
        ranks[rf".*\.{re.escape(_FUSED_PARAMETER)}"] = adapter.r * len(needed)
    return Targets(modules=frozenset(remaining), parameters=frozenset(parameters), rank_pattern=tuple(ranks.items()))


def _leaf_names(adapter: Adapter, names: ModuleNames, mapping: Mapping[str, str]) -> frozenset[str]:
    """Last components of what a string targets, single experts included although they are fused now.

    Source: peft, utils/transformers_weight_conversion.py, _resolve_string_target_modules.
    """
    if is_all_linear(adapter):
        return frozenset(name.rpartition(".")[2] for name in all_linear(names)) | mapping.keys()
    matcher = Matcher(adapter, Targets(modules=str(adapter.target_modules)))
    matched = {name.rpartition(".")[2] for name in (*names.modules, *names.parameters) if matcher.matches(name)}
    containers: dict[str, set[str]] = {}
    for name in names.parameters:
        container, _, leaf = name.rpartition(".")
        containers.setdefault(leaf, set()).add(container)
    for old, fused in mapping.items():
        if any(matcher.matches(f"{container}.{old}") for container in containers.get(fused, ())):
            matched.add(old)
    return frozenset(matched)


class Matcher:
    """PEFT's matching rules for one adapter, with its regular expressions compiled once."""

    __slots__ = ("_adapter", "_excluded", "_is_excluded", "_layer", "_ranks", "_saved", "_targeted", "_targets")

    def __init__(self, adapter: Adapter, targets: Targets) -> None:
        self._adapter = adapter
        self._targets = targets
        self._targeted = _name_test(targets.modules or frozenset(), "peft.target_modules")
        self._is_excluded = _name_test(_as_names(adapter.exclude_modules), "peft.exclude_modules")
        self._excluded = bool(adapter.exclude_modules)
        self._saved = [_compile(rf"(^|.*\.){name}($|\..*)", "peft.modules_to_save") for name in adapter.modules_to_save]
        patterns = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in adapter.layers_pattern] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        self._layer = [_compile(pattern, "peft.layers_pattern") for pattern in patterns]
        self._ranks = [(_compile(rf"(.*\.)?({key})$", "peft.rank_pattern"), rank) for key, rank in targets.rank_pattern]

    def matches(self, module: str) -> bool:
        """Whether a module is adapted.

        Source: peft, tuners/tuners_utils.py, check_target_module_exists.
        """
        if self._excluded and self._is_excluded(module):
            return False
        if any(pattern.match(module) for pattern in self._saved) or not self._targeted(module):
            return False
        # A name given in full is not subject to the choice of layers.
        by_name = isinstance(self._targets.modules, frozenset) and module not in self._targets.modules
        return self._is_chosen_layer(module) if by_name and self._adapter.layers_to_transform else True

    def matches_parameter(self, parameter: str) -> bool:
        """Whether a parameter is adapted as such.

        Source: peft, tuners/tuners_utils.py, BaseTuner._inject_parameters.
        """
        return any(parameter == target or parameter.endswith(f".{target}") for target in self._targets.parameters)

    def rank(self, name: str) -> int:
        """Rank of the adapter for a module or parameter.

        Source: peft, utils/other.py, get_pattern_key.
        """
        return next((rank for pattern, rank in self._ranks if pattern.match(name)), self._adapter.r)

    def _is_chosen_layer(self, module: str) -> bool:
        match = next((m for m in (pattern.match(module) for pattern in self._layer) if m is not None), None)
        return match is not None and int(match["idx"]) in (self._adapter.layers_to_transform or ())


def refuse_mamba(model_type: str, modules: Iterable[str]) -> None:
    """Mamba's fused kernels bypass some modules, so PEFT refuses to adapt them.

    Raises:
        RequestError: if one of the modules is such a module of such a model.

    Source: peft, tuners/tuners_utils.py, _check_lora_target_modules_mamba.
    """
    if model_type not in _MAMBA_TYPES:
        return
    for module in modules:
        leaf = module.rpartition(".")[2]
        if leaf in _MAMBA_REFUSED:
            raise RequestError(
                f"peft.target_modules: PEFT refuses to adapt {leaf!r} of {model_type} models, whose kernels bypass it",
                field="peft.target_modules",
            )


def no_match(adapter: Adapter, names: ModuleNames) -> RequestError:
    """The error for targets that name nothing in the model."""
    if adapter.target_modules is None and not adapter.target_parameters:
        # Its default is lost when names of experts are rewritten: the empty set that remains is no longer "not given".
        problem = f"PEFT applies no default to {names.model_type} models, whose experts are fused"
    else:
        wanted = adapter.target_modules if adapter.target_modules is not None else adapter.target_parameters
        problem = f"{wanted!r} matches nothing in this {names.model_type} model"
    return RequestError(f"peft.target_modules: {problem}; name modules, for instance {_examples(names)}", field="peft.target_modules")


def _examples(names: ModuleNames) -> str:
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in names.modules if name in all_linear(names))
    return ", ".join(repr(leaf) for leaf in list(leaves)[:12]) or "nothing: it has no linear module"


def _as_names(names: tuple[str, ...] | str | None) -> frozenset[str] | str:
    if names is None:
        return frozenset()
    return names if isinstance(names, str) else frozenset(names)


def _name_test(names: frozenset[str] | str, field: str) -> Callable[[str], bool]:
    """A string is a regular expression for the whole name; a set holds names and suffixes that follow a dot."""
    if isinstance(names, str):
        pattern = _compile(names, field)
        return lambda module: pattern.fullmatch(module) is not None
    suffixes = tuple(f".{name}" for name in names)
    return lambda module: module in names or module.endswith(suffixes)


def _compile(pattern: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RequestError(f"{field}: {pattern!r} is not a regular expression: {error}", field=field) from None
