"""Fields that change memory and that no formula covers: what each does, and for which of its values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from estimator.recipe import Loss, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmodelled:
    """What a field does to memory."""

    effect: str
    inert: tuple[object, ...] = ()
    """Values that change nothing, beside those that are false."""
    bears: Callable[[Recipe], bool] = lambda recipe: True
    """Whether it changes anything in this run."""


def _keeps_caches(recipe: Recipe) -> bool:
    """Source: transformers, models/*/modeling_*.py: `use_cache` is switched off under gradient checkpointing."""
    return recipe.training is not None and not recipe.training.gradient_checkpointing


def _checkpoints(recipe: Recipe) -> bool:
    return recipe.training is not None and recipe.training.gradient_checkpointing


def _scores_labelled_tokens_alone(recipe: Recipe) -> bool:
    """Source: trl, trainer/utils.py, add_fused_lm_head; trainer/sft_trainer.py, _chunked_cross_entropy_loss (1.4–1.15)."""
    return recipe.training is not None and recipe.training.loss in (Loss.TRL_TILED, Loss.TRL_CHUNKED)


_DISTRIBUTED = "it spreads the model or its states over several processes"
_COMPILED = "compiled kernels keep and take other tensors than the operators they replace"
_ELSEWHERE = "it trains on another device than a CUDA card"
_APEX = "Apex keeps float32 master copies of its own"
_FEWER_SCORED = "TRL's fused loss takes memory for tokens with a label alone, and all tokens are counted"
_OWN_TENSORS = "this variant of LoRA has tensors of its own"
_AT_START = "the weights are decomposed or data is run through the model when the adapter is made"
_BACKENDS = ("auto", "amp", "cuda_amp", "cpu_amp")

# Source: transformers 5.23, training_args.py and trainer.py; trl 1.16, trainer/sft_config.py and sft_trainer.py.
TRAINING: Mapping[str, Unmodelled] = {
    "activation_offloading": Unmodelled(effect="kept activations are moved to the host"),
    "assistant_only_loss": Unmodelled(effect=_FEWER_SCORED, bears=_scores_labelled_tokens_alone),
    "auto_find_batch_size": Unmodelled(effect="the batch is made smaller each time memory runs out"),
    "chat_template_path": Unmodelled(effect="a template taken from a tokenizer brings its tokens, for which the embeddings are resized"),
    "completion_only_loss": Unmodelled(effect=_FEWER_SCORED, bears=_scores_labelled_tokens_alone),
    "fp16_backend": Unmodelled(effect=_APEX, inert=_BACKENDS),
    "full_determinism": Unmodelled(effect="deterministic kernels and smaller cuBLAS workspaces are taken"),
    "half_precision_backend": Unmodelled(effect=_APEX, inert=_BACKENDS),
    "mp_parameters": Unmodelled(effect=_DISTRIBUTED),
    "neftune_noise_alpha": Unmodelled(effect="noise of the embeddings' size is added to them"),
    "no_cuda": Unmodelled(effect=_ELSEWHERE),
    "optim_target_modules": Unmodelled(effect="it decides which parameters get another kind of optimizer state"),
    "parallelism_config": Unmodelled(effect=_DISTRIBUTED),
    "past_index": Unmodelled(effect="the last step's hidden states are kept for the next one", inert=(-1,)),
    "torch_compile": Unmodelled(effect=_COMPILED),
    "torch_compile_backend": Unmodelled(effect=_COMPILED),
    "torch_compile_mode": Unmodelled(effect=_COMPILED),
    "torch_empty_cache_steps": Unmodelled(effect="unused segments are given back now and then, so that less than shown is reserved"),
    "torchdynamo": Unmodelled(effect=_COMPILED),
    "tp_size": Unmodelled(effect=_DISTRIBUTED, inert=(1,)),
    "use_cache": Unmodelled(effect="keys and values of all layers are kept through the forward pass", bears=_keeps_caches),
    "use_cpu": Unmodelled(effect=_ELSEWHERE),
    "use_mps_device": Unmodelled(effect=_ELSEWHERE),
}

# Source: transformers 5.23, generation/utils.py, _sample.
GENERATION: Mapping[str, Unmodelled] = {"do_sample": Unmodelled(effect="sampling sorts and filters the logits of one token per sequence")}

# Source: peft 0.21, tuners/lora/config.py, LoraConfig.
LORA: Mapping[str, Unmodelled] = {
    "alora_invocation_tokens": Unmodelled(effect=_OWN_TENSORS),
    "arrow_config": Unmodelled(effect=_OWN_TENSORS),
    "corda_config": Unmodelled(effect=_AT_START),
    "ensure_weight_tying": Unmodelled(effect="adapters or copies of tied modules are tied too"),
    "eva_config": Unmodelled(effect=_AT_START),
    "init_lora_weights": Unmodelled(effect=_AT_START, inert=(True, "true", "gaussian", "orthogonal")),
    "kasa_config": Unmodelled(effect=_OWN_TENSORS),
    "layer_replication": Unmodelled(effect="layers are repeated, each with an adapter of its own"),
    "loftq_config": Unmodelled(effect=_AT_START),
    "lora_ga_config": Unmodelled(effect=_AT_START),
    "megatron_config": Unmodelled(effect=_DISTRIBUTED),
    "monteclora_config": Unmodelled(effect=_OWN_TENSORS),
    "use_bdlora": Unmodelled(effect=_OWN_TENSORS),
    "use_qalora": Unmodelled(effect=_OWN_TENSORS),
    "velora_config": Unmodelled(effect=_OWN_TENSORS),
}

# Source: transformers 5.23, utils/quantization_config.py, BitsAndBytesConfig.
QUANTIZATION: Mapping[str, Unmodelled] = {
    "llm_int8_enable_fp32_cpu_offload": Unmodelled(effect="a part of the weights may lie on the host"),
}

_CHECKPOINTING: Mapping[str, Unmodelled] = {
    "offload": Unmodelled(effect="inputs of checkpointed layers are moved to the host", bears=_checkpoints),
    "selective": Unmodelled(effect="attention outputs are kept beside the layers' inputs", bears=_checkpoints),
}

_SECTIONS: Mapping[str, Mapping[str, Unmodelled]] = {
    "training": TRAINING,
    "training.gradient_checkpointing_kwargs": _CHECKPOINTING,
    "inference": GENERATION,
    "peft": LORA,
    "quantization": QUANTIZATION,
}

# What evaluation during training depends on; nothing of it matters without `eval_strategy` or `eval_on_start`.
# Source: transformers 5.23, trainer.py, evaluation_loop and prediction_step.
EVALUATION = frozenset(
    (
        *("batch_eval_metrics", "bf16_full_eval", "do_eval", "eval_accumulation_steps", "eval_delay", "eval_do_concat_batches"),
        *("eval_on_start", "eval_packing", "eval_steps", "eval_strategy", "eval_use_gather_object", "fp16_full_eval"),
        *("include_for_metrics", "include_inputs_for_metrics", "per_device_eval_batch_size", "prediction_loss_only"),
    )
)


def evaluates(training: Mapping[str, object]) -> bool:
    """Whether fields of TrainingArguments switch evaluation during training on."""
    strategy = training.get("eval_strategy")
    is_off = not strategy or str(strategy).rpartition(".")[2].lower() == "no"
    return not is_off or bool(training.get("eval_on_start"))


def changes_memory(field: Unmodelled | None, value: object) -> bool:
    """Whether a field with this value changes memory in some run."""
    return field is not None and bool(value) and value not in field.inert


def bears(field: str, recipe: Recipe) -> bool:
    """Whether a field, by its full name, changes memory in this run."""
    return _known(field).bears(recipe)


def effect(field: str) -> str:
    """What a field, by its full name, does to memory."""
    return _known(field).effect


def _known(field: str) -> Unmodelled:
    section, _, name = field.rpartition(".")
    return _SECTIONS[section][name]
