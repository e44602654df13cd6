"""How close plans come to the largest micro-batch that runs, by policy and by what the global batch leaves to choose from.

    python -m tests.benchmarks.tightness [CARD …]

The cases of the campaign `caps` on cards of five sizes. What runs is what the replay of the allocator says does: it tries the planner's
margins and its grain against its own model, and measures nothing. Takes about ten minutes on one core.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from app.answer import device_bytes
from app.card import HEADROOM_BYTES
from app.evaluation import evaluator_of
from app.plan import goal_of
from app.prediction import payload_of
from app.reading import read_plan
from app.search import Search
from app.service import prepare
from calibration import campaign
from calibration.case import Case
from estimator.gpus import Gpu, find_gpu
from estimator.grid import Sizes
from estimator.planner import Policy, divisors

CARDS = ("rtx4060ti-8", "rtx3060-12", "t4", "rtx4090", "a100-40")
AT_HAND = find_gpu("a100-80")
GLOBAL_BATCHES = (None, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One case on one card, with its global batch; None where that is free."""

    global_batch: int | None
    planned: dict[Policy, int]
    largest: int
    """That runs, of those that a plan may choose from."""


def cells(case: Case, card: Gpu) -> Iterator[Cell]:
    """What plans say, and what runs."""
    training = {name: value for name, value in case.training.items() if name != "per_device_train_batch_size"}
    hardware = {"gpu": AT_HAND.id, "headroom": AT_HAND.capacity_bytes - card.capacity_bytes + HEADROOM_BYTES}
    question = read_plan({**payload_of(case), "training": training, "hardware": hardware})
    prepared: Any = prepare(question)
    free = Search(case=prepared, goal=goal_of(question.request, prepared))
    evaluator = evaluator_of(prepared, prepared.recipe)
    runs = _Runs(search=free, limit_bytes=card.capacity_bytes)
    for total in GLOBAL_BATCHES:
        search = replace(free, goal=replace(free.goal, global_batch_size=total))
        planned = {policy: replace(search, policy=policy).found(evaluator) for policy in Policy}
        found = {policy: 0 if sizes is None else int(sizes.batch[0]) for policy, sizes in planned.items()}
        if total is None:
            largest = runs.largest(max(1, *found.values()))
        else:
            largest = max((size for size in divisors(total) if runs.one(size, total // size)), default=0)
        yield Cell(global_batch=total, planned=found, largest=largest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Runs:
    search: Search
    limit_bytes: int

    def one(self, batch: int, steps: int) -> bool:
        """Whether a run ends within the limit; managed memory of paged optimizers is left out, as under a cap."""
        answerer = self.search.case.answerer
        held = replace(answerer, device=replace(answerer.device, usable_bytes=self.limit_bytes))
        length = self.search.goal.sequence_length
        estimate = held.estimate(self.search.recipe(Sizes.of(batch, length, steps)))
        return device_bytes(estimate) - estimate.paged_bytes <= self.limit_bytes

    def largest(self, known: int) -> int:
        """Without accumulation: up in strides, then down one by one."""
        size = known
        while self.one(size, 1):
            size += 1 + size // 6
        while size and not self.one(size, 1):
            size -= 1
        return size


def main(names: Sequence[str]) -> None:
    found = [cell for case in campaign.read("caps").cases() for name in names for cell in cells(case, find_gpu(name))]
    print(f"{'global batch':<14}{'policy':<18}{'plans':>6}{'the largest that runs':>23}{'median':>8}{'least':>7}")
    for total in GLOBAL_BATCHES:
        for policy in Policy:
            own = [cell for cell in found if cell.global_batch == total and cell.planned[policy] and cell.largest]
            shares = [cell.planned[policy] / cell.largest for cell in own]
            whole = sum(cell.planned[policy] == cell.largest for cell in own)
            middle, least = (f"{median(shares):.0%}", f"{min(shares):.0%}") if shares else ("–", "–")
            print(f"{total or 'free':<14}{policy:<18}{len(own):>6}{whole:>23}{middle:>8}{least:>7}")


if __name__ == "__main__":
    main(sys.argv[1:] or CARDS)
