"""The processes that run `estimator.introspect`: started, limited, killed and replaced here. This module imports no framework.

A config is a stranger's input, and building a model from it runs code of transformers that never was meant for hostile values. It therefore
happens in a process without secrets, network or files, which is killed when it takes too long or too much memory.
"""

import atexit
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import estimator
from estimator.errors import ConfigError, InspectionError, InspectionLimitError, SourceUnavailableError, TraceError

_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "VIRTUAL_ENV")
_DOING = {"trace": "tracing the step", "timeline": "tracing the step"}
_CONFIG_KINDS = ("unknown_model_type", "config", "class")
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may take."""

    wall_seconds: float = 10.0
    cpu_seconds: float = 15.0
    resident_bytes: int = 6 * 2**30
    request_bytes: int = 4 * 2**20
    answer_bytes: int = 64 * 2**20
    start_seconds: float = 60.0
    """For importing the frameworks; not counted as part of a request."""
    requests_per_process: int = 500
    """Then the process is replaced, so that nothing can pile up in it."""


class Process:
    """One inspecting process. Used by one caller at a time."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_requests = 0
        self._doing = ""
        self._ready = False
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "estimator.introspect.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True, name="vramplan-inspection").start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def request(self, task: str, payload: Mapping[str, object], limits: Limits) -> Any:
        """The result of one task.

        Raises:
            ConfigError: if transformers knows no such model, or refuses the values.
            InspectionError: if the model cannot be built.
            InspectionLimitError: if it took too much time or memory; the process is then dead.
        """
        message = json.dumps({"task": task, "payload": payload, "cpu_seconds": limits.cpu_seconds}, allow_nan=False).encode() + b"\n"
        if len(message) > limits.request_bytes:
            raise ConfigError(f"config: {len(message)} bytes; accepted: at most {limits.request_bytes}", field="model.config")
        self._doing = _DOING.get(task, "building the model")
        self._wait_until_ready()
        self.num_requests += 1
        try:
            assert self._popen.stdin is not None
            self._popen.stdin.write(message)
            self._popen.stdin.flush()
        except OSError:
            raise self._died() from None
        return _result(self._doing, self._answer(limits.wall_seconds, limits.resident_bytes))

    def close(self) -> None:
        """Ends the process and waits for it."""
        with suppress(OSError):
            self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _wait_until_ready(self) -> None:
        if not self._ready:
            self._answer(self.limits.start_seconds, None)
            self._ready = True

    def _answer(self, seconds: float, resident_bytes: int | None) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, min(_POLL_SECONDS, deadline - time.monotonic())))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    self.close()
                    raise InspectionLimitError(f"{self._doing} took longer than {seconds:g} s and was stopped", field="model") from None
                if resident_bytes is not None and (used := _resident_bytes(self.pid)) > resident_bytes:
                    self.close()
                    message = f"{self._doing} took {used} bytes of memory, more than the limit of {resident_bytes}, and was stopped"
                    raise InspectionLimitError(message, field="model") from None
                continue
            if line is None:
                raise self._died()
            answer: dict[str, Any] = json.loads(line)
            return answer

    def _died(self) -> InspectionError:
        self.close()
        code = self._popen.returncode
        if code in (-signal.SIGKILL, -getattr(signal, "SIGXCPU", 0)):
            return InspectionLimitError(f"{self._doing} ran into the limit of processor time or memory", field="model")
        return InspectionError(f"the inspecting process ended unexpectedly (exit status {code})", field="model")

    def _read(self) -> None:
        stdout = self._popen.stdout
        assert stdout is not None
        with suppress(OSError, ValueError):  # closed while we were reading: the process was killed
            while line := stdout.readline(self.limits.answer_bytes):
                if not line.endswith(b"\n"):
                    break
                self._lines.put(line)
        self._lines.put(None)


