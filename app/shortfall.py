"""What is missing, and the smallest changes that make a run fit, each asked for anew as a request of its own."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations, groupby
from typing import Any

from app.answer import Json, device_bytes, is_modelled
from app.card import Card, card_of
from app.evaluation import evaluator_of
from app.levers import Cost, Lever, another_card, larger_cards, levers, shorter
from app.reading import read_estimate
from app.resolution import resolve_recipe
from app.service import Case, render
from app.settings import applied, joined, spelled
from app.trainer_files.read_back import KINDS, asked_and_run, differences
from app.trainer_files.spread import with_hardware
from estimator.allocator_settings import VARIABLE, parse_settings
from estimator.correction import interval
from estimator.device import context_bytes
from estimator.engine import Device
from estimator.errors import VramplanError
from estimator.estimate import Engine, Estimate
from estimator.grid import Sizes
from estimator.phases import Basis
from estimator.planner import largest, lengths
from estimator.recipe import Recipe
from estimator.shortfall import Chosen, minimal_sets, missing_by_phase
from estimator.units import MIB

# Changes of a run's sizes and of the machine, for which every trainer has words.
_OF_ANY_TRAINER = frozenset(("card", "expandable_segments", "length", "micro_batch", "num_gpus"))
# Fields of a plan that are none of an estimate.
PLAN_FIELDS = ("global_batch_size", "objective", "policy", "sort", "epoch_tokens", "confirm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A changed request, answered."""

    recipe: Recipe
    card: Card
    estimate: Estimate

    @property
    def may_fit(self) -> bool:
        """Whether what is alive at the peak fits, nothing cached: only then a search replays the allocator, which takes the longest."""
        return self.estimate.least_device_bytes <= self.card.usable_bytes

    @property
    def missing_bytes(self) -> int:
        """What the card lacks for a verdict of `fits`, for searches: with the allocator's cache modelled where the run does not fit, and
        replayed, which is not above 0, where it does [bytes]."""
        if self.fits:
            return self.required_unpressed_bytes() - self.card.usable_bytes
        return max(1, self.card.required_bytes(self.estimate.quick_device_bytes) - self.card.usable_bytes)

    def required_unpressed_bytes(self, enough_bytes: int | None = None) -> int:
        """What must be usable for a verdict of `fits` where the allocator keeps all that it caches, as that of one that fits does [bytes].

        Args:
            enough_bytes: see `Estimate.without_pressure_bytes` [bytes].
        """
        device = max(self.estimate.without_pressure_bytes(enough_bytes), self.estimate.peak.allocated_bytes)
        return self.card.required_bytes(device, high_bytes(self.recipe, self.estimate, device))

    @property
    def fits(self) -> bool:
        """Whether nothing is missing: settled without the card's limit, by a replay that ends where too much is held, or by none."""
        return self.may_fit and self.required_unpressed_bytes(self.limit_bytes + 1) <= self.card.usable_bytes

    @property
    def limit_bytes(self) -> int:
        """What may be held, so that as much as the estimate may be wrong by is usable beside it [bytes]."""
        usable = self.card.usable_bytes
        at_limit = self.card.required_bytes(usable, high_bytes(self.recipe, self.estimate, usable))
        # What must be usable grows at least in proportion: what is held beyond this share is too much.
        return usable * usable // at_limit


def missing_bytes(recipe: Recipe, card: Card, estimate: Estimate) -> int:
    """What a card lacks for a verdict of `fits`; negative when it fits [bytes]."""
    return required_bytes(recipe, card, estimate) - card.usable_bytes


def required_bytes(recipe: Recipe, card: Card, estimate: Estimate) -> int:
    """What must be usable for a verdict of `fits` [bytes]."""
    device = device_bytes(estimate)
    return max(card.required_bytes(device, high_bytes(recipe, estimate, device)), estimate.holding.get().without_pressure_bytes)


