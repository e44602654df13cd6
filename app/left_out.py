"""Warnings of what an answer leaves out: fields without a formula, evaluation, losses and kernels that are not modelled."""

from collections.abc import Iterable

from app.answer import is_modelled
from app.answered import Answered, Rule
from app.redaction import redacted
from app.unmodelled import effect
from app.versions import shown
from estimator.estimate import Engine
from estimator.kernels import Kernel
from estimator.liger import fuses_loss, patches
from estimator.recipe import Attention, Loss, ObjectiveKind, Trainer
from estimator.step import needs_mask
from estimator.units import gib

# Source: transformers, training_args.py, TrainingArguments.per_device_eval_batch_size.
DEFAULT_EVALUATION_BATCH = 8
# Models that take images or sound beside text, by the auto class that builds them.
_WITH_IMAGES = ("image_text_to_text", "multimodal_lm")
# Source: trl 1.16, the trainers' __init__: those of rewards and of classes score no tokens.
_WITH_FUSED_HEAD = (ObjectiveKind.SFT, ObjectiveKind.DPO, ObjectiveKind.GRPO)
# Source: trl 1.7–1.13, trainer/sft_config.py, SFTConfig.router_aux_loss_coef.
DEFAULT_ROUTER_COEFFICIENT = 0.001


def _fields(a: Answered) -> Iterable[str]:
    for field in a.unmodelled:
        yield f"{field} is not modelled: {effect(field)}. The answer is for the run without it."


def _of_files(a: Answered) -> Iterable[str]:
    for key, meaning in a.request.set_aside.not_modelled.items():
        yield f"{redacted(key)} is not modelled: {redacted(meaning)}. The answer is for the run without it."


def _assumed(a: Answered) -> Iterable[str]:
    yield from (redacted(sentence) for sentence in a.request.set_aside.assumed)


def _distribution_loss(a: Answered) -> Iterable[str]:
    """Source: trl 0.25–1.15, trainer/sft_trainer.py, dft_loss: from the logits, beside the model's own loss."""
    asked, training = a.request.training, a.recipe.training
    if asked and training and asked.loss_type == "dft" and training.loss is Loss.STOCK and not a.recipe.stack.sft_tiles_loss:
        yield (
            "training.loss_type 'dft' is not modelled: before TRL 1.16 it takes its loss from the full logits by other operators. "
            "The answer is for the run with transformers' own loss."
        )


def _evaluation(a: Answered) -> Iterable[str]:
    asked, training = a.request.training, a.recipe.training
    vocabulary = a.number("vocab_size")
    if not a.evaluation or asked is None or training is None or vocabulary is None:
        return
    batch, length = asked.per_device_eval_batch_size or DEFAULT_EVALUATION_BATCH, training.sequence_length
    logits = f"{batch} × {length:,} × {vocabulary:,} × 4 B = {gib(4 * batch * length * vocabulary)} in float32"
    made = f"its logits take {logits}" if training.loss is Loss.STOCK else f"its loss needs no full logits, compute_metrics does: {logits}"
    yield (
        f"evaluation is not modelled ({', '.join(a.evaluation)}): it runs {batch} sequences at a time without gradients, beside weights "
        f"and optimizer states; {made}. With compute_metrics, logits of the whole evaluation set are gathered on the card unless "
        "eval_accumulation_steps is given."
    )


def _router_loss(a: Answered) -> Iterable[str]:
    """Source: trl 1.16, trainer/sft_trainer.py (`aux_loss_enabled`); transformers, models/mixtral, load_balancing_loss_func."""
    training, experts = a.recipe.training, a.number("num_experts", "num_local_experts", "n_routed_experts")
    if training is None or not experts or not is_modelled(a.estimate) or not _balances_experts(a) or _traces_router_loss(a):
        return
    layers = a.inventory.num_layers
    tokens = training.micro_batch_size * training.sequence_length
    kept = gib(4 * layers * tokens * experts)
    yield (
        f"the load-balancing loss of the router is not modelled: it keeps the router's logits of up to {layers} layers and their softmax, "
        f"{layers} × {tokens:,} tokens × {experts} experts × 4 B = {kept} each in float32; router_aux_loss_coef=0.0 switches it off in TRL."
    )


def _traces_router_loss(a: Answered) -> bool:
    """A traced TRL trainer runs it with the config's own coefficient."""
    asked, training = a.request.training, a.recipe.training
    by_trl = training is not None and training.loss is Loss.TRL_TILED and a.estimate.engine is Engine.TRACE
    return by_trl and asked is not None and asked.router_aux_loss_coef is None


