"""Traces of a training step, asked of the guarded process, shared between callers and kept by content and versions."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimator.errors import TraceError
from estimator.inventory import Inventory
from estimator.recipe import Recipe
from estimator.scoring import rows_of
from estimator.sources.access import PUBLIC, current
from estimator.sources.at_hand import NotAtHandError, is_only_at_hand
from estimator.sources.cache import default_directory, library_versions, read_json, write_json
from estimator.step import Program

# Most answers need no trace: what runs and reads them is imported where it does.
if TYPE_CHECKING:
    from estimator.sources.process import Inspector
    from estimator.timeline import Timeline

FORMAT = 11
"""Raised whenever the meaning of kept traces changes."""

_WALL_SECONDS = 60.0
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
class TracedStep:
    """A step as a trace saw it."""

    program: Program
    is_outline: bool
    """Whether a loop over tokens was followed on short runs only, see `traced_step.outline`."""
    routing_matters: bool
    """Whether sizes depend on the experts that routers choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedTimeline:
    """A step's run at one size."""

    timeline: "Timeline"
    routing_matters: bool
    """As of `TracedStep`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """An answer of the guarded process."""

    step: TracedStep | None
    reason: str = ""
    """Why there is no step for these sizes."""
    multiple_of: int | None = None
    any_batch: bool = True


_Find = Callable[[Mapping[str, Any], bool], _Found]


class Tracer:
    """Hands out traces; safe to call from many threads. Callers who ask for the same one wait for one run.

    Args:
        inspector: the processes that trace.
        directory: where programs are kept; None keeps them in memory only.
        max_entries: programs held in memory (50 to 300 KiB each).
        wall_seconds: what one trace may take [s].
    """

    def __init__(
        self,
        *,
        inspector: "Inspector | None" = None,
        directory: Path | None = None,
        max_entries: int = 256,
        wall_seconds: float = _WALL_SECONDS,
    ) -> None:
        from estimator.sources.flight import SingleFlight

        self._inspector = inspector
        self._directory = directory
        self._max_entries = max_entries
        self._wall_seconds = wall_seconds
        self._found: OrderedDict[str, _Found] = OrderedDict()
        self._flights = SingleFlight()
        self._lock = threading.Lock()

    def step(self, subject: Subject, recipe: Recipe, *, routing: str = "balanced") -> TracedStep:
        """The step of a recipe, for its batch and length at least; mostly one trace serves all of its regime, and another a batch of one.

        Args:
            routing: `balanced`, or `worst` for routers that send all tokens to the same experts.

        Raises:
            TraceError: if the step cannot be traced.
            InspectionError, InspectionLimitError, SourceUnavailableError: see `Inspector.run`.
            NotAtHandError: see `at_hand.only_at_hand`.
        """
        return self._step(subject, recipe, routing, self._find)

    def has_step(self, subject: Subject, recipe: Recipe) -> bool:
        """Whether `step` would answer, or refuse, without running anything."""
        try:
            self._step(subject, recipe, "balanced", self._at_hand)
        except NotAtHandError:
            return False
        except TraceError:
            pass
        return True

    def _step(self, subject: Subject, recipe: Recipe, routing: str, find: _Find) -> TracedStep:
        training = recipe.training
        assert training is not None
        own, length = training.shape
        shared = {"rows": asdict(rows_of(training, subject.inventory.config)), "routing": routing}
        lengths = regime(subject.inventory, length, shortest=training.objective.prompt_length + 2)
        for_lengths = _payload(subject, _sized(recipe, 1, 1)) | shared | {"lengths": list(lengths), "one_sequence": own == 1}
        found = find(for_lengths, subject.is_public)
        if found.step is not None and length % (found.multiple_of or 1) == 0:
            return found.step
        for batch in (_EXACT_BATCH, own) if own > 1 else (own,):  # in most cases one length alone serves every other batch
            found = find(_payload(subject, _sized(recipe, batch, length)) | shared | {"exact": True}, subject.is_public)
            if found.step is not None and (found.any_batch or batch == own):
                return found.step
        raise TraceError(f"the step cannot be traced: {found.reason}", field="engine")

    def timeline(self, subject: Subject, recipe: Recipe, *, all_layers: bool = False, routing: str = "balanced") -> TracedTimeline:
        """Every allocation and release of the recipe's step; of its micro-batches two, since a third repeats the second.

        Args:
            all_layers: whether every layer runs; else a few of each kind stand for all.
            routing: see `step`.

        Raises:
            as `program`.
        """
        training = recipe.training
        assert training is not None
        shown = replace(training, gradient_accumulation_steps=min(2, training.gradient_accumulation_steps))
        payload = _payload(subject, replace(recipe, training=shown)) | {"all_layers": all_layers, "routing": routing}
        if is_only_at_hand():  # before the flight, which others may share who wait for what takes seconds
            raise NotAtHandError
        found = self._flights.once(_key(payload, _scope(subject.is_public)), lambda: self._run(payload))
        assert isinstance(found, TracedTimeline)
        return found

    def _run(self, payload: Mapping[str, Any]) -> TracedTimeline:
        from estimator.timeline import decode_timeline

        data = self._ask("timeline", payload)
        return TracedTimeline(timeline=decode_timeline(data["timeline"]), routing_matters=bool(data["routing_matters"]))

    def _find(self, payload: Mapping[str, Any], is_public: bool) -> _Found:
        if is_only_at_hand():
            return self._at_hand(payload, is_public)
        key = _key(payload, _scope(is_public))
        if (kept := self._held(key)) is not None:
            return kept
        found = self._flights.once(key, lambda: self._obtain(key, payload, is_public))
        assert isinstance(found, _Found)
        return found

    def _at_hand(self, payload: Mapping[str, Any], is_public: bool) -> _Found:
        """What was found before.

        Raises:
            NotAtHandError: if it was not.
        """
        key = _key(payload, _scope(is_public))
        if (kept := self._held(key)) is not None:
            return kept
        found = _read(self._file(key)) if self._directory is not None else None
        if found is None:
            raise NotAtHandError
        self._hold(key, found)
        return found

    def _held(self, key: str) -> _Found | None:
        with self._lock:
            if (kept := self._found.get(key)) is not None:
                self._found.move_to_end(key)
            return kept

    def _hold(self, key: str, found: _Found) -> None:
        with self._lock:
            self._found[key] = found
            while len(self._found) > self._max_entries:
                self._found.popitem(last=False)

    def _file(self, key: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{key}.json"

    def _obtain(self, key: str, payload: Mapping[str, Any], is_public: bool) -> _Found:
        file = self._file(key) if self._directory is not None else None
        found = _read(file) if file is not None else None
        if found is None:
            data = self._ask("trace", payload)
            found = _decoded(data)
            if file is not None and is_public:
                write_json(file, data)
        self._hold(key, found)
        return found

    def _ask(self, task: str, payload: Mapping[str, Any]) -> Any:
        from estimator.sources.process import default_inspector

        inspector = self._inspector if self._inspector is not None else default_inspector()
        return inspector.run(task, payload, wall_seconds=self._wall_seconds)


def regime(inventory: Inventory, length: int, *, shortest: int = 1) -> tuple[int, int]:
    """Shortest and longest sequence that run the same program as `length`: windows and chunks of attention part them [tokens].

    Where positions are learned, none is longer than there surely are: some models keep the first few rows for padding.

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
    places = inventory.num_positions
    if places is not None and inventory.learns_positions:
        longest = max(length, min(longest, 1 << (places.bit_length() - 1)))
    return shortest, longest


