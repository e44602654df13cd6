"""Defaults of `TrainingArguments` and `SFTConfig`, as the asked versions resolve them."""

from app import fields
from app.objective import LOSSES, resolve_objective, sequence_length
from app.request import MAX_STEP_TOKENS, CheckpointingFields, LigerFields, Request, TrainingFields
from app.versions import shown
from estimator.dtypes import DType
from estimator.errors import RequestError, UnknownNameError
from estimator.inventory import Inventory
from estimator.liger import fuses_loss
from estimator.optimizers import MODELLED
from estimator.recipe import Loss, ObjectiveKind, Training
from estimator.stack import Stack
from estimator.units import ceil_div

# Source: transformers, training_args.py, TrainingArguments.per_device_train_batch_size.
DEFAULT_BATCH_SIZE = 8
# Source: trl, trainer/sft_config.py, SFTConfig.max_length (`max_seq_length` before 0.16).
DEFAULT_SFT_LENGTH = 1024
# Source: transformers, trainer_optimizer.py, _parse_optim_args.
OPTIM_ARGS = "expected text such as momentum=0.9,nesterov=true"


def resolve_training(request: Request, inventory: Inventory, stack: Stack, *, prepared: bool) -> Training:
    """The training half of a recipe.

    Raises:
        RequestError: if a length is missing or impossible, or a name is not known.
    """
    asked = request.training
    assert asked is not None
    sft = request.trainer == "trl"
    checkpointing = asked.gradient_checkpointing
    if checkpointing is None:
        checkpointing = sft and stack.sft_checkpoints_by_default
    kwargs = asked.gradient_checkpointing_kwargs or CheckpointingFields()
    objective = resolve_objective(request, stack)
    _check_packing(asked, objective.kind)
    packs = objective.kind is ObjectiveKind.SFT and (asked.padding_free or (asked.packing and sft))
    batch, steps = asked.per_device_train_batch_size or DEFAULT_BATCH_SIZE, asked.gradient_accumulation_steps or 1
    length = _length(asked, sequence_length(request), inventory, sft=sft)
    _check_tokens(batch, length, steps)
    return Training(
        micro_batch_size=batch,
        sequence_length=length,
        gradient_accumulation_steps=steps,
        optimizer=_optimizer(asked.optim, stack),
        optimizer_arguments=_optimizer_arguments(asked),
        weight_decay=asked.weight_decay,
        autocast_dtype=_autocast(asked, stack, sft=sft),
        gradient_checkpointing=checkpointing,
        use_reentrant=checkpointing and _reentrant(kwargs, stack, sft=sft, prepared=prepared),
        checkpoint_every_n_layers=kwargs.every_n_layers,
        loss=_loss(asked, inventory, stack, sft=sft) if objective.kind is ObjectiveKind.SFT else LOSSES[objective.kind],
        objective=objective,
        padded=request.padded and not packs,
        flattened=packs and _flattens(asked, stack),
    )


def _check_packing(asked: TrainingFields, kind: ObjectiveKind) -> None:
    """Refuse samples end to end where a trainer takes each in a row of its own; DPOTrainer alone says so and goes on.

    Source: trl 1.16, trainer/dpo_trainer.py, DPOTrainer.__init__ (padding_free); reward_config.py and grpo_config.py have neither argument.
    """
    if kind is ObjectiveKind.SFT:
        return
    wanted = {"packing": asked.packing, "padding_free": asked.padding_free and kind is not ObjectiveKind.DPO}
    for name, is_wanted in wanted.items():
        if is_wanted:
            raise RequestError(
                f"training.{name}: true is for 'sft', and task.kind is {kind.value!r}; accepted: false", field=f"training.{name}"
            )


def _check_tokens(batch: int, length: int, steps: int) -> None:
    """Refuse a step whose bytes no 64-bit number holds."""
    tokens = batch * length * steps
    if tokens > MAX_STEP_TOKENS:
        raise RequestError(
            f"training.gradient_accumulation_steps: {steps:,} micro-batches of {batch:,} × {length:,} are {tokens:,} tokens a step; "
            f"accepted: up to {MAX_STEP_TOKENS:,} together",
            field="training.gradient_accumulation_steps",
        )


def check_length(field: str, length: int, inventory: Inventory) -> None:
    """Refuse a sequence that runs past learned positions.

    Raises:
        RequestError: if it does.
    """
    limit = inventory.num_positions
    if limit is not None and length > limit and inventory.learns_positions:
        raise RequestError(f"{field}: {length} is beyond the {limit} learned positions of the model; accepted: up to {limit}", field=field)


