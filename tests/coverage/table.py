"""What was found, as text."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from estimator.sources.cache import library_versions
from tests.coverage.architectures import LONGEST
from tests.coverage.cells import BATCH, METHODS, ODD_BATCH, ODD_LENGTH
from tests.coverage.records import ROOT

FILE = ROOT / "docs" / "coverage.md"

SPLICE_LIMIT = 1e-3
"""Few layers spliced and all layers may differ by no more."""

Results = Mapping[str, Any]
"""By architecture, and by architecture and recipe, as `Records` keeps them."""

_OUTCOMES = {
    "traced": "traced",
    "refused": "refused by transformers or PEFT, as on a card",
    "values": "not traced: a size or a branch depends on weights or activations",
    "failed": "not traced: the model's own code stops",
    "slow": "not traced: takes too long",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One architecture."""

    name: str
    cells: Mapping[str, Mapping[str, Any]]
    """By recipe; those not traced yet are missing."""
    expected: int
    """Number of recipes."""
    reach: Mapping[str, Any]
    splice: Mapping[str, Any]

    def number(self, outcome: str, method: str = "") -> int:
        return sum(cell["outcome"] == outcome for key, cell in self.cells.items() if key.startswith(method))

    @property
    def closed_form(self) -> float | None:
        found = [cell["closed_form"] for cell in self.cells.values() if cell.get("closed_form") is not None]
        return max(found, key=abs) if found else None

    @property
    def worst_routing(self) -> float | None:
        found = [cell["worst"] for cell in self.cells.values() if cell.get("worst") is not None]
        return max(found) if found else None


def rows(results: Results) -> Iterator[Row]:
    """The architectures whose config builds."""
    for name, about in results.items():
        if "/" in name or not about["built"]:
            continue
        own = {key.removeprefix(f"{name}/"): value for key, value in results.items() if key.startswith(f"{name}/")}
        yield Row(
            name=name,
            cells={key: value for key, value in own.items() if "/" in key},
            expected=about["cells"],
            reach=own.get("reach", {}),
            splice=own.get("splice", {}),
        )


