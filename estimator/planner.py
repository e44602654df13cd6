"""Searches over what a card can hold: pure functions of a question that says whether a size fits."""

from collections.abc import Callable, Sequence


def divisors(number: int) -> tuple[int, ...]:
    """All divisors in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    large = [number // d for d in reversed(small) if d * d != number]
    return (*small, *large)


def largest_of(candidates: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending candidates that fits, if what does not fit at one size fits at no larger one.

    Args:
        candidates: sizes in ascending order.
        fits: whether one size fits; asked O(log n) times.

    Returns:
        The size, or None when not even the smallest fits.
    """
    low, high = 0, len(candidates)  # invariant: all below `low` fit, none from `high` on does
    while low < high:
        middle = (low + high) // 2
        if fits(candidates[middle]):
            low = middle + 1
        else:
            high = middle
    return candidates[low - 1] if low else None


def largest_down_from(limit: int, fits: Callable[[int], bool], *, step: int = 1) -> int | None:
    """The largest multiple of `step` up to `limit` that fits, where not much less than `limit` does: down in growing strides, then
    bisection.

    Returns:
        The size, or None when `step` itself does not fit.
    """
    size, stride = limit // step, 1
    failed = size + 1
    while size > 0 and not fits(size * step):
        failed, size, stride = size, size - stride, 2 * stride
    low = max(size, 0)
    return largest_of(range((low + 1) * step, failed * step, step), fits) or low * step or None


def largest_up_to(limit: int, fits: Callable[[int], bool], *, start: int = 1, step: int = 1) -> int | None:
    """The largest multiple of `step` up to `limit` that fits: doubling from `start`, then bisection.

    Returns:
        The size, or None when `step` itself does not fit.
    """
    if limit < step or not fits(step):
        return None
    low, high = step, max(start // step, 1) * step
    while high <= limit and fits(high):
        low, high = high, 2 * high
    candidates = range(low, min(high, limit + 1), step)
    return largest_of(candidates, fits)