def high_bytes(recipe: Recipe, estimate: Estimate, device_bytes: int) -> int | None:
    """The upper end of the interval around what the card must hold; None where there is none [bytes]."""
    allocated = estimate.peak.allocated_bytes
    bounds = interval(recipe=recipe, kernels=estimate.kernels, allocated_bytes=allocated, device_bytes=device_bytes)
    return bounds.device_high_bytes if bounds is not None and is_modelled(estimate) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A run that does not fit, and what has been asked about it."""

    case: Case
    """With the recipe that does not fit."""
    estimate: Estimate
    payload: Json
    """The same run as a request of `estimate`."""
    global_batch: int
    """Samples per optimizer step of one card."""
    known: dict[str, Outcome | None] = field(default_factory=dict)

    @property
    def card(self) -> Card:
        assert self.case.card is not None
        return self.case.card

    def outcome(self, setting: Json) -> Outcome | None:
        """The request with some fields set, read and answered anew; None when it is refused, not modelled or the same run."""
        key = repr(sorted(setting.items()))
        if key not in self.known:
            self.known[key] = self._asked(setting)
        return self.known[key]

    def _asked(self, setting: Json) -> Outcome | None:
        try:
            request = read_estimate(applied(self.payload, setting)).request
            card = card_of(request.hardware)
            assert card is not None
            recipe = resolve_recipe(request, self.case.inventory, card)
            device = Device(usable_bytes=card.usable_bytes, settings=parse_settings(request.pytorch_cuda_alloc_conf))
            if recipe == self.case.recipe and card == self.card and device == self.case.answerer.device:
                return None
            estimate = replace(self.case.answerer, device=device).estimate(recipe)
        except VramplanError:  # a change that this request, model or library does not allow is not offered
            return None
        return Outcome(recipe=recipe, card=card, estimate=estimate) if is_modelled(estimate) else None

    def fits(self, lever: Lever) -> bool:
        """Whether a change is enough."""
        outcome = self.outcome(lever.set)
        return outcome is not None and outcome.fits

    def all_levers(self) -> list[Lever]:
        """What could be changed, in the request's own spelling, the smallest cost first."""
        request, recipe = self.case.question.request, self.case.recipe
        found = levers(request, recipe, self.case.inventory, self.payload, global_batch=self.global_batch)
        length = self._longest()
        if length is not None:
            found = [lever for lever in found if lever.family != "length"] + [shorter(length)]
        return self._within_trainer([replace(lever, set=spelled(self.payload, lever.set)) for lever in found])

    def _within_trainer(self, found: list[Lever]) -> list[Lever]:
        """Changes that the trainer of the user's file can be told to make: written as its file, each is read back as the same run."""
        trainer = self.case.question.request.set_aside.trainer
        if trainer is None:
            return found
        kept = [lever for lever in found if "trainer" not in lever.set]
        if trainer not in KINDS:  # a script of one's own can do all but become another trainer
            return kept
        before = asked_and_run(self.payload, trainer)
        if before is None:
            return kept
        return [lever for lever in kept if lever.family in _OF_ANY_TRAINER or self._stays(lever, trainer, before)]

    def _stays(self, lever: Lever, trainer: str, before: tuple[Recipe, Recipe]) -> bool:
        """Whether a change comes back: beside it the trainer may choose otherwise only as it does already, or where that takes no more."""
        after = asked_and_run(applied(self.payload, lever.set), trainer)
        if after is None:
            return False
        own = set(differences(*after))
        if own <= set(differences(*before)):
            return True
        changed = {_path(sentence) for sentence in differences(before[0], after[0])}
        if changed & {_path(sentence) for sentence in own} or self.estimate.engine is Engine.TRACE:
            return False
        asked, run = (self.case.answerer.estimate(recipe).least_device_bytes for recipe in after)
        return run <= asked

    def _longest(self) -> int | None:
        """The longest sequence that fits with all else as it is, the allocator's cache modelled, and put right by the replay at hand."""
        training, context = self.case.recipe.training, context_bytes(self.case.recipe.num_multiprocessors)
        assert training is not None
        if training.sequence_length <= 1:
            return None
        evaluator = evaluator_of(self.case, self.case.recipe)
        batch, steps = training.micro_batch_size, training.gradient_accumulation_steps
        modelled = int(evaluator.memory(Sizes.of(batch, training.sequence_length, steps)).required_bytes(context)[0])
        replayed = Outcome(recipe=self.case.recipe, card=self.card, estimate=self.estimate).required_unpressed_bytes()
        usable = self.card.usable_bytes * modelled // replayed
        found = largest(evaluator, lengths(batch, steps, training.sequence_length - 1), usable, context)
        return None if found is None else int(found.length[0])


