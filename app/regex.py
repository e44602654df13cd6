"""Regular expressions from strangers: refused when matching them could take exponential or high polynomial time.

`re` holds the interpreter's lock while it matches, so one hostile pattern would stop every request of the process.
"""

import re
from collections.abc import Iterable
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from estimator.errors import RequestError

# `.*\.layers\.\d+\..*\.(q|v)_proj` has three; each one more multiplies the worst case by the length of a module name.
MAX_UNBOUNDED_REPEATS = 3


def check_pattern(field: str, pattern: str) -> str:
    """The pattern, if it compiles and cannot run away.

    Raises:
        RequestError: if it is not a regular expression, nests repetitions, or has more than three unbounded ones.
    """
    try:
        parsed = parser.parse(pattern)
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        raise RequestError(f"{field}: {pattern[:80]!r} is not a regular expression", field=field) from None
    if _num_repeats(field, parsed, inside=False) > MAX_UNBOUNDED_REPEATS:
        raise RequestError(f"{field}: {pattern[:80]!r} has more than {MAX_UNBOUNDED_REPEATS} unbounded repetitions", field=field)
    return pattern


def check_patterns(field: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """All of them checked, as a tuple."""
    return tuple(check_pattern(field, pattern) for pattern in patterns)


def _num_repeats(field: str, parsed: Iterable[tuple[Any, Any]], *, inside: bool) -> int:
    count = 0
    for code, argument in parsed:
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT):
            _, most, body = argument
            repeated = most > 1
            if repeated and inside:
                raise RequestError(f"{field}: a repetition inside a repetition is not accepted", field=field)
            count += (most > 16) + _num_repeats(field, body, inside=inside or repeated)
        elif code is codes.BRANCH:
            if inside:
                raise RequestError(f"{field}: alternatives inside a repetition are not accepted", field=field)
            count += sum(_num_repeats(field, branch, inside=inside) for branch in argument[1])
        elif code is codes.SUBPATTERN:
            count += _num_repeats(field, argument[-1], inside=inside)
        elif code in (codes.ASSERT, codes.ASSERT_NOT):
            count += _num_repeats(field, argument[1], inside=inside)
        elif code in (codes.GROUPREF, codes.GROUPREF_EXISTS):
            raise RequestError(f"{field}: back references are not accepted", field=field)
        elif code is codes.ATOMIC_GROUP:
            count += _num_repeats(field, argument, inside=inside)
    return count
