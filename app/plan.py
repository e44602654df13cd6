"""`plan` for one card: the largest micro-batch, the longest sequence or the most margin that fits, or what is missing."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from app.answer import SCHEMA_VERSION, Json, device_bytes, is_modelled
from app.reading import Question, read_plan
from app.request import MAX_BATCH, MAX_LENGTH, PlanRequest, Request, TrainingFields
from app.resolution import resolve_recipe
from app.service import Case, interval_of, prepare, render
from estimator.dtypes import DType
from estimator.errors import RequestError, VramplanError
from estimator.estimate import Estimate
from estimator.planner import divisors, largest_down_from, largest_of, largest_up_to
from estimator.recipe import Attention, Loss, Recipe, Training
from estimator.step import needs_mask

# Sequence lengths are searched in steps of this: kernels pad to it anyway.
LENGTH_STEP = 64
NUM_ALTERNATIVES = 4
# Compute capability from which bfloat16 is not emulated.
NATIVE_BFLOAT16 = (8, 0)
_LORA = {"r": 16, "target_modules": "all-linear"}


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
        return self.confirms(recipe, self.case.answerer.estimate(recipe))

    def confirms(self, recipe: Recipe, estimate: Estimate) -> bool:
        """Whether an estimate fits; the allocator is only asked where what is alive does."""
        return self.may_fit(estimate) and self.missing_bytes(recipe, estimate) <= 0

    def may_fit(self, estimate: Estimate) -> bool:
        """Whether what is alive at the peak fits, nothing cached."""
        assert self.case.card is not None
        return estimate.least_device_bytes <= self.case.card.usable_bytes

    def largest(self, limit: int, recipe_of: Callable[[int], Recipe], *, step: int = 1) -> int | None:
        """The largest size that fits: sought by what is alive, confirmed downwards with what the allocator caches."""
        most = largest_up_to(limit, lambda size: self.may_fit(self.case.answerer.estimate(recipe_of(size))), step=step)
        return None if most is None else largest_down_from(most, lambda size: self.fits(recipe_of(size)), step=step)

    def missing_bytes(self, recipe: Recipe, estimate: Estimate) -> int:
        """What the card lacks for a verdict of `fits`; negative when it fits [bytes]."""
        assert self.case.card is not None
        bounds = interval_of(recipe, estimate)
        required = self.case.card.required_bytes(device_bytes(estimate), bounds.device_high_bytes if bounds is not None else None)
        return max(required, estimate.holding.get().without_pressure_bytes) - self.case.card.usable_bytes


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
    if not is_modelled(case.answerer.estimate(case.recipe)):
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
    batch = _search_batch(search, lambda size: search.recipe(**_varied(_of_batch(search, size))))
    return None if batch is None else _of_batch(search, batch)


def _search_batch(search: _Search, recipe_of: Callable[[int], Recipe]) -> int | None:
    total = search.request.global_batch_size
    if total is None:
        return search.largest(MAX_BATCH, recipe_of)

    def fits(size: int) -> bool:
        return search.fits(recipe_of(size))

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
    limit = search.case.inventory.num_positions
    limit = min(limit or MAX_LENGTH, MAX_LENGTH)
    step = min(LENGTH_STEP, limit)
    length = search.largest(limit, lambda size: search.recipe(**_varied(replace(training, sequence_length=size))), step=step)
    return None if length is None else replace(training, sequence_length=length)


def _varied(training: Training) -> Json:
    return {
        "micro_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "sequence_length": training.sequence_length,
    }


def _rendered(search: _Search, training: Training) -> Json:
    recipe = search.recipe(**_varied(training))
    estimate = search.case.answerer.estimate(recipe)
    rendered = render(replace(search.case, recipe=recipe), estimate)
    changed = [{"code": "global_batch_changed", "message": text} for text in _global_batch_changed(search.request, training)]
    rendered["warnings"] = changed + rendered["warnings"]
    return {
        **_sizes(search, training, estimate),
        "estimate": rendered,
        "alternatives": list(_alternatives(search, training)),
    }


def _global_batch_changed(request: PlanRequest, training: Training) -> Iterator[str]:
    asked = request.training
    if request.global_batch_size is not None or asked is None:
        return
    batch, steps = asked.per_device_train_batch_size, asked.gradient_accumulation_steps
    planned = training.micro_batch_size * training.gradient_accumulation_steps
    if batch is None or batch * (steps or 1) == planned:
        return
    total = batch * (steps or 1)
    yield (
        f"the request asks for {batch} × {steps or 1} = {total} samples per optimizer step, the plan has {training.micro_batch_size} × "
        f"{training.gradient_accumulation_steps} = {planned}: without global_batch_size the micro-batch is what the objective finds, at as "
        f"many steps as asked; give global_batch_size {total} to keep it."
    )


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
        yield _sizes(search, other, search.case.answerer.estimate(search.recipe(**_varied(other))))


def _shortfall(search: _Search) -> Json:
    asked = search.request.training
    smallest = _of_batch(search, 1)
    if search.request.objective == "longest_sequence":
        smallest = replace(smallest, micro_batch_size=(asked.per_device_train_batch_size if asked else None) or 1)
    recipe = search.recipe(**_varied(smallest))
    estimate = search.case.answerer.estimate(recipe)
    levers = list(_levers(search.request, recipe))
    changes = [_change(search, recipe, estimate, *lever) for lever in levers]
    useful = [change for change in changes if change is not None and change["saves_bytes"] > 0]
    if not any(change["fits"] for change in useful):
        useful += _together(search, recipe, estimate, levers)
    useful.sort(key=lambda change: (not change["fits"], -change["saves_bytes"]))
    return {
        "missing_bytes": search.missing_bytes(recipe, estimate),
        "phase": estimate.peak.phase.value,
        "estimate": render(replace(search.case, recipe=recipe), estimate),
        "changes": useful,
    }


def _levers(request: Request, recipe: Recipe) -> Iterator[tuple[Json, str]]:
    """Single changes that can save memory: the fields to set, and what it costs."""
    training = recipe.training
    assert training is not None
    half = DType.BFLOAT16 if recipe.compute_capability >= NATIVE_BFLOAT16 else DType.FLOAT16
    if not training.gradient_checkpointing:
        yield {"training.gradient_checkpointing": True}, "about 30 % slower"
    elif recipe.quantization is not None and not recipe.quantization.kind.is_4bit and not training.use_reentrant:
        yield {"training.gradient_checkpointing_kwargs.use_reentrant": True}, "inputs of the layers must require gradients"
    if "8bit" not in training.optimizer and "4bit" not in training.optimizer:
        yield {"training.optim": "paged_adamw_8bit"}, "8-bit optimizer states"
    if training.loss is Loss.STOCK:
        yield {"training.use_liger_kernel": True}, "needs liger-kernel"
    if request.attn_implementation == Attention.EAGER:
        yield {"attn_implementation": "sdpa"}, "attention weights are not returned"
    if training.flattened and needs_mask(recipe) and recipe.compute_capability >= NATIVE_BFLOAT16:
        yield {"attn_implementation": "flash_attention_2"}, "needs flash-attn"
    if recipe.prepare_for_kbit_training:
        yield {"prepare_model_for_kbit_training": False}, "norms and head stay in 16 bits"
    if not recipe.dtype.is_half and (recipe.adapter is not None or half is DType.BFLOAT16):  # trained float16 weights are refused
        yield {"dtype": half.value}, "16-bit weights"
    if recipe.adapter is None:
        yield {"peft": _LORA}, "trains an adapter, not the model"
        yield {"peft": _LORA, "quantization": _nf4(half)}, "trains an adapter on 4-bit base weights, slower steps"
    elif recipe.quantization is None or not recipe.quantization.kind.is_4bit:
        yield {"quantization": _nf4(half)}, "slower steps, 4-bit base weights"
    if training.sequence_length > LENGTH_STEP:
        yield {"training.max_length": training.sequence_length // 2}, "longer samples are cut"


def _nf4(compute_dtype: DType) -> Json:
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute_dtype.value,
    }


def _change(search: _Search, before: Recipe, estimate: Estimate, setting: Json, costs: str) -> Json | None:
    """What a change saves: the request with it, asked anew."""
    assert before.training is not None
    try:
        changed = resolve_recipe(_with(search.request, before.training, setting), search.case.inventory, search.case.card)
        if changed == before:
            return None
        after = search.case.answerer.estimate(changed)
    except VramplanError:  # a lever that this model cannot pull is not offered
        return None
    return {
        "set": setting,
        "saves_bytes": device_bytes(estimate) - device_bytes(after),
        "fits": is_modelled(after) and search.confirms(changed, after),
        "costs": costs,
    }


def _together(search: _Search, before: Recipe, estimate: Estimate, levers: list[tuple[Json, str]]) -> list[Json]:
    """As many changes as it takes, the cheapest first, less those that turn out not to be needed; none where all of them do not do."""
    chosen: list[tuple[Json, str]] = []
    found, saved = None, 0
    for lever in levers:
        change = _change(search, before, estimate, *_joined([*chosen, lever]))
        if change is not None and change["saves_bytes"] > saved:
            chosen.append(lever)
            found, saved = change, change["saves_bytes"]
            if change["fits"]:
                break
    if found is None or not found["fits"]:
        return []
    for lever in list(chosen):
        fewer = [other for other in chosen if other is not lever]
        change = _change(search, before, estimate, *_joined(fewer)) if len(fewer) > 1 else None
        if change is not None and change["fits"]:
            chosen, found = fewer, change
    return [found]


def _joined(levers: list[tuple[Json, str]]) -> tuple[Json, str]:
    setting: Json = {}
    for part, _ in levers:
        setting |= part
    return setting, "; ".join(costs for _, costs in levers)


def _with(request: PlanRequest, training: Training, setting: Json) -> Request:
    """The request for these sizes, with some fields set."""
    payload = request.model_dump(exclude_unset=True, exclude={"global_batch_size", "objective"})
    sizes = {
        "training.per_device_train_batch_size": training.micro_batch_size,
        "training.gradient_accumulation_steps": training.gradient_accumulation_steps,
        "training.max_length": training.sequence_length,
    }
    for path, value in (sizes | setting).items():
        *sections, name = path.split(".")
        target = payload
        for section in sections:
            target[section] = target.get(section) or {}
            target = target[section]
        target[name] = value
    return Request.model_validate(payload)
