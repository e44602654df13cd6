"""What is known so far, kept line by line so that a stopped run goes on where it was, and with the table so that the next one does too."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from estimator.sources.cache import library_versions

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).parent / "records.jsonl"

_LIBRARIES = ("accelerate", "bitsandbytes", "peft", "torch", "transformers")
_ASKED_BY = tuple(Path(__file__).parent / name for name in ("architectures.py", "cells.py", "stops.py"))
_TRACED_BY = (*sorted((ROOT / "estimator").rglob("*.py")), *_ASKED_BY)


@cache
def stamp() -> str:
    """Of the libraries and of our own code: records of another stamp are no answer."""
    digest = hashlib.sha256(repr(library_versions(_LIBRARIES)).encode())
    for path in _TRACED_BY:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Records:
    """Results by what was asked.

    Args:
        file: where they are kept.
        any_stamp: whether results of other code count too.
    """

    def __init__(self, file: Path = FILE, *, any_stamp: bool = False) -> None:
        self.file = file
        kept = [line for line in _lines(file) if any_stamp or line[1] == stamp()]
        self.results: dict[str, Any] = {key: value for key, _, value in kept}
        self._stamps = {key: mark for key, mark, _ in kept}

    @property
    def of_other_code(self) -> Mapping[str, int]:
        """How many results another version of our own code or of a library gave, by date; "" where it was not noted."""
        return Counter(str(self.results[key].get("date", "")) for key, mark in self._stamps.items() if mark != stamp())

    def is_of_other_code(self, key: str) -> bool:
        """Whether the result of a key is there, and another version gave it."""
        return self._stamps.get(key, stamp()) != stamp()

    def add(self, key: str, value: Mapping[str, Any]) -> None:
        value = {**value, "date": date.today().isoformat()}
        self.results[key], self._stamps[key] = value, stamp()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as lines:
            lines.write(json.dumps([key, stamp(), value]) + "\n")

    def tidy(self) -> None:
        """Leaves the last line of each key, in order."""
        last = {key: [key, mark, value] for key, mark, value in _lines(self.file)}
        self.file.write_text("".join(json.dumps(last[key]) + "\n" for key in sorted(last)))


def _lines(file: Path) -> Iterator[tuple[str, str, Any]]:
    if file.exists():
        for line in file.read_text().splitlines():
            key, mark, value = json.loads(line)
            yield key, mark, value
