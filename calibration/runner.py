"""Runs one case in a fresh process and turns whatever happens to it into a record."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from pydantic import ValidationError

from calibration.card import card_id, card_name, driver_version, used_bytes
from calibration.case import Case
from calibration.record import Environment, Kind, Outcome, Provenance, Record, environment_here, package_version
from calibration.report import WorkerReport

DEFAULT_TIMEOUT_SECONDS = 900.0
_ERROR_TAIL_CHARS = 4000
# Read beyond it, so that no token or URL is cut in two before it is taken out.
_CUT_BYTES = 8192
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_TOKEN = re.compile(r"hf_(?:(?:oauth|jwt)_[A-Za-z0-9_.-]{4,}|[A-Za-z0-9]{16,})")
_QUERY = re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>]+")
_BITSANDBYTES_FULL = re.compile(r"Error out of memory at line \d+ in file \S+")
"""What bitsandbytes prints before it ends the process with exit code 1; a progress bar may stand before it on the line.

Source: bitsandbytes 0.50.2, libbitsandbytes_cuda*.so, the string `Error %s at line %d in file %s`; csrc/ops.cuh, CUDA_CHECK_RETURN; the
first part is cudaGetErrorString's of cudaErrorMemoryAllocation.
"""


class Device(StrEnum):
    """Where the step runs."""

    CUDA = "cuda"
    CPU = "cpu"  # dry: the step runs, nothing is measured
    TRACE = "trace"  # dry: the step runs on tensors without content; its figures are marked as traced


_KINDS = {Device.CUDA: Kind.MEASURED, Device.CPU: Kind.DRY_RUN, Device.TRACE: Kind.TRACED}


class NoDeviceError(Exception):
    """The machine has no usable CUDA device; the message names what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """How cases are run."""

    device: Device = Device.CUDA
    gpu: int = 0
    """Index among the cards this process may see."""
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    """After this a case is killed; it costs only itself."""
    snapshot: Path | None = None
    """File for the allocator's history, which pytorch.org/memory_viz opens; recording it takes time, and memory of the host."""
    worker: tuple[str, ...] = (sys.executable, "-m", "calibration.worker")
    """Command that reads a case from one file and writes its report to another."""

    @property
    def kind(self) -> Kind:
        return _KINDS[self.device]

    def run(self, case: Case) -> Record:
        """The record of one case, whatever becomes of its process.

        Raises:
            NoDeviceError: if there is no CUDA device; no record is made of that.
            OSError: if the snapshot's file cannot be written; nothing is run then.
        """
        if self.snapshot is not None:
            self.snapshot.open("ab").close()
        on_card = self.device is Device.CUDA
        before = used_bytes(card_id(self.gpu)) if on_card else None
        started_at = datetime.now(UTC)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="vramplan-case-") as folder:
            report = self._report(case, Path(folder), before or 0)
        duration = time.monotonic() - start
        if report.outcome == "refused":
            raise NoDeviceError(report.error or "the device is not available")
        environment = report.environment
        if environment is not None and on_card:
            environment = environment.model_copy(update={"driver": driver_version(card_id(self.gpu))})
        return Record(
            case_hash=case.hash,
            case=case,
            kind=self.kind,
            outcome=Outcome.TIMEOUT if report is _TIMED_OUT else Outcome(report.outcome),
            figures=report.figures if self.kind is not Kind.DRY_RUN else None,
            environment=environment,
            provenance=Provenance(
                vramplan=package_version("vramplan") or "unknown",
                started_at=started_at.isoformat(timespec="seconds"),
                duration_seconds=round(duration, 3),
                step_seconds=report.step_seconds,
                foreign_before_bytes=before,
                foreign_after_bytes=used_bytes(card_id(self.gpu)) if on_card else None,
            ),
            error=_told(report.error) if report is not _TIMED_OUT else f"killed after {self.timeout_seconds:g} s",
        )

    def _report(self, case: Case, folder: Path, foreign_bytes: int) -> WorkerReport:
        """Starts the worker, waits for it within the time allowed, and reads what it left."""
        case_file, report_file, log_file = folder / "case.json", folder / "report.json", folder / "log"
        case_file.write_text(case.model_dump_json())
        command = [*self.worker, str(case_file), str(report_file), "--device", self.device, "--foreign-bytes", str(foreign_bytes)]
        if self.snapshot is not None:
            command += ["--snapshot", str(self.snapshot.resolve())]
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self._environment(case), start_new_session=True
            )
            try:
                code = process.wait(self.timeout_seconds)
            except subprocess.TimeoutExpired:
                return _TIMED_OUT
            finally:
                _kill_group(process)
        try:
            return WorkerReport.model_validate_json(report_file.read_bytes())
        except (OSError, ValidationError):
            printed = _tail(log_file)
            if code == 1 and (full := _BITSANDBYTES_FULL.search(printed)):
                return WorkerReport(outcome="oom", environment=self._surroundings(), error=f"bitsandbytes: {full[0]}")
            return WorkerReport(outcome="failed", error=f"the worker {_ending(code)} without a report: {printed}")

    def _surroundings(self) -> Environment:
        """What can be said from here of where a worker ran that left no word: enough to know the case again (`Environment.key`)."""
        return environment_here(gpu=card_name(card_id(self.gpu)) if self.device is Device.CUDA else None)

    def _environment(self, case: Case) -> dict[str, str]:
        """The worker sees one card; the Hub and the token only where the case asks for weights from there."""
        from_hub = case.checkpoint is not None
        inherited = {name: value for name, value in os.environ.items() if from_hub or name not in _SECRETS}
        visible = card_id(self.gpu) if self.device is Device.CUDA else ""
        # PCI order is nvidia-smi's order: without it CUDA may count the cards differently
        return {**inherited, **({} if from_hub else _OFFLINE), "CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


_TIMED_OUT = WorkerReport(outcome="failed", error="timeout")


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends the worker and everything it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _tail(log_file: Path) -> str:
    with log_file.open("rb") as log:
        log.seek(0, os.SEEK_END)
        log.seek(max(0, log.tell() - _ERROR_TAIL_CHARS - _CUT_BYTES))
        return log.read().decode(errors="replace").strip()


def _told(error: str | None) -> str | None:
    """The end of an error as a record may hold it, which others are given: no token, no signed URL, nobody's home directory."""
    if error is None:
        return None
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        error = error.replace(secret, "hf_…")
    error = _QUERY.sub(r"\1?…", _TOKEN.sub("hf_…", error))
    home = os.environ.get("HOME", "").rstrip("/")
    return (error.replace(f"{home}/", "~/") if home else error)[-_ERROR_TAIL_CHARS:]
