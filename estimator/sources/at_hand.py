"""Answers from what is at hand: within `only_at_hand` nothing is built or traced anew."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class NotAtHandError(Exception):
    """Something would have to be built or traced. No `VramplanError`: no user sees it, and nothing that does without it catches it."""


_ONLY_AT_HAND: ContextVar[bool] = ContextVar("whether nothing is built or traced anew", default=False)


@contextmanager
def only_at_hand() -> Iterator[None]:
    """Within it models and traces are those that were made before, and `NotAtHandError` is raised for all else."""
    token = _ONLY_AT_HAND.set(True)
    try:
        yield
    finally:
        _ONLY_AT_HAND.reset(token)


def is_only_at_hand() -> bool:
    """Whether this runs within `only_at_hand`."""
    return _ONLY_AT_HAND.get()