def _length(asked: TrainingFields, length: int | None, inventory: Inventory, *, sft: bool) -> int:
    if length is None:
        if not sft:
            raise RequestError(
                "training.max_length: is required with trainer 'transformers': the length really trained", field="training.max_length"
            )
        length = DEFAULT_SFT_LENGTH
    if isinstance(asked.pad_to_multiple_of, int):
        length = ceil_div(length, asked.pad_to_multiple_of) * asked.pad_to_multiple_of
    check_length("training.max_length", length, inventory)
    return length


def _optimizer(name: str | None, stack: Stack) -> str:
    if name is None:
        return "adamw_torch_fused" if stack.fused_adamw_by_default else "adamw_torch"
    name = name.removeprefix("OptimizerNames.").lower()
    if name not in fields.OPTIMIZERS:
        raise UnknownNameError.of("training.optim", name, MODELLED)
    return name


def _optimizer_arguments(asked: TrainingFields) -> tuple[tuple[str, str], ...]:
    """`optim_args`, split as the Trainer splits it: `key=value,key=value`."""
    given = asked.optim_args
    if not given:
        return ()
    if isinstance(given, dict):
        return tuple((key, str(value)) for key, value in given.items())
    pairs = []
    for part in given.replace(" ", "").split(","):
        key, equals, value = part.partition("=")
        if not (key and equals) or "=" in value:
            raise RequestError(f"training.optim_args: {part[:80]!r} is not accepted; {OPTIM_ARGS}", field="training.optim_args")
        pairs.append((key, value))
    return tuple(pairs)


def _autocast(asked: TrainingFields, stack: Stack, *, sft: bool) -> DType | None:
    bf16 = asked.bf16
    if bf16 is None:
        bf16 = sft and stack.sft_trains_in_bfloat16_by_default and not asked.fp16
    if bf16 and asked.fp16:
        raise RequestError("training.fp16: at most one of bf16 and fp16 can be true", field="training.fp16")
    return DType.BFLOAT16 if bf16 else DType.FLOAT16 if asked.fp16 else None


def _reentrant(kwargs: CheckpointingFields, stack: Stack, *, sft: bool, prepared: bool) -> bool:
    """Whether `torch.utils.checkpoint` runs reentrantly.

    The Trainer enables checkpointing again after PEFT's prepare did, so its own default wins; not so where SFTTrainer prepared the
    model itself and then switched the argument off: PEFT's empty kwargs leave torch's default, True.
    """
    if kwargs.use_reentrant is not None:
        return kwargs.use_reentrant
    if sft and prepared and stack.sft_prepares_for_kbit_training:
        return True
    return stack.trainer_checkpoints_reentrantly and not (sft and stack.sft_checkpoints_without_reentry)


def _flattens(asked: TrainingFields, stack: Stack) -> bool:
    """Whether samples lie end to end in one row; packed by the strategy `wrapped`, or by an older TRL, each row is one full sample.

    Source: trl, trainer/sft_trainer.py, SFTTrainer.__init__ and DataCollatorForLanguageModeling; transformers, data/data_collator.py,
    DataCollatorWithFlattening.
    """
    return asked.padding_free or (stack.sft_packs_without_padding and asked.packing_strategy != "wrapped")


def _loss(asked: TrainingFields, inventory: Inventory, stack: Stack, *, sft: bool) -> Loss:
    config = asked.liger_kernel_config or LigerFields()
    if sft and stack.sft_tiles_loss and asked.use_liger_kernel and config.fused_linear_cross_entropy:
        field = "training.liger_kernel_config.fused_linear_cross_entropy"
        raise RequestError(f"{field}: SFTTrainer of TRL {shown(stack.trl)} refuses true, since it has a fused loss of its own", field=field)
    fused = asked.use_liger_kernel and fuses_loss(inventory) and config.fused_linear_cross_entropy is not False
    if not sft:
        return Loss.LIGER if fused else Loss.STOCK
    return _sft_loss(asked, stack, fused=fused)


def _sft_loss(asked: TrainingFields, stack: Stack, *, fused: bool) -> Loss:
    accepted = {"nll", "dft"} | ({"chunked_nll"} if stack.sft_knows_chunked_loss else set())
    if asked.loss_type is not None and asked.loss_type not in accepted:
        raise UnknownNameError.of("training.loss_type", asked.loss_type, accepted)
    if stack.sft_tiles_loss:
        # label smoothing needs the full logits, beside the tiles
        return Loss.STOCK if asked.label_smoothing_factor > 0 else Loss.TRL_TILED
    if fused:
        return Loss.LIGER
    loss_type = asked.loss_type or ("chunked_nll" if stack.sft_chunks_loss_by_default else "nll")
    return Loss.TRL_CHUNKED if loss_type == "chunked_nll" else Loss.STOCK
