"""Closed forms beside the trace, cell by cell, and the table of them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

SMALL_VOCABULARY = 4096
SIZES = ((1, 512), (2, 1024), (3, 777))
LIMIT = 0.02
"""Beyond it a closed form is wrong and named."""

Key: TypeAlias = tuple[str, str, bool]
"""Model, method, checkpointing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Closed forms less trace, as a share of the trace, the worst of the phases."""

    batch: int
    length: int
    total: float
    """Of the phase's allocated bytes."""
    above_steady: float
    """Of what a phase adds to the steady state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One recipe of one model, at all sizes; or why one engine has no answer."""

    model: str
    model_type: str
    method: str
    checkpointing: bool
    date: str
    """Of the comparison, as in ISO 8601."""
    differences: tuple[Difference, ...]
    reason: str = ""

    @property
    def key(self) -> Key:
        return self.model, self.method, self.checkpointing

    @property
    def recipe(self) -> str:
        return f"{self.method}, {'checkpointing' if self.checkpointing else 'no checkpointing'}"

    @property
    def worst(self) -> Difference:
        """At the size where most of what lies above the steady state differs."""
        return max(self.differences, key=lambda one: abs(one.above_steady))

    def __str__(self) -> str:
        if self.reason:
            return f"{self.model:<42}{self.recipe:<34}  {self.reason[:120]}"
        return f"{self.model:<42}{self.recipe:<34}{self.worst.total:>+9.3%}{self.worst.above_steady:>+14.3%}"


def markdown(cells: Sequence[Cell], *, num_wanted: int, versions: Mapping[str, str], command: str) -> str:
    """The document: what was compared, by architecture, and where one engine has no answer.

    Args:
        num_wanted: cells asked for.
        versions: of the libraries traced.
        command: that prints it.
    """
    compared = [cell for cell in cells if cell.differences]
    sizes = ", ".join(f"{batch} × {length}" for batch, length in SIZES)
    parts = [
        "# Closed forms beside the trace",
        f"Written by `{command}`, {_days(cells)}, with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        f"Bundled models, each with a vocabulary of {SMALL_VOCABULARY:,}, so that logits hide nothing; bfloat16 with autocast, the "
        "attention that transformers chooses by itself, LoRA of rank 16 on all linear layers. A cell is one method of one model, with or "
        f"without checkpointing, at {len(SIZES)} sizes (batch × length): {sizes}. A difference is closed form less trace, of the phase of "
        "`forward`, `loss` and `backward` that differs most, as a share of what the trace says that the phase adds to the steady state; "
        "*of all allocated* is the same as a share of the whole phase. Both engines are ours: an error that both make does not show.",
        "\n".join(_counts(cells, compared, num_wanted)),
        "\n".join(_rows(compared)),
        "## Where one engine has no answer",
        "Where there are no closed forms the trace answers alone, as far as [its coverage](coverage.md) goes.",
        "\n".join(_reasons(cells)) or "Nowhere.",
    ]
    return "\n\n".join(parts)


def _counts(cells: Sequence[Cell], compared: Sequence[Cell], num_wanted: int) -> Iterator[str]:
    answered = {cell.model for cell in compared}
    yield (
        f"- cells run: {len(cells)} of {num_wanted}; compared {len(compared)}, of {len(answered)} models and "
        f"{len({cell.model_type for cell in compared})} architectures; without an answer of one engine {len(cells) - len(compared)}"
    )
    if compared:
        for text, found in (("above the steady state", _above(compared)), ("of all allocated", _total(compared))):
            yield f"- {text}: median {median(found):.4%}, worst {max(found):.3%}"
        beyond = [cell for cell in compared if max(_above([cell])) > LIMIT]
        yield f"- cells beyond {LIMIT:.0%} above the steady state: {len(beyond) or 'none'}"
        yield from (f"  - {cell.model}, {cell.recipe}: {cell.worst.above_steady:+.2%}" for cell in beyond)


def _rows(compared: Iterable[Cell]) -> Iterator[str]:
    yield "| architecture | models | cells | median | worst | of all allocated | worst cell |"
    yield "|---|---|---|---|---|---|---|"
    grouped: dict[str, list[Cell]] = defaultdict(list)
    for cell in compared:
        grouped[cell.model_type].append(cell)
    for name, cells in sorted(grouped.items()):
        worst = max(cells, key=lambda cell: abs(cell.worst.above_steady))
        yield (
            f"| {name} | {len({cell.model for cell in cells})} | {len(cells)} | {median(_above(cells)):.4%} "
            f"| {worst.worst.above_steady:+.3%} | {max(_total(cells)):.3%} | {worst.model}, {worst.recipe} |"
        )


def _reasons(cells: Iterable[Cell]) -> Iterator[str]:
    grouped: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.reason:
            grouped[cell.model_type, " ".join(cell.reason.split())[:200]].append(cell)
    for (name, reason), alike in sorted(grouped.items()):
        yield f"- {name}, {len(alike)} cells of {', '.join(dict.fromkeys(cell.model for cell in alike))}: {reason}"


def _above(cells: Iterable[Cell]) -> list[float]:
    return [abs(one.above_steady) for cell in cells for one in cell.differences]


def _total(cells: Iterable[Cell]) -> list[float]:
    return [abs(one.total) for cell in cells for one in cell.differences]


def _days(cells: Iterable[Cell]) -> str:
    days = sorted({cell.date for cell in cells})
    return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "no day"