def _sized(recipe: Recipe, batch: int, length: int) -> Recipe:
    assert recipe.training is not None
    return replace(recipe, training=recipe.training.at(batch, length))


def _read(file: Path) -> _Found | None:
    """What was kept in a file. What cannot be read any more is no answer."""
    data = read_json(file)
    try:
        return _decoded(data) if data is not None else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _decoded(data: Mapping[str, Any]) -> _Found:
    from estimator.traced_step import decode_program  # numpy takes 0.1 s

    if "program" not in data:
        return _Found(step=None, reason=str(data["reason"]))
    step = TracedStep(
        program=decode_program(data["program"]), is_outline=bool(data["is_outline"]), routing_matters=bool(data["routing_matters"])
    )
    return _Found(step=step, multiple_of=data["multiple_of"], any_batch=bool(data["any_batch"]))


def _payload(subject: Subject, recipe: Recipe) -> dict[str, Any]:
    return {"config": dict(subject.config), "recipe": asdict(recipe), "layers_prefix": subject.inventory.layers_prefix}


def _scope(is_public: bool) -> str:
    """What is learnt of a private model is shared by nobody but those who hold the same token."""
    return PUBLIC if is_public else current().scope


def _key(payload: Mapping[str, Any], scope: str) -> str:
    content = {"payload": payload, "versions": _versions(), "format": FORMAT}
    if scope != PUBLIC:
        content["scope"] = scope
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    """Of everything that a step runs through."""
    return library_versions(("accelerate", "bitsandbytes", "peft", "torch", "transformers", "trl"))


@cache
def default_tracer() -> Tracer:
    """The tracer of this program."""
    return Tracer(directory=default_directory() / "traces")
