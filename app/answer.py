"""An estimate in the words of the contract, version 1."""

from collections.abc import Iterable, Mapping
from typing import Any

from app.card import Card
from app.versions import shown
from estimator.estimate import Estimate, Interval, LineItem, Notice, PhaseEstimate, RankEstimate
from estimator.phases import Item, Phase
from estimator.recipe import Adapter, Inference, Objective, Quantization, Recipe, Training
from estimator.stack import Stack

# What a card or a library refuses whatever the memory, by code.
REFUSALS = frozenset(
    {
        "adapter_on_head_refused",
        "bitsandbytes_needs_nvidia",
        "flash_attention_unsupported",
        "fp16_gradients_refused",
        "no_bfloat16",
        "outside_cuda",
        "own_code_not_run",
        "padding_free_refused",
        "trained_tokens_of_head_refused",
    }
)
SCHEMA_VERSION = 1
# The best first.
VERDICTS = ("fits", "tight", "does_not_fit")
# Notice of the estimator that says only `load` is known.
NOT_MODELLED = "not_modelled"

Json = dict[str, Any]
Explanations = Mapping[tuple[Phase, Item], Any]


def render_estimate(
    *,
    model: Json,
    recipe: Recipe,
    estimate: Estimate,
    explanations: Explanations,
    card: Card | None,
    interval: Interval | None,
    notices: Iterable[Notice],
    ignored: Iterable[str],
) -> Json:
    """The answer to `estimate`, ready for JSON."""
    modelled = is_modelled(estimate)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "parameters": {
            "total": estimate.parameters.total,
            "trainable": estimate.parameters.trainable,
            "adapter": estimate.parameters.adapter,
            "quantized": estimate.parameters.quantized,
        },
        "recipe": render_recipe(recipe),
        "engine": estimate.engine.value,
        "engine_reason": estimate.engine_reason,
        "stack": render_stack(recipe.stack),
        "peak": _peak(estimate, interval) if modelled else None,
        "steady_state_bytes": estimate.steady_state_bytes,
        "phases": [_phase(phase, explanations) for phase in estimate.phases],
        "ranks": [_rank(rank) for rank in estimate.ranks],
        "host_bytes": estimate.host_bytes,
        "fit": render_fit(card, estimate, interval) if card is not None else None,
        "warnings": [{"code": notice.code, "message": notice.message} for notice in notices],
        "ignored": list(ignored),
    }


def is_modelled(estimate: Estimate) -> bool:
    """Whether the step itself is known, not only the load."""
    return all(notice.code != NOT_MODELLED for notice in estimate.notices)


def render_fit(card: Card, estimate: Estimate, interval: Interval | None) -> Json | None:
    """The verdict. Without a model of the step only `does_not_fit` can be known: the load alone is already too much."""
    device = device_bytes(estimate)
    free = card.usable_bytes - device
    if not is_modelled(estimate) and free >= 0:
        return None
    return {
        "gpu": card.id,
        "capacity_bytes": card.capacity_bytes,
        "headroom_bytes": card.headroom_bytes,
        **({"occupied_bytes": card.occupied_bytes} if card.occupied_bytes else {}),
        "free_bytes": free,
        **({"num_alloc_retries": estimate.holding.get().num_alloc_retries} if free >= 0 and _gives_cache_back(card, estimate) else {}),
        "verdict": _verdict(card, estimate, interval),
    }


def _verdict(card: Card, estimate: Estimate, interval: Interval | None) -> str:
    """What only fits because the allocator gives its cache back is tight."""
    verdict = card.verdict(device_bytes(estimate), interval.device_high_bytes if interval is not None else None)
    return "tight" if verdict == "fits" and _gives_cache_back(card, estimate) else verdict


def _gives_cache_back(card: Card, estimate: Estimate) -> bool:
    return estimate.holding.get().without_pressure_bytes > card.usable_bytes


def device_bytes(estimate: Estimate) -> int:
    """What the card must hold at the peak; at least what is allocated [bytes]."""
    return max(estimate.device_bytes, estimate.peak.allocated_bytes)


def _peak(estimate: Estimate, interval: Interval | None) -> Json:
    peak = estimate.peak
    return {
        "phase": peak.phase.value,
        "allocated_bytes": peak.allocated_bytes,
        "reserved_bytes": estimate.reserved_bytes,
        "reserved_basis": estimate.holding.get().basis.value,
        "device_bytes": estimate.device_bytes,
        "paged_bytes": estimate.paged_bytes,
        "interval": None if interval is None else _interval(interval),
    }


def _rank(rank: RankEstimate) -> Json:
    return {
        "rank": rank.rank,
        "phase": rank.phase.value,
        "allocated_bytes": rank.allocated_bytes,
        "reserved_bytes": rank.reserved_bytes,
        "device_bytes": rank.device_bytes,
        "holds": rank.holds,
    }


