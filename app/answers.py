"""Answers given before: the same question about a bundled model has the same answer while the same corrections are in use."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import orjson

MAX_ANSWERS = 512
"""Of some 20 kB each."""


class Answers:
    """The newest few hundred answers, as bytes. Used from the event loop alone.

    Never asked about models of the Hub, whose commits move and who may be private: those are read anew.
    """

    def __init__(self, *, max_answers: int = MAX_ANSWERS) -> None:
        self._max_answers = max_answers
        self._known: OrderedDict[bytes, bytes] = OrderedDict()

    @staticmethod
    def key(question: Mapping[str, Any]) -> bytes:
        """What identifies a question and what it is answered by, whatever the order of fields."""
        return hashlib.sha256(orjson.dumps(question, option=orjson.OPT_SORT_KEYS)).digest()

    def find(self, key: bytes) -> bytes | None:
        """The answer given before."""
        if (found := self._known.get(key)) is not None:
            self._known.move_to_end(key)
        return found

    def keep(self, key: bytes, answer: bytes) -> None:
        """Keeps an answer; the one not asked for longest goes."""
        self._known[key] = answer
        while len(self._known) > self._max_answers:
            self._known.popitem(last=False)
