"""The table as text."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tests.coverage.records import ROOT

FILE = ROOT / "docs" / "coverage.md"

Results = Mapping[str, Any]


def summary(results: Results) -> str:
    return str(Counter(v.get("outcome") for v in results.values()))


def markdown(results: Results) -> str:
    return summary(results)
