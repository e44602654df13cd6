"""What is missing when a run does not fit, and the smallest sets of changes that make it fit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

from estimator.allocator import reserved_bytes
from estimator.engine import head_of
from estimator.estimate import Estimate
from estimator.phases import Phase
from estimator.recipe import Recipe
from estimator.units import ceil_div

# Larger combinations are not offered: each is held against all its proper subsets, and few people change more than this at once.
MAX_CHANGES = 6

Chosen = frozenset[int]


def missing_by_phase(recipe: Recipe, estimate: Estimate, *, peak_required_bytes: int, usable_bytes: int) -> Mapping[Phase, int]:
    """What each phase alone would lack, were it the run's peak; phases that fit are left out [bytes].

    Args:
        peak_required_bytes: what must be usable for the peak, its margin included [bytes].
        usable_bytes: capacity less headroom [bytes].
    """
    assert recipe.training is not None
    assert estimate.steady_state_bytes is not None
    peak = reserved_bytes(peak_bytes=estimate.peak.allocated_bytes, steady_bytes=estimate.steady_state_bytes, head=head_of(recipe.training))
    beside = estimate.quick_device_bytes - peak
    found: dict[Phase, int] = {}
    for phase in estimate.phases:
        reserved = reserved_bytes(peak_bytes=phase.allocated_bytes, steady_bytes=estimate.steady_state_bytes, head=head_of(recipe.training))
        missing = ceil_div((reserved + beside) * peak_required_bytes, estimate.quick_device_bytes) - usable_bytes
        if missing > 0:
            found[phase.phase] = missing
    return found


def minimal_sets(missing: Callable[[Chosen], int | None], *, order: Sequence[int], limit: int = 4, budget: int = 200) -> list[Chosen]:
    """Sets of two or more changes that together make a run fit, of which no proper subset does.

    Not all there are: first the one that comes of taking changes in the order given, then those without one of its members, and so on.

    Args:
        missing: bytes that a set of changes still lacks, at most 0 if it fits; None if its changes cannot be made together.
        order: of preference.
        limit: sets to return.
        budget: questions to `missing` after which no further set is looked for.

    Returns:
        The sets, the smallest first, then by preference.
    """
    asked: dict[Chosen, int | None] = {}

    def lacks(chosen: Chosen) -> int | None:
        if chosen not in asked:
            asked[chosen] = missing(chosen)
        return asked[chosen]

    def fits(chosen: Chosen) -> bool:
        found = lacks(chosen)
        return found is not None and found <= 0

    rank = {change: place for place, change in enumerate(order)}
    found: set[Chosen] = set()
    without: list[Chosen] = [frozenset()]
    seen: set[Chosen] = set()
    while without and len(found) < limit and len(asked) < budget:
        banned = without.pop(0)
        if banned in seen:
            continue
        seen.add(banned)
        left = [change for change in order if change not in banned]
        for by in (left, _most_first(left, lacks)):
            enough = _enough(by, lacks)
            smallest = _smallest(enough, fits, rank) if enough is not None else None
            if smallest is not None and len(smallest) > 1:
                found.add(smallest)
                without += [banned | {change} for change in sorted(smallest, key=lambda change: -rank[change])]
    return sorted(found, key=lambda chosen: (len(chosen), sorted(rank[change] for change in chosen)))[:limit]


def _most_first(changes: Sequence[int], lacks: Callable[[Chosen], int | None]) -> list[int]:
    def alone(change: int) -> int:
        found = lacks(frozenset((change,)))
        return 1 << 62 if found is None else found

    return sorted(changes, key=alone)


def _enough(changes: Sequence[int], lacks: Callable[[Chosen], int | None]) -> Chosen | None:
    """Changes taken one after the other, as far as each helps, until they fit."""
    chosen: Chosen = frozenset()
    least = lacks(chosen)
    assert least is not None
    for change in changes:
        found = lacks(chosen | {change})
        if found is not None and found < least:
            chosen, least = chosen | {change}, found
            if least <= 0:
                return chosen
    return None


def _smallest(chosen: Chosen, fits: Callable[[Chosen], bool], rank: Mapping[int, int]) -> Chosen | None:
    """A subset that fits and has no proper subset that does; None when there are too many changes to be sure of it."""
    for change in sorted(chosen, key=lambda change: -rank[change]):
        if fits(chosen - {change}):
            chosen = chosen - {change}
    if len(chosen) > MAX_CHANGES:
        return None
    return next((subset for subset in _subsets(chosen) if fits(subset)), chosen)


def _subsets(chosen: Chosen) -> Iterator[Chosen]:
    """All proper subsets, the smallest first."""
    for size in range(len(chosen)):
        for members in combinations(sorted(chosen), size):
            yield frozenset(members)