class Inspector:
    """Hands requests to processes; safe to call from many threads.

    Args:
        limits: what one request may take.
        max_processes: requests worked on at once; further callers wait for `queue_seconds`.
        keep_spare: whether one more process is kept warm, to step in for one that was killed. A command line that asks once needs none.
    """

    def __init__(
        self, *, limits: Limits | None = None, max_processes: int = 1, keep_spare: bool = True, queue_seconds: float = 30.0
    ) -> None:
        self.limits = limits or Limits()
        self._keep_spare = keep_spare
        self._queue_seconds = queue_seconds
        self._places = threading.BoundedSemaphore(max_processes)
        self._num_waiting = 0
        self._max_waiting: int | None = None
        self._max_idle = max_processes + keep_spare
        self._lock = threading.Lock()
        self._idle: list[Process] = []
        self._closed = False

    def run(self, task: str, payload: Mapping[str, object], *, wall_seconds: float | None = None) -> Any:
        """The result of one task of `estimator.introspect.tasks`.

        Args:
            task: its name.
            payload: JSON values.
            wall_seconds: another limit of time than the usual one; processor time may be half as much again [s].

        Raises:
            ConfigError, InspectionError, InspectionLimitError: see `Process.request`.
            SourceUnavailableError: if all processes stayed busy.
        """
        limits = self.limits
        if wall_seconds is not None:
            limits = Limits(wall_seconds=wall_seconds, cpu_seconds=1.5 * wall_seconds, resident_bytes=limits.resident_bytes)
        self._queue_up()
        try:
            process = self._take()
            try:
                return process.request(task, payload, limits)
            finally:
                self._give_back(process)
        finally:
            self._places.release()

    def limit_waiting(self, max_waiting: int) -> None:
        """Lets at most so many callers wait for a process; further ones are told to come back at once."""
        self._max_waiting = max_waiting

    def _queue_up(self) -> None:
        """Takes a place, or waits for one."""
        if self._places.acquire(blocking=False):
            return
        with self._lock:
            if self._max_waiting is not None and self._num_waiting >= self._max_waiting:
                raise SourceUnavailableError("all inspecting processes are busy, and others wait; try again", retry_after_seconds=5)
            self._num_waiting += 1
        try:
            if not self._places.acquire(timeout=self._queue_seconds):
                raise SourceUnavailableError(f"all inspecting processes were busy for {self._queue_seconds:g} s; try again")
        finally:
            with self._lock:
                self._num_waiting -= 1

    def warm_up(self) -> None:
        """Starts a process, without waiting for it."""
        self._give_back(self._take())

    def close(self) -> None:
        """Ends all processes."""
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for process in idle:
            process.close()

    def _take(self) -> Process:
        with self._lock:
            if self._closed:
                raise SourceUnavailableError("the inspector is closed")
            while self._idle:
                # The one started first: it is the likeliest to be warm.
                process = self._idle.pop(0)
                if process.alive:
                    break
                process.close()
            else:
                process = Process(self.limits)
            if self._keep_spare and not self._idle:
                self._idle.append(Process(self.limits))
            return process

    def _give_back(self, process: Process) -> None:
        with self._lock:
            wanted = not self._closed and process.alive and process.num_requests < self.limits.requests_per_process
            if wanted and len(self._idle) < self._max_idle:
                self._idle.insert(0, process)
                return
        process.close()


@cache
def default_inspector() -> Inspector:
    """The inspector of this program: one process at a time, none kept in reserve."""
    inspector = Inspector(keep_spare=False)
    atexit.register(inspector.close)
    return inspector


def _result(doing: str, answer: dict[str, Any]) -> Any:
    if answer.get("ok"):
        return answer["result"]
    kind, message = answer.get("kind"), str(answer.get("message"))
    if kind in _CONFIG_KINDS:
        raise ConfigError(message, field="model.config.model_type" if kind == "unknown_model_type" else "model.config")
    if kind == "not_traceable":
        raise TraceError(f"the step cannot be traced: {message}", field="engine")
    if kind == "limit":
        raise InspectionLimitError(f"{doing} ran into a limit of the inspecting process: {message}", field="model")
    raise InspectionError(message, field="model")


def _environment() -> dict[str, str]:
    """Only what a Python process needs: no token, no key, no proxy."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    nowhere = str(Path(tempfile.gettempdir()) / "vramplan-nowhere")
    return passed_on | {
        "PYTHONPATH": str(Path(estimator.__file__).parent.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": nowhere,
        "HF_HOME": nowhere,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def _resident_bytes(pid: int) -> int:
    """Resident memory of a process [bytes]; 0 where /proc does not exist or the process has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