def _path(difference: str) -> str:
    """The choice that a sentence is about."""
    return difference.partition(":")[0]


def shortfall(shortage: Shortage) -> Json:
    """The shortfall in the contract's words."""
    case, estimate = shortage.case, shortage.estimate
    required = required_bytes(case.recipe, shortage.card, estimate)
    by_phase = missing_by_phase(case.recipe, estimate, peak_required_bytes=required, usable_bytes=shortage.card.usable_bytes)
    return {
        "missing_bytes": required - shortage.card.usable_bytes,
        "phase": estimate.peak.phase.value,
        "missing_by_phase": {phase.value: missing for phase, missing in by_phase.items()},
        "estimate": render(case, estimate),
        "changes": changes(shortage),
        "advice": list(_advice(estimate)),
    }


def changes(shortage: Shortage) -> list[Json]:
    """Single changes, and the smallest combinations of such as cost less than any that is enough alone; what fits first, then by cost."""
    families = _families(shortage.all_levers())
    best = [lever for family in families.values() if (lever := _best(shortage, family)) is not None]
    found = [_rendered(shortage, [lever]) for lever in [*best, *_cards(shortage)]]
    found = [change for change in found if change["saves_bytes"] > 0 or change["fits"]]
    return sorted([*found, *_combined(shortage, best, families)], key=_order)


def smallest_change(shortage: Shortage) -> Json | None:
    """The first of `changes` that makes the run fit, without asking what the others would save."""
    families = _families(shortage.all_levers())
    best: list[Lever] = []
    enough: list[Lever] = []
    for _, group in groupby(sorted(families.values(), key=_rank_of), key=_rank_of):
        best += [lever for family in group if (lever := _best(shortage, family)) is not None]
        enough = [lever for lever in best if shortage.fits(lever)]
        if enough:
            break
    found = [_rendered(shortage, [lever]) for lever in enough or _cards(shortage)]
    return min([*found, *_combined(shortage, best, families)], key=_order, default=None)


def _combined(shortage: Shortage, best: list[Lever], families: Mapping[str, list[Lever]]) -> list[Json]:
    bound = min((lever.cost.rank for lever in best if shortage.fits(lever)), default=Cost.MONEY.rank)
    cheaper = [lever for lever in best if lever.cost.rank < min(bound, Cost.MONEY.rank)]
    return [_rendered(shortage, used) for used in _together(shortage, cheaper, families)] if len(cheaper) > 1 else []


def _rank_of(family: list[Lever]) -> int:
    return family[0].cost.rank


def _order(change: Json) -> tuple[object, ...]:
    return not change["fits"], *(_effort(change) if change["fits"] else ()), -change["saves_bytes"]


def _effort(change: Json) -> tuple[int, int]:
    return Cost(change["cost"]).rank, len(change["parts"])


def _rendered(shortage: Shortage, used: list[Lever]) -> Json:
    setting = joined([lever.set for lever in used])
    assert setting is not None
    outcome = shortage.outcome(setting)
    assert outcome is not None
    lacks = missing_bytes(outcome.recipe, outcome.card, outcome.estimate)
    is_other_card = outcome.card != shortage.card  # on which the run takes as much as before, but for the context
    return {
        "set": setting,
        "parts": [lever.set for lever in used],
        "saves_bytes": 0 if is_other_card else device_bytes(shortage.estimate) - device_bytes(outcome.estimate),
        "adds_bytes": outcome.card.usable_bytes - shortage.card.usable_bytes,
        "fits": lacks <= 0,
        "missing_bytes": max(lacks, 0),
        "cost": max((lever.cost for lever in used), key=lambda cost: cost.rank).value,
        "costs": "; ".join(lever.costs for lever in used),
    }