def summary(results: Results) -> str:
    """The counts, a line each."""
    table = list(rows(results))
    unbuilt = [name for name, about in results.items() if "/" not in name and not about["built"]]
    counts = Counter({outcome: sum(row.number(outcome) for row in table) for outcome in _OUTCOMES})
    possible = counts.total() - counts["refused"]
    lines = [
        f"- {len(table) + len(unbuilt)} architectures, of which {len(table)} build at the defaults of their config class",
        f"- {counts.total()} of {sum(row.expected for row in table)} recipes run: "
        + ", ".join(f"{counts[outcome]} {text}" for outcome, text in _OUTCOMES.items() if counts[outcome]),
        f"- {_share(counts['traced'], possible)} of the recipes that no library refuses are traced",
        f"- {_share(sum(row.number('traced') > 0 for row in table), sum(bool(row.cells) for row in table))} of the architectures tried "
        "are traced under at least one recipe",
    ]
    reach = Counter(row.reach["value"] for row in table if "value" in row.reach)
    if reach:
        lines.append("- one program holds for lengths: " + ", ".join(f"{text} ({n} architectures)" for text, n in reach.most_common()))
    spliced = {row.name: row.splice["value"] for row in table if row.splice.get("value") is not None}
    if spliced:
        worst = max(spliced, key=lambda name: abs(spliced[name]))
        beyond = [name for name, value in spliced.items() if abs(value) > SPLICE_LIMIT]
        without = [row.name for row in table if row.splice and "value" not in row.splice]
        lines.append(
            f"- few layers spliced against all layers, {len(spliced)} architectures: worst {spliced[worst]:+.3%} ({worst}); "
            f"beyond {SPLICE_LIMIT:.1%}: {', '.join(beyond) or 'none'}; tried and without a result: {', '.join(without) or 'none'}"
        )
    closed = {row.name: row.closed_form for row in table if row.closed_form is not None}
    if closed:
        ordered = sorted(closed.items(), key=lambda pair: abs(pair[1]))
        middle, worst_closed = ordered[len(ordered) // 2], ordered[-1]
        lines.append(
            f"- closed form against trace, {len(closed)} architectures, each at its worst recipe and phase: median {middle[1]:+.3%}, "
            f"worst {worst_closed[1]:+.3%} ({worst_closed[0]})"
        )
    return "\n".join(lines)


def markdown(results: Results, *, of_other_code: Mapping[str, int] = MappingProxyType({})) -> str:
    """The document.

    Args:
        of_other_code: how many results another version of the code gave, by date.
    """
    table = list(rows(results))
    versions = ", ".join(" ".join(pair) for pair in library_versions(("torch", "transformers", "peft", "bitsandbytes", "accelerate")))
    parts = [
        "# Coverage of the trace",
        "Written by `make coverage`. Every causal language model of the installed transformers at the defaults of its config class (with "
        "what `tests/coverage/architectures.py` completes), under full training, LoRA and QLoRA (nf4) on all linear layers, bfloat16 with "
        "autocast, eager attention and sdpa as far as the class has them, checkpointing on and off.",
        f"Versions: {versions}.",
        summary(results),
        "\n".join(_limits(table, of_other_code)),
        "Recipes: traced of tried. Lengths: what one program holds for. Splice: few layers against all, batch "
        f"{ODD_BATCH}, length {ODD_LENGTH}, the phase that differs most. Closed form: against the trace, batch {BATCH}, length {LONGEST}, "
        "the recipe and phase that differ most. A model with fewer positions is traced at a length that fits. Routing: how much the peak "
        "grows when all tokens choose the same experts instead of all experts alike; empty where sizes do not depend on the choice.",
        "\n".join(_table(table)),
        "## What is not traced, and why",
        "\n".join(_reasons(table)),
        "## What does not build",
        "\n".join(
            f"- {name}: {' '.join(about['reason'].split())[:200]}" for name, about in results.items() if not about.get("built", True)
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _limits(table: Sequence[Row], of_other_code: Mapping[str, int]) -> Iterator[str]:
    yield "What this shows and what it does not:"
    yield ""
    yield (
        f"- *Traced* means that the real step ran to its end on fake tensors at one size (batch {BATCH}) with a few layers of each "
        "kind; the figure itself is held to real runs in tests/estimator/test_trace.py, for the architectures named there, and not here."
    )
    yield "- *Closed form* compares two engines of ours; an error that both make does not show."
    if of_other_code:
        dates = ", ".join(f"{number} of {date or 'a day that was not noted'}" for date, number in sorted(of_other_code.items()))
        yield f"- {sum(of_other_code.values())} results are of an earlier version of the code or of a library: {dates}."
        if undated := of_other_code.get(""):
            yield (
                f"- Of the {undated} without a day the outcome alone is kept: what routing does there, and how closed forms compare, is "
                "not known, and an empty cell says nothing."
            )
    for name, found in (("lengths", sum(bool(row.reach) for row in table)), ("splice", sum(bool(row.splice) for row in table))):
        if found < len(table):
            yield f"- *{name.capitalize()}* was tried for {found} of {len(table)} architectures; an empty cell is one that was not."


def _table(table: Sequence[Row]) -> Iterator[str]:
    yield "| architecture | full | LoRA | QLoRA | lengths | splice | closed form | routing |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in table:
        tried = (f"{row.number('traced', method)} of {sum(key.startswith(method) for key in row.cells)}" for method in METHODS)
        splice = (
            "all layers run" if row.splice.get("value", 0) is None else _percent(row.splice.get("value")) or row.splice.get("outcome", "")
        )
        yield " | ".join(
            (
                f"| {row.name}",
                *tried,
                row.reach.get("value", row.reach.get("outcome", "")),
                splice,
                _percent(row.closed_form),
                f"{_percent(row.worst_routing)} |",
            )
        )


def _reasons(table: Sequence[Row]) -> Iterator[str]:
    grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in table:
        for key, cell in row.cells.items():
            if cell["outcome"] != "traced":
                grouped[row.name, f"{cell['outcome']}: {' '.join(cell['reason'].split())[:200]}"].append(key)
    for (name, reason), keys in grouped.items():
        yield f"- {name} ({', '.join(keys)}): {reason}"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "none"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.3%}"
