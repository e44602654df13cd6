"""From a batch to a loss as each trainer makes it. TRL's own methods run, on trainer objects that were never initialised.

Legend: B micro-batch, S sequence length, P prompt, C completion, S = P + C.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any, assert_never
from unittest import mock

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from estimator.introspect.prepared import TORCH_DTYPES
from estimator.introspect.trace import known
from estimator.introspect.trace.errors import NotTraceableError, RefusedError
from estimator.introspect.trace.heads import chunked_forward, forward_replaced, liger_forward, trl_head
from estimator.introspect.trace.model import TracedModel, traced_model
from estimator.recipe import Loss, ObjectiveKind, Recipe, Reference, Trainer, Training
from estimator.scoring import Rows

Batch = dict[str, Any]
"""Arguments of the model's forward: tensors, and of packed samples the longest length beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a trainer does with one micro-batch."""

    inputs: Callable[[], Batch]
    """Makes the inputs as the data collator does; called where tensors have no content."""
    loss: Callable[[Batch], Tensor]


@contextmanager
def task(model: TracedModel, recipe: Recipe, rows: Rows, *, reference: TracedModel | None = None) -> Iterator[Task]:
    """The trainer's part of a step; what it changes about the model is undone in the end.

    Args:
        rows: the passes of a fused loss.
        reference: the second model, where there is one.

    Raises:
        NotTraceableError: if TRL is needed and not at hand.
        RefusedError: if TRL's fused head stops at the model's own.
    """
    training = recipe.training
    assert training is not None
    if _fuses_head(recipe):
        _check_head(model.base)
    with ExitStack() as stack:
        if not _is_trl(training):
            if training.loss in _FORWARDS:
                stack.enter_context(forward_replaced(model.base, _FORWARDS[training.loss](rows)))
            yield Task(inputs=lambda: _labelled(model, training), loss=lambda batch: _own_loss(model, training, batch))
            return
        yield stack.enter_context(_trl_task(model, training, rows, reference))


def reference_model(
    base: Callable[[], Any], recipe: Recipe, layers_prefix: str | None, kept_layers: Sequence[int] | None, mode: FakeTensorMode
) -> TracedModel | None:
    """The second model of an objective that has one (`Recipe.of_reference`).

    Args:
        base: builds it on meta.
        layers_prefix, kept_layers, mode: as for `traced_model`.
    """
    alone = recipe.of_reference
    return None if alone is None else traced_model(base(), alone, layers_prefix, kept_layers, mode)


_FORWARDS: Mapping[Loss, Callable[[Rows], Any]] = {Loss.TRL_CHUNKED: chunked_forward, Loss.LIGER: liger_forward}


def _is_trl(training: Training) -> bool:
    """Whether one of TRL's trainers makes the loss; SFTTrainer, where it does what the Trainer does, is left out."""
    kind = training.objective.kind
    return training.loss is Loss.TRL_TILED if kind is ObjectiveKind.SFT else kind is not ObjectiveKind.CLASSIFICATION


def _fuses_head(recipe: Recipe) -> bool:
    """Whether the step runs TRL's fused head: for its loss, or where labels are smoothed for SFTTrainer's metrics alone.

    Source: trl 1.16, trainer/sft_trainer.py, SFTTrainer.__init__ and compute_loss.
    """
    training = recipe.training
    assert training is not None
    is_patched = recipe.trainer is Trainer.TRL and recipe.stack.sft_tiles_loss
    return training.objective.kind in _HEADS and (is_patched or _is_trl(training))


def accelerated(plain: Callable[..., Any], training: Training) -> Callable[..., Any]:
    """The forward that accelerate installs.

    Source: accelerate 1.15, accelerator.py, prepare_model: autocast inside, conversion of the outputs to float32 outside.
    """
    if training.autocast_dtype is None:
        return plain
    cast: Callable[..., Any] = convert_outputs_to_fp32(torch.autocast("cpu", dtype=TORCH_DTYPES[training.autocast_dtype])(plain))
    return cast


def _own_loss(model: TracedModel, training: Training, batch: Batch) -> Tensor:
    # The outputs die with this frame, before the backward pass. Source: transformers, trainer.py, compute_loss.
    outputs = accelerated(model.whole.__call__, training)(**batch)
    loss: Tensor = outputs["loss"]
    return loss


