"""A campaign's cases one after another: cheap ones first, answered ones skipped, within a budget of time."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from calibration.case import Case
from calibration.record import Kind, Outcome, Record, RecordFile

_DONE = (Outcome.OK, Outcome.OOM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a campaign is, after one more case."""

    record: Record
    num_done: int
    num_total: int
    remaining_seconds: float
    """From the time that cases have taken so far, and their cost."""


def answered(records: Iterable[Record], kind: Kind, key: tuple[str | None, ...] | None) -> frozenset[str]:
    """Hashes of the cases that need not be run again: those that ended, or ran out of memory, on this card with these libraries.

    Failures and timeouts are no answer.

    Args:
        records: all there are.
        kind: of the answer that is wanted.
        key: of the environment (`Environment.key`); None where any card will do.
    """
    return frozenset(
        record.case_hash
        for record in records
        if record.kind is kind
        and record.outcome in _DONE
        and (key is None or (record.environment is not None and record.environment.key == key))
    )


def pending(cases: Sequence[Case], done: frozenset[str], cost: Callable[[Case], float]) -> tuple[Case, ...]:
    """The cases still to run, cheap ones first: whatever ends the campaign early costs the fewest answers."""
    return tuple(sorted((case for case in cases if case.hash not in done), key=lambda case: (cost(case), case.hash)))


def run(
    cases: Sequence[Case],
    *,
    measure: Callable[[Case], Record],
    records: RecordFile,
    cost: Callable[[Case], float],
    budget_seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Runs cases in the order given and appends each record before it is told of.

    No case is begun that would not end within the budget at the pace of those before it.

    Args:
        cases: to run.
        measure: runs one case; whatever becomes of it is in its record.
        records: where they go.
        cost: of a case, in any unit.
        budget_seconds: for all of them.
        clock: seconds that only grow.
    """
    started = clock()
    pace = Pace()
    costs = [cost(case) for case in cases]
    for number, case in enumerate(cases):
        begun = clock()
        if begun - started + pace.seconds(costs[number : number + 1]) > budget_seconds:
            return
        record = measure(case)
        records.append(record)
        pace.note(costs[number], clock() - begun)
        yield Progress(record=record, num_done=number + 1, num_total=len(cases), remaining_seconds=pace.seconds(costs[number + 1 :]))


class Pace:
    """What cases take: something each, since a process starts and imports, and something in proportion to their cost."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, float]] = []

    def note(self, cost: float, seconds: float) -> None:
        """One case that ended."""
        self._seen.append((cost, seconds))

    def seconds(self, costs: Sequence[float]) -> float:
        """Of cases to come, by least squares over those that were; 0 before there are any [s]."""
        if not self._seen or not costs:
            return 0.0
        mean_cost = sum(cost for cost, _ in self._seen) / len(self._seen)
        mean_seconds = sum(seconds for _, seconds in self._seen) / len(self._seen)
        spread = sum((cost - mean_cost) ** 2 for cost, _ in self._seen)
        together = sum((cost - mean_cost) * (seconds - mean_seconds) for cost, seconds in self._seen)
        # dearer cases are not quicker, and none is quicker than nothing
        slope = max(0.0, together / spread) if spread else 0.0
        if slope * mean_cost > mean_seconds:
            slope = mean_seconds / mean_cost
        return sum(mean_seconds + slope * (cost - mean_cost) for cost in costs)


def merged(files: Iterable[Iterable[Record]]) -> tuple[Record, ...]:
    """Records of several files, each once, in the order in which they were begun: merging twice changes nothing."""
    found = {record.model_dump_json(): record for records in files for record in records}
    return tuple(record for _, record in sorted(found.items(), key=lambda item: (item[1].provenance.started_at, item[0])))
