"""Traces of a training step, asked of the guarded process, shared between callers and kept by content and versions."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from estimator.inventory import Inventory
from estimator.recipe import Recipe
from estimator.scoring import rows_of
from estimator.sources.cache import default_directory, library_versions, read_json, write_json
from estimator.sources.process import Inspector, default_inspector
from estimator.step import Program
from estimator.timeline import Timeline, decode_timeline

FORMAT = 2
"""Raised whenever the meaning of kept traces changes."""

_WALL_SECONDS = 60.0
# A batch of one needs fewer copies than others.
_EXACT_BATCH = 2
_LONGEST = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to be traced."""

    config: Mapping[str, Any]
    """The content of its config.json."""
    inventory: Inventory
    is_public: bool = True
    """Whether what is learnt of it may be kept on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What the worker said of a recipe."""

    program: Program | None
    """None where lengths differ in more than size."""
    multiple_of: int | None
    """What lengths must be multiples of; None: only the length that was asked for."""
    any_batch: bool


class Tracer:
    """Hands out traces; safe to call from many threads. Callers who ask for the same one wait for one run.

    Args:
        inspector: the processes that trace.
        directory: where programs are kept; None keeps them in memory only.
        max_entries: programs held in memory (about 50 KiB each).
    """

    def __init__(self, *, inspector: Inspector | None = None, directory: Path | None = None, max_entries: int = 256) -> None:
        self._inspector = inspector
        self._directory = directory
        self._max_entries = max_entries
        self._programs: OrderedDict[str, _Kept] = OrderedDict()
        self._running: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()

    def program(self, subject: Subject, recipe: Recipe) -> Program:
        """The step of a recipe, for all batches and lengths of its regime; where lengths differ in more than size (scans over chunks), for
        the recipe's length or size.

        Args:
            recipe: its batch and length only choose the regime, where they can.

        Raises:
            TraceError: if the step cannot be traced.
            InspectionError, InspectionLimitError, SourceUnavailableError: see `Inspector.run`.
        """
        training = recipe.training
        assert training is not None
        length = training.sequence_length
        lengths = regime(subject.inventory, length, shortest=training.objective.prompt_length + 2)
        rows = rows_of(training, subject.inventory.config)
        beside = {"lengths": list(lengths), "rows": asdict(rows)}
        found = self._kept(subject, _payload(subject, _with_sizes(recipe, 1, 1)) | beside)
        if found.program is None or (found.multiple_of is not None and length % found.multiple_of):
            found = self._kept(subject, _payload(subject, _with_sizes(recipe, _EXACT_BATCH, length)) | beside | {"exact": True})
        if found.program is None or not found.any_batch:
            size = _with_sizes(recipe, training.micro_batch_size, length)
            found = self._kept(subject, _payload(subject, size) | beside | {"exact": True})
        assert found.program is not None
        return found.program

    def _kept(self, subject: Subject, payload: Mapping[str, Any]) -> "_Kept":
        key = _key(payload)
        with self._lock:
            if (kept := self._programs.get(key)) is not None:
                self._programs.move_to_end(key)
                return kept
        found = self._once(key, lambda: self._find_program(key, payload, subject.is_public))
        assert isinstance(found, _Kept)
        return found

    def timeline(self, subject: Subject, recipe: Recipe, *, all_layers: bool = False) -> Timeline:
        """Every allocation and release of the recipe's step; of its micro-batches two, since a third repeats the second.

        Args:
            all_layers: whether every layer runs; else a few of each kind stand for all.

        Raises:
            as `program`.
        """
        training = recipe.training
        assert training is not None
        shown = replace(training, gradient_accumulation_steps=min(2, training.gradient_accumulation_steps))
        payload = _payload(subject, replace(recipe, training=shown)) | {"all_layers": all_layers}
        found = self._once(_key(payload), lambda: decode_timeline(self._ask("timeline", payload)["timeline"]))
        assert isinstance(found, Timeline)
        return found

    def _find_program(self, key: str, payload: Mapping[str, Any], is_public: bool) -> "_Kept":
        from estimator.traced_step import decode_program  # numpy takes 0.1 s, and most answers need no trace

        file = self._directory / f"{key}.json" if self._directory is not None else None
        data = read_json(file) if file is not None else None
        if data is None:
            data = self._ask("trace", payload)
            if file is not None and is_public:
                write_json(file, data)
        program = decode_program(data["program"]) if "program" in data else None
        found = _Kept(program=program, multiple_of=data.get("multiple_of"), any_batch=data.get("any_batch", True))
        with self._lock:
            self._programs[key] = found
            while len(self._programs) > self._max_entries:
                self._programs.popitem(last=False)
        return found

    def _ask(self, task: str, payload: Mapping[str, Any]) -> Any:
        inspector = self._inspector if self._inspector is not None else default_inspector()
        return inspector.run(task, payload, wall_seconds=_WALL_SECONDS)

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        """The result of one call of `make` for all who ask while it runs."""
        with self._lock:
            running = self._running.get(key)
            if running is None:
                own = self._running[key] = Future()
        if running is not None:
            return running.result()
        try:
            own.set_result(make())
        except BaseException as error:
            own.set_exception(error)
        finally:
            with self._lock:
                del self._running[key]
        return own.result()


def regime(inventory: Inventory, length: int, *, shortest: int = 1) -> tuple[int, int]:
    """Shortest and longest sequence that run the same program as `length`: windows and chunks of attention part them [tokens].

    Args:
        shortest: what the recipe needs at least [tokens].
    """
    borders = sorted(
        value for name in ("sliding_window", "attention_chunk_size") if isinstance(value := inventory.config.get(name), int) and value > 0
    )
    longest = _LONGEST
    for border in borders:
        if length >= border:
            shortest = max(shortest, border)
        else:
            longest = min(longest, border - 1)
    return shortest, longest


def _with_sizes(recipe: Recipe, batch: int, length: int) -> Recipe:
    training = recipe.training
    assert training is not None
    accumulation = min(2, training.gradient_accumulation_steps)
    sizes = replace(training, micro_batch_size=batch, sequence_length=length, gradient_accumulation_steps=accumulation)
    return replace(recipe, training=sizes)


def _payload(subject: Subject, recipe: Recipe) -> dict[str, Any]:
    return {"config": dict(subject.config), "recipe": asdict(recipe), "layers_prefix": subject.inventory.layers_prefix}


def _key(payload: Mapping[str, Any]) -> str:
    content = {"payload": payload, "versions": _versions(), "format": FORMAT}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    """Of everything that a step runs through."""
    return library_versions(("accelerate", "bitsandbytes", "peft", "torch", "transformers", "trl"))


@cache
def default_tracer() -> Tracer:
    """The tracer of this program."""
    return Tracer(directory=default_directory() / "traces")
