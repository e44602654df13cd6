"""Tiny models of every family, in every training mode, built in memory.

The sizes are all different, so that a tensor can be recognised by its shape: h = 160, f = 272, a = 4, k = 2, d = 24, V = 352, r = 6.
"""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, RANK, POSITIONS = 160, 272, 4, 2, 24, 352, 6, 512
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_WIDTH = 6, 2, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """A LoRA adapter."""

    r: int = RANK
    targets: tuple[str, ...] | str = "all-linear"
    dropout: float = 0.0
    dora: bool = False
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    trained_tokens: tuple[tuple[str, int], ...] = ()
    """(module, number of tokens): `trainable_token_indices`."""
    lora_bias: bool = False
    rslora: bool = False
    task_type: str = "CAUSAL_LM"
    bias: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How a model is loaded and trained, as far as the types of its tensors go."""

    load_dtype: torch.dtype = torch.bfloat16
    quant: str | None = None
    """None, `nf4` or `int8`."""
    adapter: AdapterSpec | None = None
    adapter_dtype: torch.dtype | None = None
    """float32: PEFT's default. bfloat16: what TRL casts quantized models' adapters to. None without adapter."""
    prepared: bool = False
    """PEFT's `prepare_model_for_kbit_training` was called."""
    autocast: bool = False
    """`bf16=True` or `fp16=True`: accelerate's autocast around the forward pass, its outputs cast to float32."""
    autocast_dtype: torch.dtype = torch.bfloat16
    compute_dtype: torch.dtype = torch.bfloat16
    """`bnb_4bit_compute_dtype`."""
    double_quant: bool = True

    @property
    def is_cast_by_trl(self) -> bool:
        """Quantized models get 16-bit adapters from TRL alone, which casts all that is trained but DoRA's magnitudes."""
        return self.quant is not None and self.adapter_dtype is torch.bfloat16

    @property
    def autocasts_adapter(self) -> bool:
        """`autocast_adapter_dtype`, PEFT's default."""
        return self.quant is not None or self.adapter_dtype is torch.float32

    def with_adapter(self, **changes: Any) -> "Mode":
        """The same with fields of the adapter changed."""
        assert self.adapter is not None
        return replace(self, adapter=replace(self.adapter, **changes))


_LORA, _F32, _BF16 = AdapterSpec(), torch.float32, torch.bfloat16

MODES: Mapping[str, Mode] = MappingProxyType(
    {
        "full_bf16": Mode(),
        "full_bf16_autocast": Mode(autocast=True),
        "full_fp32": Mode(load_dtype=_F32),
        "full_fp32_autocast": Mode(load_dtype=_F32, autocast=True),
        "lora_bf16_bf16": Mode(adapter=_LORA, adapter_dtype=_BF16),
        "lora_bf16_bf16_autocast": Mode(adapter=_LORA, adapter_dtype=_BF16, autocast=True),
        "lora_bf16_fp32": Mode(adapter=_LORA, adapter_dtype=_F32),
        "lora_bf16_fp32_autocast": Mode(adapter=_LORA, adapter_dtype=_F32, autocast=True),
        "lora_fp32_fp32_autocast": Mode(load_dtype=_F32, adapter=_LORA, adapter_dtype=_F32, autocast=True),
        "qlora_bf16": Mode(quant="nf4", adapter=_LORA, adapter_dtype=_BF16),
        # TRL, given a model
        "qlora_bf16_autocast": Mode(quant="nf4", adapter=_LORA, adapter_dtype=_BF16, autocast=True),
        "qlora_fp32": Mode(quant="nf4", adapter=_LORA, adapter_dtype=_F32),
        "qlora_fp32_autocast": Mode(quant="nf4", adapter=_LORA, adapter_dtype=_F32, autocast=True),
        # TRL, given a model's name
        "qlora_fp32_rest_autocast": Mode(load_dtype=_F32, quant="nf4", adapter=_LORA, adapter_dtype=_BF16, autocast=True),
        "qlora_prepared": Mode(quant="nf4", adapter=_LORA, adapter_dtype=_F32, prepared=True),
        "qlora_prepared_autocast": Mode(quant="nf4", adapter=_LORA, adapter_dtype=_F32, prepared=True, autocast=True),
        "int8_fp32": Mode(quant="int8", adapter=_LORA, adapter_dtype=_F32),
        "int8_fp32_autocast": Mode(quant="int8", adapter=_LORA, adapter_dtype=_F32, autocast=True),
        "int8_bf16_autocast": Mode(quant="int8", adapter=_LORA, adapter_dtype=_BF16, autocast=True),
        "int8_prepared_autocast": Mode(quant="int8", adapter=_LORA, adapter_dtype=_F32, prepared=True, autocast=True),
    }
)
"""Every mode by name: what is trained, the base's type or treatment, the adapters' type, whether autocast is on."""