# -- inputs -----------------------------------------------------------------------------------------------------------------------------


def _ids(*shape: int, padded: bool = False, skipped: int = 0) -> Tensor:
    """Whole numbers whose values are known, since masks are made of them.

    Args:
        padded: whether the last one is zero.
        skipped: how many of each row's first ones are zero.
    """
    with _disable_current_modes():
        content = torch.ones(shape, dtype=torch.int64)
        content[..., :skipped] = 0
        if padded:
            content[0, -1] = 0
    return known.give(torch.empty(shape, dtype=torch.int64), content)


def tokens(model: TracedModel, *shape: int) -> Tensor:
    """Ordinary text: no token that stands for padding, an image or the end of a text, all of which lie at the ends of vocabularies."""
    config = model.base.config
    size = getattr(config.get_text_config(), "vocab_size", None) or config.vocab_size
    return torch.full(shape, size // 2)


def _labelled(model: TracedModel, training: Training) -> Batch:
    """Source: transformers, data/data_collator.py; trainer.py, get_batch_samples and _set_signature_columns_if_needed."""
    shape = training.shape
    of_sequence = training.objective.kind is ObjectiveKind.CLASSIFICATION
    batch = {"input_ids": tokens(model, *shape), "labels": tokens(model, *(shape[:1] if of_sequence else shape))}
    if training.flattened:
        batch |= _end_to_end(training)
    elif "attention_mask" in inspect.signature(model.base.forward).parameters:
        batch["attention_mask"] = _ids(*shape, padded=training.padded)
    if _accepts_loss_arguments(model):
        batch["num_items_in_batch"] = torch.empty((), dtype=torch.int64)
    return batch


def _end_to_end(training: Training) -> Batch:
    """What tells samples in one row apart: those of a micro-batch, and two where a row is told by its length alone.

    Source: transformers, data/data_collator.py, DataCollatorWithFlattening; trl 1.16, trainer/sft_trainer.py,
    DataCollatorForLanguageModeling.
    """
    rows, length = training.shape
    longest = -(-length // max(training.micro_batch_size, 2))
    with _disable_current_modes():
        positions = (torch.arange(length) % longest).expand(rows, length).contiguous()
        starts = torch.tensor([*range(0, length, longest), length], dtype=torch.int32)
    batch: Batch = {"position_ids": known.give(torch.empty(positions.shape, dtype=positions.dtype), positions)}
    if _is_trl(training):
        bounds = known.give(torch.empty(starts.shape, dtype=starts.dtype), starts)
        batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return batch


def _accepts_loss_arguments(model: TracedModel) -> bool:
    """Source: transformers, trainer.py, Trainer.__init__, model_accepts_loss_kwargs."""
    declared = getattr(model.base, "accepts_loss_kwargs", None)
    parameters = inspect.signature(model.base.forward).parameters.values()
    return bool(declared) if declared is not None else any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _pairs(training: Training) -> Batch:
    """Chosen sequences, then rejected ones.

    Source: trl 1.16, trainer/dpo_trainer.py and trainer/reward_trainer.py, DataCollatorForPreference.
    """
    shape = (2 * training.micro_batch_size, training.sequence_length)
    return {"input_ids": _ids(*shape), "attention_mask": _ids(*shape, padded=training.padded)}


def _preferences(training: Training) -> Batch:
    batch = _pairs(training)
    shape = (2 * training.micro_batch_size, training.sequence_length)
    batch["completion_mask"] = _ids(*shape, padded=training.padded, skipped=training.objective.prompt_length)
    if training.objective.reference is Reference.NONE:
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            batch[name] = torch.empty(training.micro_batch_size, dtype=torch.float32)
    return batch


def _completions(training: Training) -> Batch:
    """Source: trl 1.16, trainer/grpo_trainer.py, GRPOTrainer._generate_and_score_completions."""
    B, P = training.micro_batch_size, max(training.objective.prompt_length, 1)
    C = training.sequence_length - P
    return {
        "prompt_ids": _ids(B, P),
        "prompt_mask": _ids(B, P),
        "completion_ids": _ids(B, C),
        "completion_mask": _ids(B, C, padded=training.padded),
        "advantages": torch.empty(B, dtype=torch.float32),
        "num_items_in_batch": torch.empty((), dtype=torch.int64),
    }


# -- TRL --------------------------------------------------------------------------------------------------------------------------------


class _OneProcess:
    """The accelerator of a single process. What it gathers ends in the trainer's metrics, so any value will do."""

    num_processes = 1
    is_main_process = True
    sync_gradients = True
    parallelism_config = None
    device = torch.device("cpu")

    def __init__(self, training: Training) -> None:
        self._dtype = training.autocast_dtype

    def gather(self, tensor: Tensor) -> Tensor:
        """One row is enough for a metric, and small enough for its value to be followed."""
        return self.reduce(tensor[:1] if tensor.dim() else tensor)

    gather_for_metrics = gather

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        if known.value_of(tensor) is not None:
            return tensor
        with _disable_current_modes():
            content = torch.zeros(tensor.shape, dtype=tensor.dtype)
        return known.give(tensor.detach(), content)

    def unwrap_model(self, model: Any) -> Any:
        return model

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._dtype is None else torch.autocast("cpu", dtype=TORCH_DTYPES[self._dtype])


@contextmanager
def _without_checkpointing(model: nn.Module, _: object = None) -> Iterator[None]:
    """As TRL's, but layer by layer: of those left out of the model the others keep their place.

    Source: trl 1.16, models/utils.py, disable_gradient_checkpointing.
    """
    switched = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in switched:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def _installed(model: TracedModel, training: Training) -> Iterator[None]:
    """accelerate's forward on the model itself: TRL calls the model."""
    whole = model.whole
    forward = whole.forward.__func__ if isinstance(whole.forward, MethodType) else whole.forward
    with forward_replaced(whole, accelerated(forward, training)):
        yield


@contextmanager
def _trl_task(model: TracedModel, training: Training, rows: Rows, reference: TracedModel | None) -> Iterator[Task]:
    try:
        from trl.trainer import dpo_trainer, grpo_trainer
        from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model
    except ImportError as error:
        raise NotTraceableError(f"the step of this trainer needs TRL ({error})") from error
    kind = training.objective.kind
    with ExitStack() as stack:
        stack.enter_context(trl_head(rows))
        for module in (dpo_trainer, grpo_trainer):
            stack.enter_context(mock.patch.object(module, "disable_gradient_checkpointing", _without_checkpointing))
        if kind in (ObjectiveKind.DPO, ObjectiveKind.REWARD):  # their `disable_dropout`
            disable_dropout_in_model(model.whole)
        for one, fields in ((model, _HEADS.get(kind)), (reference, ("log_probs",))):
            if one is not None:
                stack.enter_context(forward_replaced(one.base, type(one.base).forward))
                if fields is not None:
                    add_fused_lm_head(one.base, outputs=fields)
                stack.enter_context(_installed(one, training))
        yield _task_of(kind, model, training, reference)


def _check_head(base: Any) -> None:
    """Refuses what TRL's head stops at. Source: peft 0.21, utils/other.py, TrainableTokensWrapper, which hands on the weight alone."""
    if not hasattr(base.get_output_embeddings(), "bias"):
        raise RefusedError(
            "TRL reads the head's bias (trl/trainer/utils.py, add_fused_lm_head), which PEFT's wrapper of trained tokens does not have "
            "(peft/utils/other.py, TrainableTokensWrapper): the first step fails with AttributeError. A tied head is wrapped with its "
            "embedding; without trainable_token_indices of both, or with modules_to_save, the step runs"
        )


# Source: trl 1.16, the trainers' __init__.
_HEADS: Mapping[ObjectiveKind, tuple[str, ...]] = {
    ObjectiveKind.SFT: ("log_probs", "entropy", "is_top1"),
    ObjectiveKind.DPO: ("log_probs", "entropy", "mean_logits", "is_top1"),
    ObjectiveKind.GRPO: ("log_probs", "entropy"),
}


def _task_of(kind: ObjectiveKind, model: TracedModel, training: Training, reference: TracedModel | None) -> Task:
    from trl import DPOTrainer, GRPOTrainer, RewardTrainer, SFTTrainer

    whole = model.whole
    match kind:
        case ObjectiveKind.SFT:
            sft = _bare(SFTTrainer, model, training, loss_type="nll", average_tokens_across_devices=True)
            sft.__dict__.update(compute_loss_func=None, label_smoother=None, get_tp_size=lambda: 1)

            def sft_loss(batch: Batch) -> Tensor:
                inputs = dict(batch)
                number = inputs.pop("num_items_in_batch", None)  # no model that refuses loss arguments is counted for
                loss: Tensor = sft.compute_loss(whole, inputs, num_items_in_batch=number)
                return loss

            return Task(inputs=lambda: _labelled(model, training), loss=sft_loss)
        case ObjectiveKind.DPO:
            dpo = _bare(DPOTrainer, model, training, gradient_checkpointing_kwargs=None)
            dpo.__dict__.update(
                beta=0.1,
                ref_model=reference.whole if reference is not None else None,
                precompute_ref_logps=training.objective.reference is Reference.NONE,
                loss_types=["sigmoid"],
                loss_weights=[1.0],
                ld_alpha=None,
                f_divergence_type="reverse_kl",
                use_weighting=False,
            )
            return Task(inputs=lambda: _preferences(training), loss=lambda batch: dpo.compute_loss(whole, batch))
        case ObjectiveKind.REWARD:
            reward = _bare(RewardTrainer, model, training, center_rewards_coefficient=None)
            return Task(inputs=lambda: _pairs(training), loss=lambda batch: reward.compute_loss(whole, dict(batch)))
        case ObjectiveKind.GRPO:
            grpo = _bare(GRPOTrainer, model, training, delta=None, use_bias_correction_kl=False, steps_per_generation=1)
            grpo.__dict__.update(
                beta=0.0 if training.objective.reference is Reference.NONE else 0.04,
                top_entropy_quantile=1.0,
                off_policy_mask_threshold=None,
                importance_sampling_level="token",
                loss_type="dapo",
                epsilon_low=0.2,
                epsilon_high=0.2,
                use_vllm=False,
                _entropy_bonus_enabled=False,
            )
            return Task(inputs=lambda: _completions(training), loss=lambda batch: _grpo_loss(grpo, model, training, reference, batch))
        case ObjectiveKind.CLASSIFICATION:
            raise AssertionError("classification is trained by the Trainer")
        case _:
            assert_never(kind)


def _bare(trainer_class: Any, model: TracedModel, training: Training, **arguments: Any) -> Any:
    """A trainer that has what its loss reads.

    Source: trl 1.16, the trainers' __init__: the auxiliary loss is on where the config has a coefficient for it.
    """
    config = model.base.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    trainer = trainer_class.__new__(trainer_class)
    trainer.__dict__.update(
        model=model.whole,
        accelerator=_OneProcess(training),
        args=SimpleNamespace(**arguments),
        router_aux_loss_coef=coefficient,
        aux_loss_enabled=hasattr(config, "output_router_logits") and coefficient != 0.0,
        current_gradient_accumulation_steps=training.gradient_accumulation_steps,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    return trainer


def _grpo_loss(trainer: Any, model: TracedModel, training: Training, reference: TracedModel | None, batch: Batch) -> Tensor:
    """What GRPO does between the generation and the backward pass, of one micro-batch; the batch keeps what was computed.

    Source: trl 1.16, trainer/grpo_trainer.py, GRPOTrainer._generate_and_score_completions and _compute_loss.
    """
    objective = training.objective
    if objective.old_log_probs or objective.reference is not Reference.NONE:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        length = batch["completion_ids"].size(1)

        def log_probs(one: TracedModel) -> Tensor:
            found: Tensor = trainer._get_per_token_logps_and_entropies(one.whole, ids, mask, length, batch_size=ids.size(0))[0]
            return found

        with torch.no_grad(), _without_checkpointing(model.whole):
            if objective.old_log_probs:
                batch["old_per_token_logps"] = log_probs(model)
            if reference is not None:
                batch["ref_per_token_logps"] = log_probs(reference)
            elif objective.reference is Reference.ADAPTER_OFF:
                with model.whole.disable_adapter():
                    batch["ref_per_token_logps"] = log_probs(model)
        del ids, mask
    loss: Tensor = trainer.compute_loss(model.whole, dict(batch))
    return loss
