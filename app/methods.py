"""What the numbers rest on: every formula with a source, read from the docstrings and the comments that name one."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import estimator

_ROOT = Path(estimator.__file__).parent
# The part that runs in a process of its own has no formulas.
_LEFT_OUT = ("introspect", "sources")
_SOURCE = re.compile(r"\bSource:\s*")
_SECTIONS = re.compile(r"^\s*(?:Args|Returns|Raises|Yields):|\bSource:", re.MULTILINE)
_COMMENT = re.compile(r"^\s*#\s?(.*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One formula or fact, and where it was read."""

    name: str
    says: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One module."""

    name: str
    says: str
    rules: tuple[Rule, ...]


@cache
def subjects() -> tuple[Subject, ...]:
    """Every module of the arithmetic that names a source."""
    paths = sorted(path for path in _ROOT.rglob("*.py") if path.relative_to(_ROOT).parts[0] not in _LEFT_OUT)
    found = (_subject(path) for path in paths)
    return tuple(subject for subject in found if subject.rules)


def _subject(path: Path) -> Subject:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    name = ".".join(path.relative_to(_ROOT).with_suffix("").parts).removesuffix(".__init__")
    rules = sorted([*_of_docstrings(tree), *_of_comments(text)], key=lambda found: found[0])
    return Subject(name=name, says=_summary(ast.get_docstring(tree) or ""), rules=tuple(rule for _, rule in rules))


def _of_docstrings(tree: ast.Module) -> Iterator[tuple[int, Rule]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        text = ast.get_docstring(node) or ""
        for source in _SOURCE.split(text)[1:]:
            name = "" if isinstance(node, ast.Module) else node.name.lstrip("_")
            yield getattr(node, "lineno", 0), Rule(name=name, says=_summary(text), source=_joined(source))


def _of_comments(text: str) -> Iterator[tuple[int, Rule]]:
    """Comments with a source, above the constant or the line that they explain."""
    lines = text.splitlines()
    block: list[str] = []
    for number, line in enumerate(lines, start=1):
        match = _COMMENT.match(line)
        if match is not None:
            block.append(match[1])
            continue
        comment = "\n".join(block)
        block = []
        if _SOURCE.search(comment):
            says, *sources = _SOURCE.split(comment)
            named = re.match(r"\s*(\w+)\b", line)
            for source in sources:
                yield number, Rule(name=named[1].lstrip("_") if named else "", says=" ".join(says.split()), source=" ".join(source.split()))


def _summary(docstring: str) -> str:
    """A docstring up to its sections."""
    return " ".join(_SECTIONS.split(docstring)[0].split())


def _joined(text: str) -> str:
    """A source up to the next blank line or section."""
    return " ".join(_SECTIONS.split(text.split("\n\n")[0])[0].split())
