"""A run traced: what is alive when, by module and operator, and what the allocator makes of it."""

import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from app.answer import SCHEMA_VERSION, Json, render_recipe, render_stack
from app.engine import routing_notice
from app.reading import read_estimate
from app.service import Case, prepare, refusals
from app.timeline_chart import Column, chart, columns_of
from estimator.allocator_settings import parse_settings
from estimator.device import context_bytes, library_bytes
from estimator.errors import RequestError
from estimator.estimate import Notice
from estimator.memory_snapshot import memory_snapshot
from estimator.phases import Phase
from estimator.replay import Replay, replay
from estimator.sources.tracing import default_tracer
from estimator.timeline import Allocation, PhasePeak, Timeline
from estimator.units import gib
from estimator.whole_run import whole_run

_HERE = Path(__file__).parent
_LARGEST_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRun:
    """A traced run with its allocator."""

    case: Case
    timeline: Timeline
    replay: Replay
    settings: str
    notices: tuple[Notice, ...] = ()

    @property
    def columns(self) -> tuple[Column, ...]:
        return columns_of(self.timeline)


def trace(payload: Mapping[str, Any], *, settings: str = "", all_layers: bool = False, usable_bytes: int | None = None) -> TracedRun:
    """Trace the run of a request.

    Args:
        payload: a request of the contract, with `training`.
        settings: content of `PYTORCH_CUDA_ALLOC_CONF`; what the request says if empty.
        all_layers: whether every layer is run, instead of a few of each kind.
        usable_bytes: what the process may have, context and libraries included; None for a card without a limit [bytes].

    Raises:
        VramplanError: if the request cannot be answered for, or the step not be traced.
    """
    case = prepare(read_estimate(payload))
    settings = settings or case.question.request.pytorch_cuda_alloc_conf
    options = parse_settings(settings)
    if case.recipe.training is None:
        raise RequestError("training: is required: what is traced is a training step", field="training")
    case.answerer.check_traceable(case.recipe)
    step = default_tracer().timeline(case.answerer.subject, case.recipe, all_layers=all_layers)
    run = whole_run(step.timeline, case.inventory, case.recipe)
    outside = context_bytes(case.recipe.num_multiprocessors) + library_bytes()
    capacity = None if usable_bytes is None else max(0, usable_bytes - outside)
    replayed = replay(run.timeline, options, capacity_bytes=capacity, cache_emptied_after=[run.cache_emptied_after])
    notices = refusals(case)
    if step.routing_matters:
        notices += (routing_notice(lambda: _worst_routing(case, all_layers=all_layers), _worst(run.timeline).allocated_bytes),)
    return TracedRun(case=case, timeline=run.timeline, replay=replayed, settings=settings, notices=notices)


def _worst_routing(case: Case, *, all_layers: bool) -> int:
    """Allocated at the peak if all tokens chose the same experts [bytes]."""
    step = default_tracer().timeline(case.answerer.subject, case.recipe, all_layers=all_layers, routing="worst")
    return _worst(whole_run(step.timeline, case.inventory, case.recipe).timeline).allocated_bytes


def _worst(timeline: Timeline) -> PhasePeak:
    return max(timeline.peaks().values(), key=lambda peak: peak.allocated_bytes)


def answer_trace(run: TracedRun) -> Json:
    """The traced run as JSON."""
    peaks = run.timeline.peaks()
    worst = _worst(run.timeline)
    alive = {phase: run.timeline.alive(peak.event) for phase, peak in peaks.items()}
    at_peak = run.replay.peak()
    return {
        "schema_version": SCHEMA_VERSION,
        "model": run.case.model_json(),
        "recipe": render_recipe(run.case.recipe),
        "engine": "trace",
        "stack": render_stack(run.case.recipe.stack),
        "peak": {"phase": worst.phase, "allocated_bytes": worst.allocated_bytes, "event": worst.event},
        "phases": [
            {
                "phase": phase.value,
                "allocated_bytes": peaks[phase].allocated_bytes,
                "items": [{"name": name, "bytes": num_bytes} for name, num_bytes in sorted(run.timeline.items(peaks[phase].event).items())],
                "modules": _modules(alive[phase]),
                "largest": _largest(alive[phase]),
            }
            for phase in Phase
            if phase in peaks
        ],
        "allocator": {
            "settings": run.settings,
            "max_reserved_bytes": run.replay.max_reserved_bytes,
            "reserved_at_peak_bytes": at_peak.reserved_bytes,
            "allocated_at_peak_bytes": at_peak.allocated_bytes,
            "inactive_split_at_peak_bytes": at_peak.inactive_split_bytes,
            "num_segments": len(run.replay.segments),
        },
        "timeline": {
            "num_allocations": len(run.timeline.allocations),
            "num_events": len(run.timeline.events),
            "columns": [
                {
                    "phase": column.phase,
                    "event": column.event,
                    "allocated_bytes": column.allocated_bytes,
                    "reserved_bytes": run.replay.reserved_bytes[column.event],
                    "items": {name: size for name, size in column.items.items() if size},
                }
                for column in run.columns
            ],
        },
        "warnings": [{"code": notice.code, "message": notice.message} for notice in run.notices],
    }


def _modules(alive: Sequence[Allocation]) -> list[Json]:
    """All that is alive, by the module that made it or the tensor that is stored: layers are taken together, "" is outside of any."""
    sizes: Counter[str] = Counter()
    for allocation in alive:
        sizes[_without_numbers(allocation.module)] += allocation.allocated_bytes
    return [{"module": module, "bytes": size} for module, size in sizes.most_common()]


def svg_of(run: TracedRun, *, standalone: bool = True) -> str:
    """Memory over time as a picture: phases shaded, the peak marked with what is alive.

    Args:
        standalone: whether it carries its own colours, as a file does; a page has them in its style sheet.
    """
    worst = _worst(run.timeline)
    columns = run.columns
    lines = [
        f"{gib(row['bytes'])}  {row['item']}: {row['count']} × {row['dtype']} {row['shape']}  {row['module']} {row['operator']}".rstrip()
        for row in _largest(run.timeline.alive(worst.event))[:6]
    ]
    picture = chart(columns, peak_lines=lines, reserved=[run.replay.reserved_bytes[column.event] for column in columns])
    return _templates().get_template("timeline.svg").render(chart=picture, standalone=standalone)


def snapshot_of(run: TracedRun) -> bytes:
    """What `torch.cuda.memory._dump_snapshot()` would write: a pickle that pytorch.org/memory_viz opens."""
    return pickle.dumps(memory_snapshot(run.timeline, run.replay, run.settings))


def _largest(alive: Sequence[Allocation]) -> list[Json]:
    """The kinds of tensors that take most: layers are taken together."""
    sizes: Counter[tuple[str, ...]] = Counter()
    counts: Counter[tuple[str, ...]] = Counter()
    for allocation in alive:
        shape = " × ".join(map(str, allocation.shape))
        key = (allocation.item, _without_numbers(allocation.module), allocation.operator, allocation.dtype, shape)
        sizes[key] += allocation.allocated_bytes
        counts[key] += 1
    return [
        {"item": key[0], "module": key[1], "operator": key[2], "dtype": key[3], "shape": key[4], "count": counts[key], "bytes": size}
        for key, size in sizes.most_common(_LARGEST_SHOWN)
    ]


def _without_numbers(module: str) -> str:
    return ".".join("{}" if part.isdigit() else part for part in module.split("."))


@cache
def _templates() -> Environment:
    return Environment(loader=FileSystemLoader(_HERE / "templates"), undefined=StrictUndefined, autoescape=True)
