"""The best size of a run on one card: guessed with the allocator's cache modelled, confirmed with the allocator replayed."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from app.answer import device_bytes
from app.service import Case
from app.shortfall import Outcome
from estimator.device import context_bytes, same_kernels
from estimator.grid import Evaluator, Sizes
from estimator.planner import Goal, PlanObjective, Policy, last_near, search
from estimator.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One case whose batch and length vary, on its card."""

    case: Case
    goal: Goal
    policy: Policy = Policy.CACHE_KEPT
    replayed: set[tuple[object, ...]] = field(default_factory=set)
    """Sizes whose run had to be replayed, for each kind of card: replays of one are those of all of its kind."""

    def found(self, evaluator: Evaluator) -> Sizes | None:
        """The best size that fits, with the allocator replayed; near where its cache, modelled, lets one fit, unless candidates are few."""
        candidates = self.goal.candidates()
        if self.goal.objective is PlanObjective.MOST_MARGIN:
            return self.with_most_margin(evaluator, candidates)
        if self.goal.keeps_global_batch:  # few, and unlike each other
            place = next((place for place in reversed(range(len(candidates))) if self.fits(candidates.at([place]))), None)
            return None if place is None else candidates.at([place])
        return self.near(evaluator, candidates, partial(search, evaluator, self.goal, context_bytes=self.context_bytes))

    def with_most_margin(self, evaluator: Evaluator, candidates: Sizes) -> Sizes | None:
        """The size that leaves most: of a given global batch each divisor is replayed, else the best with the cache modelled."""
        assert self.case.card is not None
        if not self.goal.keeps_global_batch:
            guess = search(evaluator, self.goal, self.case.card.usable_bytes, self.context_bytes)
            return guess if guess is not None and self.fits(guess) else None
        asked = [(self.outcome(candidates.at([place])), place) for place in range(len(candidates))]
        fitting = [(outcome.estimate.without_pressure_bytes(), -place) for outcome, place in asked if self.is_enough(outcome)]
        return candidates.at([-min(fitting)[1]]) if fitting else None

    def near(
        self, evaluator: Evaluator, candidates: Sizes, guessed: Callable[[int], Sizes | None], known: Sizes | None = None
    ) -> Sizes | None:
        """The last candidate that fits with the allocator replayed, looked for around a guess.

        Args:
            guessed: the last that fits so many bytes with the cache modelled.
            known: a size whose replay tells how far the model is off; the first guess if None.
        """
        start = self._start(evaluator, candidates, guessed, known)
        place = last_near(start, len(candidates), lambda place: self.fits(candidates.at([place])))
        return None if place is None else candidates.at([place])

    def _start(self, evaluator: Evaluator, candidates: Sizes, guessed: Callable[[int], Sizes | None], known: Sizes | None) -> int:
        """Where to begin; -1 where nothing may fit. See `near`."""
        if self.policy is Policy.CACHE_GIVEN_BACK:
            # Never below what keeps its cache: where it is given back, some sizes fail between others that live.
            kept = replace(self, policy=Policy.CACHE_KEPT).near(evaluator, candidates, guessed, known)
            return -1 if kept is None else _place(candidates, kept)
        assert self.case.card is not None
        usable = self.case.card.usable_bytes
        guess = guessed(usable) if known is None else known
        known = guess if guess is not None else candidates.at([0])
        outcome = self.outcome(known)
        if outcome.may_fit:
            modelled = int(evaluator.memory(known).required_bytes(self.context_bytes)[0])
            guess = guessed(usable * modelled // outcome.required_unpressed_bytes())
        return -1 if guess is None else _place(candidates, guess)

    def fits(self, sizes: Sizes) -> bool:
        """Whether one size fits as the policy asks, by its own estimate."""
        return self.is_enough(self.outcome(sizes))

    def is_enough(self, outcome: Outcome) -> bool:
        """Whether a size fits; or, where the allocator's cache may be given back, whether its run ends in what the margin leaves."""
        if self.policy is Policy.CACHE_KEPT or not outcome.may_fit or outcome.fits:
            return outcome.fits
        limit = outcome.limit_bytes
        answerer = self.case.answerer
        held = replace(answerer, device=replace(answerer.device, usable_bytes=limit)).estimate(outcome.recipe)
        return device_bytes(held) <= limit

    def outcome(self, sizes: Sizes) -> Outcome:
        """One size on the card."""
        assert self.case.card is not None
        recipe = self.recipe(sizes)
        found = Outcome(recipe=recipe, card=self.case.card, estimate=self.case.answerer.estimate(recipe))
        if found.may_fit:
            self.replayed.add((same_kernels(recipe.compute_capability), recipe.adapter, recipe.training))
        return found

    @property
    def context_bytes(self) -> int:
        return context_bytes(self.case.recipe.num_multiprocessors)

    def recipe(self, sizes: Sizes) -> Recipe:
        training = self.case.recipe.training
        assert training is not None
        return replace(
            self.case.recipe,
            training=replace(
                training,
                micro_batch_size=int(sizes.batch[0]),
                sequence_length=int(sizes.length[0]),
                gradient_accumulation_steps=int(sizes.steps[0]),
            ),
        )


def _place(candidates: Sizes, found: Sizes) -> int:
    """Where a size stands among candidates."""
    same = (candidates.batch == found.batch[0]) & (candidates.length == found.length[0]) & (candidates.steps == found.steps[0])
    return int(same.argmax())
