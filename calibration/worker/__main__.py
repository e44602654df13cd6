"""`python -m calibration.worker CASE_FILE REPORT_FILE`: runs one case, writes one report, ends."""

import argparse
import ctypes
import os
import signal
import sys
import traceback
from pathlib import Path

from calibration.card import card_id, own_bytes, used_bytes
from calibration.case import Case
from calibration.record import Environment, Figures
from calibration.report import WorkerReport

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Exit code 0 whenever a report was written."""
    parser = argparse.ArgumentParser(prog="calibration.worker", description=__doc__)
    parser.add_argument("case", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--foreign-bytes", type=int, default=0)
    parser.add_argument("--snapshot", type=Path)
    arguments = parser.parse_args()
    die_with_parent()
    case = Case.model_validate_json(arguments.case.read_bytes())
    _write(arguments.report, run(case, arguments.device, arguments.foreign_bytes, arguments.snapshot))
    return 0


def run(case: Case, device_name: str, foreign_bytes: int, snapshot: Path | None = None) -> WorkerReport:
    """Whatever happens in the case becomes a report; only a killed process leaves none.

    Args:
        case: to run.
        device_name: `cuda` or `cpu`.
        foreign_bytes: what others used on the card before this process came [bytes].
        snapshot: where the allocator's history is written, on a card; nowhere if None.
    """
    import torch

    from calibration.worker.generation import generate
    from calibration.worker.meter import CudaMeter, Meter, SilentMeter, recorded
    from calibration.worker.model import build
    from calibration.worker.surroundings import environment, missing_cuda
    from calibration.worker.training import train

    on_cpu = device_name == "cpu"
    if not on_cpu and (missing := missing_cuda()):
        return WorkerReport(outcome="refused", error=missing)
    device = torch.device(device_name)
    surroundings: Environment = environment(device)
    meter: Meter = SilentMeter() if on_cpu else CudaMeter(foreign_bytes, case.cap_bytes, is_training=case.is_training)
    problems: list[str] = []
    try:
        with recorded(None if on_cpu else snapshot, problems.append):
            model = build(case, device)
            seconds = train(case, model, meter, on_cpu=on_cpu) if case.is_training else generate(case, model, meter, device)
            figures = _with_driver(meter.figures())
    except Exception as error:
        if _is_out_of_memory(error):
            told = "\n".join([str(error)[:500], *problems])
            return WorkerReport(outcome="oom", figures=_with_driver(meter.figures()), environment=surroundings, error=told)
        return WorkerReport(outcome="failed", environment=surroundings, error="\n".join([*problems, traceback.format_exc()]))
    error_told = "\n".join(problems) or None
    return WorkerReport(outcome="ok", figures=figures, environment=surroundings, step_seconds=round(seconds, 4), error=error_told)


def _with_driver(figures: Figures | None) -> Figures | None:
    """The figures with what the driver says of this process and of its card, the first one that it sees."""
    if figures is None:
        return None
    card = card_id(0)
    return figures.model_copy(update={"nvml_process_bytes": own_bytes(card), "nvml_device_bytes": used_bytes(card)})


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the card was full: torch's own error, or what CUDA, cuBLAS and Triton say when their allocations fail.

    bitsandbytes raises nothing: its C code ends the process, and `calibration.runner` reads why off what it printed.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "CUDA error: out of memory" in text or "[CUDA]: out of memory" in text or "_STATUS_ALLOC_FAILED" in text
    )


def die_with_parent() -> None:
    """A killed campaign must not leave a process on the card."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _write(path: Path, report: WorkerReport) -> None:
    """The report appears whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(report.model_dump_json())
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(path)


if __name__ == "__main__":
    sys.exit(main())
