"""`plan`: the largest micro-batch, the longest sequence or the most margin on a card, or what is missing; without a card, which fit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from app.answer import SCHEMA_VERSION, Json, device_bytes
from app.evaluation import evaluator_of
from app.reading import Question, read_plan
from app.request import MAX_BATCH, MAX_LENGTH, PlanRequest, Request, TrainingFields
from app.search import Search
from app.service import Case, prepare, render
from app.shortfall import Shortage, payload_of, shortfall
from app.which import which
from estimator.correction import margin_without_interval
from estimator.errors import RequestError
from estimator.grid import Evaluator, Sizes
from estimator.planner import LENGTH_STEP, Goal, PlanObjective, Policy, divisors, largest, lengths
from estimator.recipe import Training

NUM_ALTERNATIVES = 4


def plan(payload: Mapping[str, Any]) -> Json:
    """The answer to `plan`: one of `plan`, `shortfall` and `gpus` is set.

    Raises:
        VramplanError: if the request or the model cannot be answered for.
    """
    question = read_plan(payload)
    case = prepare(_completed(question))
    goal = goal_of(question.request, case)
    policy = Policy(question.request.policy)
    if case.card is None:
        if policy is not Policy.CACHE_KEPT:
            raise RequestError(f"policy: {policy.value!r} needs a card (hardware.gpu); accepted without one: cache_kept", field="policy")
        return which(question.request, case, goal)
    found = _Plan(search=Search(case=case, goal=goal, policy=policy), request=question.request, payload=payload)
    return {"schema_version": SCHEMA_VERSION, **found.answer(), "gpus": None}


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


def goal_of(request: PlanRequest, case: Case) -> Goal:
    """What is given and what is to be found.

    Raises:
        RequestError: if the sizes that are given do not make up the global batch.
    """
    training = case.recipe.training
    assert training is not None
    asked = request.training
    limit = case.inventory.num_positions
    return Goal(
        objective=PlanObjective(request.objective),
        micro_batch_size=(asked.per_device_train_batch_size if asked else None) or 1,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        sequence_length=training.sequence_length,
        global_batch_size=request.global_batch_size,
        num_gpus=case.recipe.parallel.num_replicas,
        batch_limit=MAX_BATCH,
        length_limit=min(limit or MAX_LENGTH, MAX_LENGTH),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """One case whose batch and length vary, on one card."""

    search: Search
    request: PlanRequest
    payload: Mapping[str, Any]

    @property
    def case(self) -> Case:
        return self.search.case

    @property
    def goal(self) -> Goal:
        return self.search.goal

    def answer(self) -> Json:
        evaluator = evaluator_of(self.case, self.case.recipe)
        found = self.search.found(evaluator)
        if found is None:
            missing = shortfall(self.shortage(self.goal.smallest()))
            return {"plan": None, "shortfall": {**missing, "cache_given_back": self.with_cache_given_back(evaluator)}}
        return {"plan": self.rendered(evaluator, found), "shortfall": None}

    def with_cache_given_back(self, evaluator: Evaluator) -> Json | None:
        """What the other policy would recommend where this one has nothing."""
        if self.search.policy is Policy.CACHE_GIVEN_BACK:
            return None
        found = replace(self.search, policy=Policy.CACHE_GIVEN_BACK).found(evaluator)
        return None if found is None else self.described(found)[0]

    def shortage(self, sizes: Sizes) -> Shortage:
        recipe = self.search.recipe(sizes)
        training = recipe.training
        assert training is not None
        return Shortage(
            case=replace(self.case, recipe=recipe),
            estimate=self.case.answerer.estimate(recipe),
            payload=payload_of(self.payload, as_fields(training)),
            global_batch=training.micro_batch_size * training.gradient_accumulation_steps,
        )

    def rendered(self, evaluator: Evaluator, found: Sizes) -> Json:
        recipe = self.search.recipe(found)
        training = recipe.training
        assert training is not None
        rendered = render(replace(self.case, recipe=recipe), self.case.answerer.estimate(recipe))
        changed = [{"code": "global_batch_changed", "message": text} for text in _global_batch_changed(self.request, training)]
        rendered["warnings"] = changed + rendered["warnings"]
        return {
            **self.described(found)[0],
            "longest_max_length": self.longest(evaluator, training),
            "policy": self.policy(rendered["peak"]["interval"]),
            "estimate": rendered,
            "alternatives": self.alternatives(training),
        }

    def described(self, sizes: Sizes) -> list[Json]:
        """Sizes with what each leaves free on the card."""
        card = self.case.card
        assert card is not None
        estimates = [self.case.answerer.estimate(self.search.recipe(sizes.at([n]))) for n in range(len(sizes))]
        return [
            {
                "per_device_train_batch_size": int(sizes.batch[n]),
                "gradient_accumulation_steps": int(sizes.steps[n]),
                "max_length": int(sizes.length[n]),
                "global_batch_size": int(sizes.batch[n] * sizes.steps[n]) * self.goal.num_gpus,
                "margin_bytes": card.usable_bytes - device_bytes(estimates[n]),
            }
            for n in range(len(sizes))
        ]

    def longest(self, evaluator: Evaluator, training: Training) -> int | None:
        """The longest sequence at a micro-batch; None where one estimate after the other would be needed."""
        if self.goal.objective is PlanObjective.LONGEST_SEQUENCE:
            return training.sequence_length
        if not evaluator.is_quick:
            return None
        candidates = lengths(training.micro_batch_size, training.gradient_accumulation_steps, self.goal.length_limit)
        known = Sizes.of(training.micro_batch_size, training.sequence_length, training.gradient_accumulation_steps)
        guessed = partial(largest, evaluator, candidates, context_bytes=self.search.context_bytes)
        found = self.search.near(evaluator, candidates, guessed, known)
        return training.sequence_length if found is None else max(training.sequence_length, int(found.length[0]))

    def policy(self, interval: Json | None) -> Json:
        """What "fits" asks for."""
        assert self.case.card is not None
        margin = f"the estimate and {100 * margin_without_interval().share:.1f} %"
        return {
            "name": self.search.policy.value,
            "headroom_bytes": self.case.card.headroom_bytes,
            "margin": margin if interval is None else f"the upper end of the interval of {100 * interval['coverage']:.0f} %",
        }

    def alternatives(self, training: Training) -> list[Json]:
        """Smaller micro-batches for the same global batch, with the margin each leaves."""
        total = training.micro_batch_size * training.gradient_accumulation_steps
        smaller = [size for size in divisors(total) if size < training.micro_batch_size][-NUM_ALTERNATIVES:]
        if not smaller:
            return []
        sizes = Sizes.of(smaller[::-1], training.sequence_length, [total // size for size in reversed(smaller)])
        return self.described(sizes)


def as_fields(training: Training) -> Json:
    """The sizes of a run as fields of a request."""
    return {
        "training.per_device_train_batch_size": training.micro_batch_size,
        "training.gradient_accumulation_steps": training.gradient_accumulation_steps,
        "training.max_length": training.sequence_length,
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