def _interval(interval: Interval) -> Json:
    return {
        "coverage": interval.coverage,
        "allocated_low_bytes": interval.allocated_low_bytes,
        "allocated_high_bytes": interval.allocated_high_bytes,
        "device_low_bytes": interval.device_low_bytes,
        "device_high_bytes": interval.device_high_bytes,
        "basis": interval.basis,
    }


def _phase(phase: PhaseEstimate, explanations: Explanations) -> Json:
    return {
        "phase": phase.phase.value,
        "allocated_bytes": phase.allocated_bytes,
        "items": [_item(phase.phase, item, explanations) for item in phase.items],
    }


def _item(phase: Phase, item: LineItem, explanations: Explanations) -> Json:
    explanation = explanations.get((phase, item.item))
    return {
        "name": item.item.value,
        "bytes": item.num_bytes,
        "basis": item.basis.value,
        "formula": explanation.formula if explanation is not None else "",
        "source": explanation.source if explanation is not None else "",
    }


def render_stack(stack: Stack) -> Json:
    """The versions that were answered for."""
    return {name: shown(getattr(stack, name)) for name in ("torch", "transformers", "peft", "bitsandbytes", "trl")}


def render_recipe(recipe: Recipe) -> Json:
    """Every choice under the name its library gives it, defaults resolved."""
    return {
        "dtype": recipe.dtype.value,
        "attn_implementation": recipe.attention.value,
        "quantization": None if recipe.quantization is None else _quantization(recipe.quantization),
        "peft": None if recipe.adapter is None else _adapter(recipe.adapter),
        "prepare_model_for_kbit_training": recipe.prepare_for_kbit_training,
        "trainer": recipe.trainer.value,
        "task": None if recipe.training is None else _task(recipe.training.objective),
        "training": None if recipe.training is None else _training(recipe.training),
        "inference": None if recipe.inference is None else _inference(recipe.inference),
        "compute_capability": ".".join(map(str, recipe.compute_capability)),
        "num_gpus": recipe.parallel.num_gpus,
        "strategy": recipe.parallel.strategy.value,
    }


def _quantization(quantization: Quantization) -> Json:
    shared = {"llm_int8_skip_modules": _listed(quantization.skip_modules)}
    if not quantization.kind.is_4bit:
        return {"load_in_8bit": True, "llm_int8_threshold": quantization.threshold, **shared}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quantization.kind.value,
        "bnb_4bit_use_double_quant": quantization.double_quant,
        "bnb_4bit_compute_dtype": quantization.compute_dtype.value,
        "bnb_4bit_quant_storage": quantization.storage_dtype.value,
        **shared,
    }


def _adapter(adapter: Adapter) -> Json:
    return {
        "r": adapter.r,
        "target_modules": _listed(adapter.target_modules),
        "exclude_modules": _listed(adapter.exclude_modules),
        "target_parameters": list(adapter.target_parameters),
        "lora_dropout": adapter.dropout,
        "use_dora": adapter.use_dora,
        "use_rslora": adapter.use_rslora,
        "bias": adapter.bias,
        "lora_bias": adapter.lora_bias,
        "modules_to_save": list(adapter.modules_to_save),
        "rank_pattern": dict(adapter.rank_pattern),
        "layers_to_transform": None if adapter.layers_to_transform is None else list(adapter.layers_to_transform),
        "layers_pattern": list(adapter.layers_pattern),
        "trainable_token_indices": dict(adapter.trainable_token_indices),
    }


def _training(training: Training) -> Json:
    return {
        "per_device_train_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "max_length": training.sequence_length,
        "optim": training.optimizer,
        "optim_args": dict(training.optimizer_arguments),
        "weight_decay": training.weight_decay,
        "bf16": training.autocast_dtype == "bfloat16",
        "fp16": training.autocast_dtype == "float16",
        "gradient_checkpointing": training.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {
            "use_reentrant": training.use_reentrant,
            "every_n_layers": training.checkpoint_every_n_layers,
        },
        "loss": training.loss.value,
        "padded": training.padded,
        "padding_free": training.flattened,
    }


def _task(objective: Objective) -> Json:
    return {
        "kind": objective.kind.value,
        "reference": objective.reference.value,
        "max_prompt_length": objective.prompt_length,
        "num_labels": objective.num_labels if objective.kind.is_classification else None,
        "old_log_probs": objective.old_log_probs,
    }


def _inference(inference: Inference) -> Json:
    return {
        "batch_size": inference.batch_size,
        "prompt_length": inference.prompt_length,
        "max_new_tokens": inference.max_new_tokens,
        "cache_implementation": inference.cache.value,
        "padded": inference.padded,
    }


def _listed(names: tuple[str, ...] | str | None) -> list[str] | str | None:
    return list(names) if isinstance(names, tuple) else names