def _families(found: Iterable[Lever]) -> dict[str, list[Lever]]:
    families: dict[str, list[Lever]] = {}
    for lever in found:
        families.setdefault(lever.family, []).append(lever)
    return families


def _best(shortage: Shortage, family: list[Lever]) -> Lever | None:
    """The mildest change of a family that is enough, else the one that lacks least; None where none is accepted."""
    answered = [(lever, outcome) for lever in family if (outcome := shortage.outcome(lever.set)) is not None]
    enough = next((lever for lever, outcome in answered if outcome.fits), None)
    return enough or min(answered, key=lambda pair: pair[1].missing_bytes, default=(None, None))[0]


def _cards(shortage: Shortage) -> list[Lever]:
    """The next card up that is enough."""
    if shortage.estimate.engine is Engine.TRACE:  # a trace for every card takes too long
        return []
    for gpu in larger_cards(shortage.card.capacity_bytes, shortage.case.recipe):
        lever = another_card(gpu, shortage.payload)
        if shortage.fits(lever):
            return [lever]
    return []


def _together(shortage: Shortage, strongest: list[Lever], families: Mapping[str, list[Lever]]) -> list[list[Lever]]:
    """Combinations that are enough, of which no part is; each change in the mildest form that does."""

    def missing(chosen: Chosen) -> int | None:
        return _missing(shortage, [strongest[index] for index in sorted(chosen)])

    quick = shortage.estimate.engine is Engine.ANALYTIC
    sets = minimal_sets(missing, order=range(len(strongest)), limit=4 if quick else 1, budget=200 if quick else 1)
    return [_mildest(shortage, [strongest[index] for index in sorted(chosen)], families) for chosen in sets]


def _missing(shortage: Shortage, used: list[Lever]) -> int | None:
    if not used:
        return missing_bytes(shortage.case.recipe, shortage.card, shortage.estimate)
    setting = joined([lever.set for lever in used])
    outcome = shortage.outcome(setting) if setting is not None else None
    return None if outcome is None else outcome.missing_bytes


def _mildest(shortage: Shortage, used: list[Lever], families: Mapping[str, list[Lever]]) -> list[Lever]:
    """The same changes, each as mild as it may be with the others as they are."""
    for place, lever in enumerate(used):
        for milder in families[lever.family]:
            if milder == lever:
                break
            others = [*used[:place], milder, *used[place + 1 :]]
            enough = _missing(shortage, others)
            if enough is not None and enough <= 0 and not _has_part_that_fits(shortage, others):
                used = others
                break
    return used


def _has_part_that_fits(shortage: Shortage, used: list[Lever]) -> bool:
    parts = (list(part) for size in range(1, len(used)) for part in combinations(used, size))
    return any((found := _missing(shortage, part)) is not None and found <= 0 for part in parts)


def _advice(estimate: Estimate) -> Iterable[Json]:
    """What may help where it cannot be worked out: the allocator's settings, of runs whose allocations are not replayed."""
    holding = estimate.holding.get()
    idle = holding.reserved_bytes - estimate.peak.allocated_bytes
    if holding.basis is Basis.MODELLED and idle >= MIB:
        yield {
            "environment": {VARIABLE: "expandable_segments:True"},
            "saves_at_most_bytes": idle,
            "costs": "an environment variable of the run; needs Linux; what this run caches is modelled and not replayed, so that how much "
            "of it comes back is not known",
        }


def payload_of(payload: Mapping[str, Any], sizes: Mapping[str, Any]) -> Json:
    """A request of `estimate` for some sizes, from one of `plan`."""
    kept = with_hardware({name: value for name, value in payload.items() if name not in PLAN_FIELDS})
    return applied(kept, spelled(kept, sizes))
