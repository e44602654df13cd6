"""`plan` for one card: the largest micro-batch, the longest sequence or the most margin that fits, or what is missing."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from app.answer import SCHEMA_VERSION, Json, device_bytes, is_modelled
from app.reading import Question, read_plan
from app.request import MAX_BATCH, MAX_LENGTH, PlanRequest, Request, TrainingFields
from app.service import Case, interval_of, prepare, render
from app.training import positions
from estimator.dtypes import DType
from estimator.engine import estimate as run_engine
from estimator.errors import RequestError, VramplanError
from estimator.estimate import Estimate
from estimator.planner import divisors, largest_of, largest_up_to
from estimator.recipe import Loss, Quantization, QuantizationKind, Recipe, Training

# Sequence lengths are searched in steps of this: kernels pad to it anyway.
LENGTH_STEP = 64
NUM_ALTERNATIVES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """One case whose batch and length vary."""

    case: Case
    request: PlanRequest

    def training(self) -> Training:
        assert self.case.recipe.training is not None
        return self.case.recipe.training

    def recipe(self, **changes: Any) -> Recipe:
        return replace(self.case.recipe, training=replace(self.training(), **changes))

    def fits(self, recipe: Recipe) -> bool:
        return self.missing_bytes(recipe, run_engine(self.case.inventory, recipe)) <= 0

    def missing_bytes(self, recipe: Recipe, estimate: Estimate) -> int:
        """What the card lacks for a verdict of `fits`; negative when it fits [bytes]."""
        assert self.case.card is not None
        bounds = interval_of(recipe, estimate)
        required = self.case.card.required_bytes(device_bytes(estimate), bounds.device_high_bytes if bounds is not None else None)
        return required - self.case.card.usable_bytes


def plan(payload: Mapping[str, Any]) -> Json:
    """The answer to `plan`: one of `plan` and `shortfall` is set.

    Raises:
        VramplanError: if the request or the model cannot be answered for.
    """
    question = read_plan(payload)
    case = prepare(_completed(question))
    if case.card is None:
        raise RequestError("hardware: a plan needs a card; give gpu or capacity_gib", field="hardware")
    search = _Search(case=case, request=question.request)
    if not is_modelled(run_engine(case.inventory, case.recipe)):
        raise RequestError(
            f"model: the training step of {case.inventory.model_class} is not modelled, so nothing can be planned", field="model"
        )
    found = _found(search)
    if found is None:
        return {"schema_version": SCHEMA_VERSION, "plan": None, "shortfall": _shortfall(search)}
    return {"schema_version": SCHEMA_VERSION, "plan": _rendered(search, found), "shortfall": None}


def _completed(question: Question[PlanRequest]) -> Question[Request]:
    """The question with placeholders for what the plan is to find."""
    request = question.request
    if request.training is None:
        raise RequestError("training: is required for a plan", field="training")
    fields: dict[str, Any] = {}
    if request.training.max_length is None and request.objective == "longest_sequence":
        fields["max_length"] = LENGTH_STEP
    training: TrainingFields = request.training.model_copy(update=fields)
    return replace(question, request=request.model_copy(update={"training": training}))


def _found(search: _Search) -> Training | None:
    """The training half that answers the objective, or None when nothing fits."""
    if search.request.objective == "longest_sequence":
        return _longest_sequence(search)
    if search.request.objective == "most_margin":
        smallest = _of_batch(search, 1)
        return smallest if search.fits(search.recipe(**_varied(smallest))) else None
    batch = _search_batch(search, lambda size: search.fits(search.recipe(**_varied(_of_batch(search, size)))))
    return None if batch is None else _of_batch(search, batch)


def _search_batch(search: _Search, fits: Callable[[int], bool]) -> int | None:
    total = search.request.global_batch_size
    if total is None:
        return largest_up_to(MAX_BATCH, fits)
    # The whole batch at once is asked apart: without accumulation no gradients wait during the forward pass, so it may take less.
    *smaller, whole = divisors(total)
    return whole if fits(whole) else largest_of(smaller, fits)


def _of_batch(search: _Search, micro_batch_size: int) -> Training:
    total = search.request.global_batch_size
    steps = search.training().gradient_accumulation_steps if total is None else total // micro_batch_size
    return replace(search.training(), micro_batch_size=micro_batch_size, gradient_accumulation_steps=steps)


def _longest_sequence(search: _Search) -> Training | None:
    asked = search.request.training
    batch = (asked.per_device_train_batch_size if asked else None) or 1
    total = search.request.global_batch_size
    if total is not None and total % batch:
        raise RequestError(
            f"global_batch_size: {total} is not a multiple of per_device_train_batch_size {batch}", field="global_batch_size"
        )
    training = _of_batch(search, batch)
    limit, _ = positions(search.case.inventory)
    limit = min(limit or MAX_LENGTH, MAX_LENGTH)
    step = min(LENGTH_STEP, limit)
    length = largest_up_to(limit, lambda size: search.fits(search.recipe(**_varied(replace(training, sequence_length=size)))), step=step)
    return None if length is None else replace(training, sequence_length=length)


def _varied(training: Training) -> Json:
    return {
        "micro_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "sequence_length": training.sequence_length,
    }


def _rendered(search: _Search, training: Training) -> Json:
    recipe = search.recipe(**_varied(training))
    estimate = run_engine(search.case.inventory, recipe)
    return {
        **_sizes(search, training, estimate),
        "estimate": render(replace(search.case, recipe=recipe), estimate),
        "alternatives": list(_alternatives(search, training)),
    }


def _sizes(search: _Search, training: Training, estimate: Estimate) -> Json:
    assert search.case.card is not None
    return {
        "per_device_train_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "max_length": training.sequence_length,
        "global_batch_size": training.micro_batch_size * training.gradient_accumulation_steps,
        "margin_bytes": search.case.card.usable_bytes - device_bytes(estimate),
    }


def _alternatives(search: _Search, training: Training) -> Iterator[Json]:
    """Smaller micro-batches for the same global batch, with the margin each leaves."""
    total = training.micro_batch_size * training.gradient_accumulation_steps
    smaller = [size for size in divisors(total) if size < training.micro_batch_size]
    for size in reversed(smaller[-NUM_ALTERNATIVES:]):
        other = replace(training, micro_batch_size=size, gradient_accumulation_steps=total // size)
        yield _sizes(search, other, run_engine(search.case.inventory, search.recipe(**_varied(other))))


def _shortfall(search: _Search) -> Json:
    asked = search.request.training
    smallest = _of_batch(search, 1)
    if search.request.objective == "longest_sequence":
        smallest = replace(smallest, micro_batch_size=(asked.per_device_train_batch_size if asked else None) or 1)
    recipe = search.recipe(**_varied(smallest))
    estimate = run_engine(search.case.inventory, recipe)
    changes = [_change(search, estimate, *lever) for lever in _levers(recipe)]
    useful = [change for change in changes if change is not None and change["saves_bytes"] > 0]
    useful.sort(key=lambda change: (not change["fits"], -change["saves_bytes"]))
    return {
        "missing_bytes": search.missing_bytes(recipe, estimate),
        "phase": estimate.peak.phase.value,
        "estimate": render(replace(search.case, recipe=recipe), estimate),
        "changes": useful,
    }


def _levers(recipe: Recipe) -> Iterator[tuple[Json, Recipe, str]]:
    """Single changes that save memory: what to set, the recipe with it, and what it costs."""
    training = recipe.training
    assert training is not None
    if not training.gradient_checkpointing:
        on = replace(training, gradient_checkpointing=True, use_reentrant=recipe.stack.trainer_checkpoints_reentrantly)
        yield {"training.gradient_checkpointing": True}, replace(recipe, training=on), "about 30 % slower"
    if "8bit" not in training.optimizer and "4bit" not in training.optimizer:
        yield (
            {"training.optim": "paged_adamw_8bit"},
            replace(recipe, training=replace(training, optimizer="paged_adamw_8bit")),
            "8-bit optimizer states",
        )
    if training.loss is Loss.STOCK:
        yield {"training.use_liger_kernel": True}, replace(recipe, training=replace(training, loss=Loss.LIGER)), "needs liger-kernel"
    if recipe.prepare_for_kbit_training:
        yield {"prepare_model_for_kbit_training": False}, replace(recipe, prepare_for_kbit_training=False), "norms and head stay in 16 bits"
    if not recipe.dtype.is_half:
        yield {"dtype": "bfloat16"}, replace(recipe, dtype=DType.BFLOAT16), "16-bit weights"
    if recipe.adapter is not None and (recipe.quantization is None or not recipe.quantization.kind.is_4bit):
        quantization = Quantization(kind=QuantizationKind.NF4, double_quant=True, compute_dtype=DType.BFLOAT16)
        setting = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
        yield {"quantization": setting}, replace(recipe, quantization=quantization), "slower steps, 4-bit base weights"
    if training.sequence_length > LENGTH_STEP:
        half = training.sequence_length // 2
        yield {"training.max_length": half}, replace(recipe, training=replace(training, sequence_length=half)), "longer samples are cut"


def _change(search: _Search, estimate: Estimate, setting: Json, changed: Recipe, costs: str) -> Json | None:
    try:
        after = run_engine(search.case.inventory, changed)
    except VramplanError:  # a lever that this model cannot pull is not offered
        return None
    return {
        "set": setting,
        "saves_bytes": device_bytes(estimate) - device_bytes(after),
        "fits": search.missing_bytes(changed, after) <= 0,
        "costs": costs,
    }