def _balances_experts(a: Answered) -> bool:
    config, stack, asked = a.inventory.config, a.recipe.stack, a.request.training
    if a.recipe.trainer is not Trainer.TRL or not stack.sft_balances_experts:
        return bool(config.get("output_router_logits"))
    coefficient = asked.router_aux_loss_coef if asked else None
    if coefficient is None:
        own = config.get("router_aux_loss_coef")
        coefficient = DEFAULT_ROUTER_COEFFICIENT if not stack.sft_balances_with_own_coefficient else own if isinstance(own, float) else 0.0
    return "output_router_logits" in config and coefficient > 0


def _label_smoothing(a: Answered) -> Iterable[str]:
    """Source: transformers, trainer_pt_utils.py, LabelSmoother."""
    asked, training, vocabulary = a.request.training, a.recipe.training, a.number("vocab_size")
    if asked is None or training is None or vocabulary is None or not asked.label_smoothing_factor:
        return
    logits = gib(4 * training.micro_batch_size * training.sequence_length * vocabulary)
    again = "SFTTrainer runs the model a second time for it, and " if a.recipe.stack.sft_tiles_loss and _is_sft(a) else ""
    yield (
        f"training.label_smoothing_factor is not modelled: {again}the loss is taken from a copy of the logits and their negated "
        f"log-softmax, each {logits} in float32, beside what is counted here for transformers' own loss."
    )


def _is_sft(a: Answered) -> bool:
    return a.recipe.trainer is Trainer.TRL


def _padding_free(a: Answered) -> Iterable[str]:
    training, asked = a.recipe.training, a.request.training
    if training is None or asked is None or not training.flattened:
        return
    if needs_mask(a.recipe) and not _mixes(a):
        _, length = training.shape
        yield (
            f"padding_free lays {training.micro_batch_size} × {training.sequence_length:,} tokens in one row, and "
            f"{a.recipe.attention.value} needs a mask of {length:,}² entries to tell samples apart, {gib(length * length)} as booleans and "
            f"more in each layer; flash_attention_2 needs none."
        )


def _mixes(a: Answered) -> bool:
    """Whether sdpa took the kernel that has no mask: a model then hands on no positions for one."""
    return a.recipe.attention is Attention.SDPA and Kernel.FLASH in a.estimate.kernels


def _mixed_samples(a: Answered) -> Iterable[str]:
    """Source: transformers, masking_utils.py, find_packed_sequence_indices, which is given what a model passes as `position_ids`."""
    training = a.recipe.training
    if training is not None and training.flattened and needs_mask(a.recipe) and _mixes(a):
        yield (
            f"{a.inventory.model_class} makes no mask of position_ids under sdpa: in a row of packed samples each attends to those before "
            "it, which trains on other text than without packing; the answer is for that run."
        )


def _flash_padding(a: Answered) -> Iterable[str]:
    """Source: transformers, modeling_flash_attention_utils.py, _flash_attention_forward (_upad_input, pad_input)."""
    training = a.recipe.training
    if training is not None and training.padded and Kernel.FLASH in a.estimate.kernels:
        yield (
            f"padding under {a.recipe.attention.value} is not modelled: each layer copies queries, keys and values without the padding and "
            "puts its output back into place; the answer counts the padded tokens, and no copies."
        )


def _refused_padding_free(a: Answered) -> Iterable[str]:
    asked, training = a.request.training, a.recipe.training
    flattens = training is not None and training.flattened
    if asked and flattens and asked.padding_free and not asked.packing and _is_sft(a) and a.recipe.stack.sft_refuses_untruncated:
        yield (
            f"SFTTrainer of TRL {shown(a.recipe.stack.trl)} refuses padding_free without packing unless SFTConfig(max_length=None): "
            "samples have to be cut beforehand; the answer is for samples of max_length tokens."
        )


def _ignored_padding_free(a: Answered) -> Iterable[str]:
    """Source: trl 1.16, trainer/dpo_trainer.py, DPOTrainer.__init__."""
    asked, training = a.request.training, a.recipe.training
    if asked and asked.padding_free and training is not None and training.objective.kind is ObjectiveKind.DPO:
        yield f"DPOTrainer of TRL {shown(a.recipe.stack.trl)} warns of padding_free and pads each sample, and so does the answer."


