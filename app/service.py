"""The application: one question in, one answer out. The command line, HTTP and the page all call these functions and nothing below them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from app import corrections
from app.answer import REFUSALS, Json, device_bytes, is_modelled, render_estimate
from app.answered import Answered
from app.card import Card, card_of
from app.engine import Answerer
from app.notices import notices
from app.objective import with_classes
from app.reading import Question, read_estimate
from app.request import InlineModel, Request
from app.resolution import resolve_recipe
from app.unmodelled import bears
from app.versions import stack_of
from estimator.allocator_settings import parse_settings
from estimator.correction import interval
from estimator.dtypes import DType
from estimator.engine import Device
from estimator.errors import VramplanError
from estimator.estimate import Engine, Estimate, Interval, Notice
from estimator.explain import explain
from estimator.inventory import Inventory
from estimator.recipe import Recipe
from estimator.sources import resolve
from estimator.sources.resolve import ResolvedModel
from estimator.sources.tracing import Subject
from estimator.static_memory import stored_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A question brought together with its model and its card."""

    question: Question[Request]
    model: ResolvedModel
    recipe: Recipe
    card: Card | None
    answerer: Answerer

    @property
    def inventory(self) -> Inventory:
        return self.model.inventory

    def on(self, card: Card, recipe: Recipe) -> "Case":
        """The same question on another card, for which the recipe was resolved."""
        answerer = replace(self.answerer, device=replace(self.answerer.device, usable_bytes=card.usable_bytes))
        return replace(self, recipe=recipe, card=card, answerer=answerer)

    def model_json(self) -> Json:
        """The model in the contract's words."""
        return {
            "id": self.model.id,
            "revision": self.model.revision,
            "model_type": self.inventory.model_type,
            "source": self.model.source,
            "num_parameters": self.model.num_parameters or self.inventory.num_parameters,
            **_checkpoint_json(self.model),
        }


def answer(payload: Mapping[str, Any]) -> Json:
    """The answer to a request of the contract.

    Raises:
        VramplanError: if the request or the model cannot be answered for.
    """
    return answer_of(prepare(read_estimate(payload)))


def answer_of(case: Case) -> Json:
    """The answer to a case.

    Raises:
        VramplanError: if it cannot be answered for.
    """
    return render(case, case.answerer.estimate(case.recipe))


def prepare(question: Question[Request]) -> Case:
    """Find the model and the card, and resolve every default."""
    request = question.request
    card = card_of(request.hardware)
    model = find_model(request)
    recipe = resolve_recipe(request, model.inventory, card)
    subject = Subject(config=model.config, inventory=model.inventory, is_public=model.is_public)
    device = Device(usable_bytes=card.usable_bytes if card is not None else None, settings=parse_settings(request.pytorch_cuda_alloc_conf))
    answerer = Answerer(engine=request.engine, subject=subject, device=device, corrections=corrections.current())
    return Case(question=question, model=model, recipe=recipe, card=card, answerer=answerer)


def is_at_hand(request: Request) -> bool:
    """Whether the model of a request is known without asking the Hub or building it.

    Raises:
        VramplanError: if its id, revision or config cannot be accepted.
    """
    return resolve.is_at_hand(_named_or_carried(request), request.revision)


def _named_or_carried(request: Request) -> str | Mapping[str, Any]:
    model = request.model
    return dict(model.config) if isinstance(model, InlineModel) else model


def find_model(request: Request) -> ResolvedModel:
    """The model that a request names or carries."""
    found = resolve.resolve(_named_or_carried(request), request.revision)
    if request.training is None:
        found = found.as_stored
    return with_classes(found, request, stack_of(request.stack))


def _checkpoint_json(model: ResolvedModel) -> Json:
    """What the files store, where they were looked at."""
    checkpoint = model.checkpoint
    if checkpoint is None:
        return {}
    files = checkpoint.files
    stored = {"stored_bytes": files.stored_bytes, "num_tensors": files.num_tensors, "num_files": files.num_files}
    return {"checkpoint": {"quantization": checkpoint.method, "basis": "safetensors headers", **stored}}


def render(case: Case, estimate: Estimate) -> Json:
    """The answer in the contract's words, with explanations and warnings."""
    bounds = interval_of(case.recipe, estimate)
    question = case.question
    answered = _answered(case, estimate)
    rendered = render_estimate(
        model=case.model_json(),
        recipe=case.recipe,
        estimate=estimate,
        explanations=explain(
            case.inventory, case.recipe, case.answerer.step(case.recipe).program if estimate.engine is Engine.TRACE else None
        ),
        card=case.card,
        interval=bounds,
        notices=notices(
            replace(
                answered,
                has_interval=bounds is not None,
                without_quantization=_without_quantization(case, estimate),
                with_reentry=_with_reentry(case, estimate),
            )
        ),
        ignored=sorted({*question.ignored, *question.unmodelled, *question.request.set_aside.ignored} - {*answered.unmodelled}),
    )
    in_use = case.answerer.corrections
    return rendered if in_use is None else {**rendered, "corrections": corrections.described(estimate, case.recipe, in_use)}


def _answered(case: Case, estimate: Estimate) -> Answered:
    """Without an interval and what other recipes would take."""
    question = case.question
    return Answered(
        request=question.request,
        inventory=case.inventory,
        recipe=case.recipe,
        estimate=estimate,
        stored=tuple(stored_tensors(case.inventory, case.recipe)),
        card=case.card,
        unmodelled=tuple(field for field in question.unmodelled if bears(field, case.recipe)),
        evaluation=question.evaluation,
        has_own_code=case.model.has_own_code,
        checkpoint=case.model.checkpoint,
        is_stale=case.model.is_stale,
        has_interval=False,
        without_quantization=None,
        with_reentry=None,
    )


def refusals(case: Case) -> tuple[Notice, ...]:
    """What a card or a library would stop the run with; it takes no estimate of the step to tell."""
    return tuple(n for n in notices(_answered(case, case.answerer.loaded(case.recipe))) if n.code in REFUSALS)


def interval_of(recipe: Recipe, estimate: Estimate) -> Interval | None:
    """How wrong the estimate may be, as far as published measurements tell; a corrected one, as far as those behind the corrections do."""
    if not is_modelled(estimate):
        return None
    in_use = corrections.current()
    return interval(
        recipe=recipe,
        kernels=estimate.kernels,
        allocated_bytes=estimate.peak.allocated_bytes,
        device_bytes=device_bytes(estimate),
        classes=None if in_use is None else corrections.residual_classes(in_use),
    )


def _without_quantization(case: Case, estimate: Estimate) -> Estimate | None:
    """The same run as plain LoRA on a bfloat16 base, to see whether quantization pays."""
    recipe = case.recipe
    if recipe.quantization is None or recipe.adapter is None or recipe.training is None or not is_modelled(estimate):
        return None
    plain = replace(recipe, quantization=None, prepare_for_kbit_training=False, dtype=DType.BFLOAT16)
    try:
        return case.answerer.estimate(plain)
    except VramplanError:  # a comparison that cannot be made is left out, the answer stands without it
        return None


def _with_reentry(case: Case, estimate: Estimate) -> Estimate | None:
    """The same run of LLM.int8 with reentrant checkpointing."""
    recipe = case.recipe
    training, quantization = recipe.training, recipe.quantization
    if training is None or quantization is None or quantization.kind.is_4bit or not is_modelled(estimate):
        return None
    if not training.gradient_checkpointing or training.use_reentrant:
        return None
    return case.answerer.estimate(replace(recipe, training=replace(training, use_reentrant=True)))