_SIZES = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
_DENSE = _SIZES | {"intermediate_size": INTERMEDIATE}
_GROUPED = _DENSE | {"num_key_value_heads": KV_HEADS}
_GATED = _GROUPED | {"head_dim": HEAD_DIM}
_MOE = _SIZES | {"num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "num_experts_per_tok": EXPERTS_PER_TOKEN}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": HEAD_DIM}
_SHARED = {"intermediate_size": INTERMEDIATE, "moe_intermediate_size": EXPERT_WIDTH, "n_routed_experts": EXPERTS, "n_shared_experts": 1}
_DEEPSEEK = (_SIZES | _LATENT | _SHARED) | {
    "num_experts_per_tok": EXPERTS_PER_TOKEN,
    "first_k_dense_replace": 0,
    "n_group": 2,
    "topk_group": 2,
}
_GPT = {"n_embd": HIDDEN, "n_head": HEADS, "vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_inner": INTERMEDIATE}
_PAD = {"pad_token_id": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the tiny config of one architecture is made."""

    config_class: str
    values: Mapping[str, object]
    attention: str = "sdpa"
    layers_field: str = "num_hidden_layers"
    per_layer: Mapping[str, str] = field(default_factory=dict)
    """Fields that need one entry per layer, and that entry."""
    around: str | None = None
    """Config class of a model that the text decoder lies in."""
    beside: Mapping[str, object] = field(default_factory=dict)
    """Fields of that config."""

    def config(self, layers: int, **overrides: object) -> PretrainedConfig:
        values = {"tie_word_embeddings": False} | dict(self.values) | {self.layers_field: layers}
        values |= {name: [entry] * layers for name, entry in self.per_layer.items()}
        made: PretrainedConfig = getattr(transformers, self.config_class)(**(values | overrides))
        if self.around is None:
            return made
        whole: PretrainedConfig = getattr(transformers, self.around)(text_config=made.to_dict(), **self.beside)
        return whole


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(config_class="LlamaConfig", values=_GATED),
        "mistral": Family(config_class="MistralConfig", values=_GATED | {"sliding_window": None}),
        "mistral_window": Family(config_class="MistralConfig", values=_GATED | {"sliding_window": 12}),
        "qwen2": Family(config_class="Qwen2Config", values=_GROUPED),
        "qwen3": Family(config_class="Qwen3Config", values=_GATED),
        "gemma": Family(config_class="GemmaConfig", values=_GATED),
        "gemma2": Family(config_class="Gemma2Config", values=_GATED | {"sliding_window": 4096}, attention="eager"),
        "gemma3_text": Family(
            config_class="Gemma3TextConfig", values=_GATED | {"sliding_window": 4096}, per_layer={"layer_types": "full_attention"}
        ),
        "phi3": Family(config_class="Phi3Config", values=_GROUPED | _PAD),
        "olmo2": Family(config_class="Olmo2Config", values=_GROUPED),
        "olmo": Family(config_class="OlmoConfig", values=_GROUPED),
        "gpt_neox": Family(config_class="GPTNeoXConfig", values=_DENSE),
        "gpt2": Family(config_class="GPT2Config", values=_GPT, layers_field="n_layer"),
        "gpt_bigcode": Family(config_class="GPTBigCodeConfig", values=_GPT, layers_field="n_layer"),
        "falcon": Family(
            config_class="FalconConfig", values=_SIZES | {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS, "alibi": False}
        ),
        "falcon_old": Family(
            config_class="FalconConfig",
            values=_SIZES | {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "alibi": False},
        ),
        "starcoder2": Family(config_class="Starcoder2Config", values=_GROUPED),
        "stablelm": Family(config_class="StableLmConfig", values=_GROUPED),
        "phi": Family(config_class="PhiConfig", values=_GROUPED),
        "opt": Family(config_class="OPTConfig", values=_SIZES | {"ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN}),
        "bloom": Family(
            config_class="BloomConfig",
            values={"hidden_size": HIDDEN, "n_head": HEADS, "vocab_size": VOCABULARY},
            layers_field="n_layer",
            attention="eager",
        ),
        "cohere": Family(config_class="CohereConfig", values=_GROUPED),
        "cohere2": Family(
            config_class="Cohere2Config",
            values=_GROUPED | {"sliding_window": 4096},
            per_layer=MappingProxyType({"layer_types": "sliding_attention"}),
        ),
        "olmo3": Family(
            config_class="Olmo3Config",
            values=_GROUPED | {"sliding_window": 4096},
            per_layer=MappingProxyType({"layer_types": "full_attention"}),
        ),
        "granite": Family(config_class="GraniteConfig", values=_GROUPED),
        "smollm3": Family(config_class="SmolLM3Config", values=_GROUPED | _PAD),
        "mixtral": Family(config_class="MixtralConfig", values=_MOE | {"intermediate_size": EXPERT_WIDTH, "num_local_experts": EXPERTS}),
        "deepseek_v2": Family(config_class="DeepseekV2Config", values=_DEEPSEEK | {"topk_method": "group_limited_greedy", "topk_group": 1}),
        "deepseek_v2_lite": Family(config_class="DeepseekV2Config", values=_DEEPSEEK | {"topk_method": "greedy", "q_lora_rank": None}),
        "deepseek_v3": Family(config_class="DeepseekV3Config", values=_DEEPSEEK | {"norm_topk_prob": True, "num_key_value_heads": HEADS}),
        "glm4_moe": Family(
            config_class="Glm4MoeConfig",
            values=_MOE | _SHARED | {"first_k_dense_replace": 0, "n_group": 2, "topk_group": 2, "use_qk_norm": True},
        ),
        "gpt_oss": Family(
            config_class="GptOssConfig",
            values=_MOE | {"intermediate_size": EXPERT_WIDTH, "num_local_experts": EXPERTS, "sliding_window": 4096},
            attention="eager",
        ),
        "olmoe": Family(
            config_class="OlmoeConfig",
            values=_GROUPED | {"intermediate_size": EXPERT_WIDTH, "num_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN},
        ),
        "qwen2_moe": Family(
            config_class="Qwen2MoeConfig",
            values=_GROUPED
            | {"moe_intermediate_size": EXPERT_WIDTH, "shared_expert_intermediate_size": 56, "num_experts": EXPERTS}
            | {"num_experts_per_tok": EXPERTS_PER_TOKEN},
        ),
        "qwen3_moe": Family(
            config_class="Qwen3MoeConfig",
            values=_MOE
            | {"intermediate_size": INTERMEDIATE, "moe_intermediate_size": EXPERT_WIDTH, "num_experts": EXPERTS, "norm_topk_prob": True},
        ),
    }
)

_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}

COMPOSITES: Mapping[str, Family] = MappingProxyType(
    {
        "gemma3": replace(
            FAMILIES["gemma3_text"],
            around="Gemma3Config",
            beside={"vision_config": _VISION, "image_token_index": 1},
            per_layer={"layer_types": "sliding_attention"},
        ),
        "got_ocr2": replace(
            FAMILIES["qwen2"],
            around="GotOcr2Config",
            attention="eager",
            beside={"vision_config": _VISION | {"output_channels": 32, "mlp_dim": 32, "global_attn_indexes": []}, "image_token_index": 1},
        ),
    }
)
"""Text decoders inside another model, which train on text alone."""


def family_of(name: str) -> Family:
    """A family of either kind by name."""
    return COMPOSITES[name] if name in COMPOSITES else FAMILIES[name]


def build(
    family: str,
    mode: Mode,
    layers: int,
    *,
    attention: str | None = None,
    experts: str | None = None,
    gc: bool | None = None,
    every_n_layers: int = 1,
    input_grads: bool | None = None,
    config: Mapping[str, object] | None = None,
    labels: int | None = None,
) -> nn.Module:
    """A model ready to train.

    Args:
        attention: `attn_implementation`; the family's default if None.
        experts: `experts_implementation` of mixture-of-experts models.
        gc: gradient checkpointing: None off, False non-reentrant, True reentrant.
        input_grads: whether the embedding's output requires gradients; by default with an adapter under checkpointing.
        config: fields of the config to override.
        labels: of a classification head in place of the vocabulary.
    """
    kind = family_of(family)
    torch.manual_seed(0)
    extra = {"experts_implementation": experts} if experts else {}
    auto = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    classes = {} if labels is None else {"num_labels": labels, "pad_token_id": 0}
    model = auto.from_config(
        kind.config(layers, **(dict(config or {}) | classes)),
        dtype=mode.load_dtype,
        attn_implementation=attention or kind.attention,
        **extra,
    )
    model.config.use_cache = False
    _no_dead_rows(model)
    if mode.quant is not None:
        quantize(model, mode)
    if mode.prepared:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    whole: nn.Module = model
    if mode.adapter is not None:
        whole = _adapt(model, mode)
    whole.train()
    if gc is not None:
        model.activation_checkpointing_enable({"use_reentrant": gc}, every_n_layers=every_n_layers)
    if input_grads if input_grads is not None else (gc is not None and mode.adapter is not None):
        model.enable_input_require_grads()
    return whole


def _no_dead_rows(model: PreTrainedModel) -> None:
    # routers initialised to zeros would send every token to the same expert
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)


def _adapt(model: PreTrainedModel, mode: Mode) -> nn.Module:
    spec = mode.adapter
    assert spec is not None
    lora = LoraConfig(
        r=spec.r,
        target_modules=spec.targets if isinstance(spec.targets, str) else list(spec.targets),
        target_parameters=list(spec.target_parameters) or None,
        lora_dropout=spec.dropout,
        use_dora=spec.dora,
        use_rslora=spec.rslora,
        lora_bias=spec.lora_bias,
        bias=spec.bias,
        modules_to_save=list(spec.modules_to_save) or None,
        trainable_token_indices={name: list(range(number)) for name, number in spec.trained_tokens} or None,
        task_type=spec.task_type,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is about to go
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT corrects it for Conv1D, and says so
        warnings.filterwarnings(
            "ignore", message="The following (rank|alpha)_pattern keys"
        )  # PEFT's own rewrite of targets on fused experts
        # PEFT's own rewrite of expert names leaves rank patterns for layers that have none
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")  # such adapters cannot be merged: nothing is here
        # PEFT looks for the base model's config on the Hub to say that embeddings were saved
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings", category=UserWarning)
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=mode.autocasts_adapter)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and mode.is_cast_by_trl and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    whole: nn.Module = adapted
    return whole


def bnb_config(mode: Mode) -> BitsAndBytesConfig:
    """The quantization of a mode as users write it."""
    if mode.quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=mode.quant,
        bnb_4bit_use_double_quant=mode.double_quant,
        bnb_4bit_compute_dtype=mode.compute_dtype,
    )


def quantize(model: PreTrainedModel, mode: Mode) -> None:
    """Replace linear layers as `from_pretrained` does, and quantize the weights they had."""
    before = dict(model.named_modules())
    config = bnb_config(mode)
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), config)
    fill: Callable[[nn.Module, torch.Tensor], torch.Tensor] = _int8_weight if mode.quant == "int8" else _packed_weight
    for name, module in list(model.named_modules()):
        if not isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            continue
        old = before[name]
        weight = old.weight.data.T.contiguous() if isinstance(old, Conv1D) else old.weight.data
        if old.bias is not None:
            module.bias = nn.Parameter(old.bias.data, requires_grad=False)
        module.weight = fill(module, weight)
    # what from_pretrained leaves on a model that bitsandbytes quantized; PEFT chooses its layers by it
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = mode.quant != "int8", mode.quant == "int8"
    model.is_quantized, model.quantization_method = True, config.quant_method


def _packed_weight(module: Any, weight: torch.Tensor) -> Any:
    return bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=module.weight.compress_statistics,
        quant_type=module.weight.quant_type,
        quant_storage=module.weight.quant_storage,
        module=module,
    ).to("cpu")


def _int8_weight(module: Any, weight: torch.Tensor) -> Any:
    return bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")


def stored_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers, and every tensor of a quantization state."""
    tensors = [p.data for p in model.parameters()] + list(model.buffers())
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code]
            if state.nested:
                tensors += [state.offset, state.state2.absmax, state.state2.code]
        for owner in (weight, getattr(module, "state", None)):
            for part in ("CB", "SCB"):
                value = getattr(owner, part, None) if isinstance(owner, bnb.nn.Int8Params | bnb.MatmulLtState) else None
                if isinstance(value, torch.Tensor):
                    tensors.append(value)
    return tensors


logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of every cast to float16
transformers.utils.logging.set_verbosity_error()