def _adapted_head(a: Answered) -> Iterable[str]:
    """Source: trl 1.16, trainer/sft_trainer.py, SFTTrainer.__init__ (BaseTunerLayer on the output embedding)."""
    head = a.inventory.output_embedding
    is_adapted = head is not None and any(t.pattern.startswith(f"{head}.lora_") for t in a.stored)
    if is_adapted and _is_sft(a) and a.recipe.stack.sft_tiles_loss:
        yield f"SFTTrainer of TRL {shown(a.recipe.stack.trl)} refuses an adapter on {head}: leave it out of target_modules."


def _trained_tokens_of_head(a: Answered) -> Iterable[str]:
    """Smoothed labels spare no run: SFTTrainer then takes the loss from full logits, and its metrics from the fused head.

    Source: trl 1.16, trainer/utils.py, add_fused_lm_head, which reads the bias; trainer/sft_trainer.py, SFTTrainer.compute_loss; peft 0.21,
    utils/other.py, TrainableTokensWrapper, which hands on the weight alone.
    """
    training, stack, head = a.recipe.training, a.recipe.stack, a.inventory.output_embedding
    if training is None or head is None or a.recipe.trainer is not Trainer.TRL or not stack.sft_tiles_loss:
        return
    if training.objective.kind not in _WITH_FUSED_HEAD:
        return
    is_tied = f"{head}.weight" in a.inventory.tied_names
    holders = [name for name in (head, a.inventory.input_embedding if is_tied else None) if name is not None]
    if any(t.pattern.startswith(f"{holder}.trainable_tokens_") for t in a.stored for holder in holders):
        instead = "" if training.objective.kind is not ObjectiveKind.SFT else ", and so does trainer 'transformers'"
        yield (
            f"the trainers of TRL {shown(stack.trl)} read the bias of {head}, which PEFT's wrapper of trained tokens does not have"
            f"{' (a tied head is wrapped with its embedding)' if is_tied else ''}: the first step fails with AttributeError. Training "
            f"{' and '.join(holders)} whole, by modules_to_save, runs{instead}."
        )


def _text_only(a: Answered) -> Iterable[str]:
    has_towers = any(word in row.pattern for row in a.inventory.rows for word in ("vision", "audio"))
    if is_modelled(a.estimate) and (has_towers or a.inventory.config.get("auto_class") in _WITH_IMAGES):
        yield "the step is one of text alone: images and sound add their own towers' activations and tokens."


def _unpatched(a: Answered) -> Iterable[str]:
    asked = a.request.training
    if asked and asked.use_liger_kernel and not patches(a.inventory):
        yield (
            f"Liger does not patch models of type {a.inventory.model_type} (liger-kernel 0.8): use_liger_kernel changes nothing, "
            "and the answer is for transformers' own loss and layers."
        )


def _liger_layers(a: Answered) -> Iterable[str]:
    asked, training = a.request.training, a.recipe.training
    if asked is None or training is None or not asked.use_liger_kernel or not patches(a.inventory):
        return
    loss = "" if training.loss is Loss.LIGER else " No fused Liger loss runs here."
    reason = f" Liger has none for {a.inventory.model_type}." if not fuses_loss(a.inventory) and training.loss is Loss.STOCK else ""
    yield (
        "Liger's layer kernels (RMSNorm, SwiGLU, rotary embedding) keep fewer activations than transformers' layers and are not modelled: "
        f"activations are an upper bound.{reason or loss}"
    )


RULES: tuple[tuple[Rule, str], ...] = (
    (_fields, "field_not_modelled"),
    (_of_files, "field_not_modelled"),
    (_assumed, "read_from_file"),
    (_distribution_loss, "field_not_modelled"),
    (_evaluation, "evaluation_not_modelled"),
    (_router_loss, "router_loss_not_modelled"),
    (_label_smoothing, "label_smoothing_not_modelled"),
    (_padding_free, "padding_free_needs_mask"),
    (_mixed_samples, "padding_free_mixes_samples"),
    (_flash_padding, "flash_padding_not_modelled"),
    (_refused_padding_free, "padding_free_refused"),
    (_ignored_padding_free, "padding_free_ignored"),
    (_adapted_head, "adapter_on_head_refused"),
    (_trained_tokens_of_head, "trained_tokens_of_head_refused"),
    (_text_only, "text_only"),
    (_unpatched, "liger_does_not_patch"),
    (_liger_layers, "liger_layers_not_modelled"),
)
