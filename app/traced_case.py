"""`python -m app.traced_case CASE_FILE REPORT_FILE`: the dry-run worker of `calibrate`, which speaks the measuring worker's protocol.

It runs the case's step on tensors without content and replays it on the allocator, so that campaigns, faults, fits and reports can be tried
without a GPU. Its records are marked as traced and enter no fit of measurements.
"""

import argparse
import sys
from pathlib import Path

from app.prediction import payload_of
from app.trace import TracedRun, trace
from calibration.case import Case
from calibration.record import Figures, PhasePeak, environment_here
from calibration.report import WorkerReport
from estimator.device import context_bytes, library_bytes
from estimator.errors import VramplanError
from estimator.phases import LOADED, Phase
from estimator.replay import Replay


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 whenever a report was written."""
    parser = argparse.ArgumentParser(prog="app.traced_case", description=__doc__)
    parser.add_argument("case", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--device", choices=("trace",), default="trace")
    parser.add_argument("--foreign-bytes", type=int, default=0)
    options = parser.parse_args(arguments)
    case = Case.model_validate_json(options.case.read_bytes())
    part = options.report.with_suffix(".part")
    part.write_text(run(case).model_dump_json())
    part.rename(options.report)
    return 0


def run(case: Case) -> WorkerReport:
    """The case's figures as traced, or what kept it from being traced."""
    environment = environment_here()
    try:
        traced = trace(payload_of(case, engine="trace"), all_layers=True, usable_bytes=case.cap_bytes)
    except VramplanError as refused:
        return WorkerReport(outcome="failed", environment=environment, error=refused.message)
    if (failed := traced.replay.out_of_memory) is not None:
        figures = Figures(run_allocated_bytes=max(traced.replay.allocated_bytes, default=0))
        error = f"{failed.requested_bytes:,} bytes found no room beside {failed.before.reserved_bytes:,}"
        return WorkerReport(outcome="oom", figures=figures, environment=environment, error=error)
    return WorkerReport(outcome="ok", figures=figures_of(traced), environment=environment)


def figures_of(traced: TracedRun) -> Figures:
    """What a meter would have read in the traced run's last step."""
    timeline, replay = traced.timeline, traced.replay
    starts = [mark.event for mark in timeline.marks if mark.phase == Phase.FORWARD.value]
    updates = [mark.event for mark in timeline.marks if mark.phase == Phase.OPTIMIZER_STEP.value]
    last = next(start for start in starts if start > updates[0])
    phases: dict[str, PhasePeak] = {}
    for mark, end in timeline.spans():
        if mark.event >= last or mark.phase == Phase.LOAD.value:
            seen = _peak(replay, mark.event, end)
            known = phases.get(mark.phase, seen)
            phases[mark.phase] = PhasePeak(
                allocated_bytes=max(seen.allocated_bytes, known.allocated_bytes),
                reserved_bytes=max(seen.reserved_bytes, known.reserved_bytes),
            )
    whole = _peak(replay, last, len(timeline.events))
    context = context_bytes(traced.case.recipe.num_multiprocessors)
    loaded = sum(a.allocated_bytes for a in timeline.alive(starts[0] - 1) if a.item in LOADED)
    return Figures(
        context_bytes=context,
        loaded_bytes=loaded,
        steady_state_bytes=replay.at(last - 1).allocated_bytes,
        phases=phases,
        peak_allocated_bytes=whole.allocated_bytes,
        peak_reserved_bytes=whole.reserved_bytes,
        run_allocated_bytes=max(replay.allocated_bytes),
        device_bytes=replay.reserved_bytes[-1] + context + library_bytes(),
        num_allocation_retries=replay.num_alloc_retries,
        num_segments=len(replay.segments),
    )


def _peak(replay: Replay, start: int, end: int) -> PhasePeak:
    reserved = max(replay.reserved_bytes[start:end], default=replay.at(start - 1).reserved_bytes)
    return PhasePeak(allocated_bytes=replay.peak(start, end).allocated_bytes, reserved_bytes=reserved)


if __name__ == "__main__":
    sys.exit(main())
