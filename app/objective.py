"""What a run trains for, with the defaults of the trainer that does it: DPOTrainer, RewardTrainer, GRPOTrainer, or the Trainer."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from app.request import Request, TaskFields
from estimator.classification import with_head
from estimator.errors import RequestError
from estimator.recipe import Loss, Objective, ObjectiveKind, Reference
from estimator.sources import bounds
from estimator.sources.resolve import ResolvedModel, build
from estimator.stack import Stack

# Source: trl 1.16, trainer/grpo_config.py, GRPOConfig.max_completion_length.
DEFAULT_COMPLETION_LENGTH = 512
# Source: transformers 5.23, configuration_utils.py, PreTrainedConfig.num_labels.
DEFAULT_NUM_LABELS = 2

# Source: trl 1.16, trainer/dpo_trainer.py and grpo_trainer.py, __init__ (add_fused_lm_head); scores have no vocabulary to fuse.
LOSSES: Mapping[ObjectiveKind, Loss] = MappingProxyType(
    {
        ObjectiveKind.DPO: Loss.TRL_TILED,
        ObjectiveKind.GRPO: Loss.TRL_TILED,
        ObjectiveKind.REWARD: Loss.STOCK,
        ObjectiveKind.CLASSIFICATION: Loss.STOCK,
    }
)

_FIELD = "task"
_FROM_TRL = (ObjectiveKind.DPO, ObjectiveKind.REWARD, ObjectiveKind.GRPO)
_WITH_PROMPT = (ObjectiveKind.DPO, ObjectiveKind.GRPO)


def resolve_objective(request: Request, stack: Stack) -> Objective:
    """The objective asked for.

    Raises:
        RequestError: if no trainer of the libraries trains for it as asked.
    """
    asked = request.task
    kind = ObjectiveKind(asked.kind)
    if kind is not ObjectiveKind.SFT:
        _check_trainer(kind, request, stack)
    has_adapter = request.peft is not None
    return Objective(
        kind=kind,
        reference=_reference(kind, asked, has_adapter=has_adapter),
        prompt_length=(asked.max_prompt_length or 0) if kind in _WITH_PROMPT else 0,
        num_labels=_num_labels(kind, asked),
        old_log_probs=kind is ObjectiveKind.GRPO and _keeps_old_log_probs(asked, request),
    )


def _check_trainer(kind: ObjectiveKind, request: Request, stack: Stack) -> None:
    accepted = "trl" if kind in _FROM_TRL else "transformers"
    if request.trainer != accepted:
        raise RequestError(f"{_FIELD}.kind: {kind.value!r} is trained with trainer {accepted!r}, not {request.trainer!r}", field="trainer")
    if kind in _FROM_TRL and not stack.sft_tiles_loss:
        raise RequestError(f"{_FIELD}.kind: {kind.value!r} is answered for trl 1.16 and later", field="stack.trl")


def _reference(kind: ObjectiveKind, asked: TaskFields, *, has_adapter: bool) -> Reference:
    """Source: trl 1.16, DPOTrainer.__init__ and GRPOTrainer.__init__."""
    needed = {ObjectiveKind.DPO: not asked.precompute_ref_log_probs, ObjectiveKind.GRPO: asked.beta not in (None, 0.0)}
    if not needed.get(kind, False):
        return Reference.NONE
    return Reference.ADAPTER_OFF if has_adapter and not asked.ref_model else Reference.MODEL


def _num_labels(kind: ObjectiveKind, asked: TaskFields) -> int:
    """Source: trl 1.16, trainer/reward_trainer.py, RewardTrainer.__init__, which refuses a model with more than one."""
    if kind is ObjectiveKind.REWARD and asked.num_labels not in (None, 1):
        raise RequestError(f"{_FIELD}.num_labels: a reward model has 1, not {asked.num_labels}", field=f"{_FIELD}.num_labels")
    if kind is ObjectiveKind.CLASSIFICATION:
        return asked.num_labels or DEFAULT_NUM_LABELS
    return 1


def _keeps_old_log_probs(asked: TaskFields, request: Request) -> bool:
    """Source: trl 1.16, trainer/grpo_trainer.py, GRPOTrainer._generate_and_score_completions."""
    assert request.training is not None
    steps = request.training.gradient_accumulation_steps or 1
    return steps % ((asked.steps_per_generation or steps) * asked.num_iterations) != 0


def sequence_length(request: Request) -> int | None:
    """Tokens of GRPO's prompt and completion together; None where `max_length` says it.

    Raises:
        RequestError: if the prompt's length is missing, or fills the sequence.
    """
    asked = request.task
    assert request.training is not None
    length, prompt = request.training.max_length, asked.max_prompt_length
    field = f"{_FIELD}.max_prompt_length"
    if asked.kind == "grpo":
        if prompt is None:
            raise RequestError(f"{field}: is required with 'grpo': the length of the prompts really trained", field=field)
        completion = asked.max_completion_length or DEFAULT_COMPLETION_LENGTH
        length = length if length is not None else prompt + completion
    if length is not None and prompt is not None and prompt >= length:
        raise RequestError(f"{field}: {prompt} leaves nothing to score of {length} tokens", field=field)
    return length


def with_classes(model: ResolvedModel, request: Request, stack: Stack) -> ResolvedModel:
    """The model with the head that its objective puts in place of the vocabulary.

    Raises:
        VramplanError: if transformers has no such model.
    """
    objective = resolve_objective(request, stack) if request.training is not None else Objective()
    if not objective.kind.is_classification:
        return model
    if model.inventory.is_stored:
        raise RequestError(f"{_FIELD}.kind: of {model.inventory.model_class} only the checkpoint's files are known", field=f"{_FIELD}.kind")
    config = bounds.check(with_head(model.config, objective))
    inventory = build(config, is_public=model.is_public)
    if inventory.config.get("auto_class") != "sequence_classification":
        raise RequestError(
            f"{_FIELD}.kind: transformers classifies no sequences with {model.inventory.model_class}", field=f"{_FIELD}.kind"
        )
    return replace(model, config=config, inventory=inventory)
