"""The inspecting process: reads requests from standard input and writes answers to standard output, one JSON object a line.

    → {"task": "inventory", "payload": {…}, "cpu_seconds": 20}
    ← {"ok": true, "result": …}
    ← {"ok": false, "kind": "build", "message": "…"}

The first line it writes is `{"ready": true}`. It ends when its input does. What libraries print goes to standard error.
"""

import contextlib
import json
import os
import socket
import sys
from typing import Any, BinaryIO

from estimator.introspect.errors import BuildError
from estimator.introspect.tasks import WARM_UP, task

MEMORY_LIMIT_BYTES = 24 * 2**30
"""Address space, not resident memory, which the parent watches: a CUDA build of torch alone maps many GiB of libraries."""


def main() -> None:
    """Serves requests until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that a library's print cannot end up between two answers
    _forbid_network()
    _quieten()
    for name, payload in WARM_UP.items():
        task(name)(payload)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_AS", MEMORY_LIMIT_BYTES)
    _limit("RLIMIT_FSIZE", 0)
    _write(answers, {"ready": True})
    for line in sys.stdin.buffer:
        _write(answers, answer(json.loads(line)))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """One request answered; whatever goes wrong inside a library is a kind and a message."""
    _limit_cpu(request.get("cpu_seconds"))
    try:
        return {"ok": True, "result": task(request["task"])(request["payload"])}
    except BuildError as error:
        return {"ok": False, "kind": error.kind, "message": error.message}
    except (MemoryError, RecursionError) as error:
        return {"ok": False, "kind": "limit", "message": type(error).__name__}
    except Exception as error:  # the boundary of the process: the parent turns it into one of our errors
        return {"ok": False, "kind": "internal", "message": f"{type(error).__name__}: {str(error)[:400]}"}


def _write(answers: BinaryIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")
    answers.flush()


def _quieten() -> None:
    """Messages of transformers are for its users; nobody reads them here."""
    import transformers

    transformers.logging.set_verbosity_error()


def _limit(name: str, value: int) -> None:
    """Lowers a limit of this process where the platform has it and the present one is not lower still."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(getattr(resource, name))[1]
        if hard == resource.RLIM_INFINITY or hard > value:
            resource.setrlimit(getattr(resource, name), (value, value))


def _limit_cpu(seconds: float | None) -> None:
    """Ends this process by a signal after so much more processor time: it also holds when the parent has died."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        if seconds is not None:
            # Whole seconds only; one more than needed, so that the parent's limit on wall time speaks first.
            soft = int(usage.ru_utime + usage.ru_stime + seconds) + 2
            resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _forbid_network() -> None:
    """Nothing a config says may reach out: the libraries are told so by their environment, and sockets are refused besides."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("the inspecting process has no network")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        setattr(socket.socket, name, refuse)
    socket.getaddrinfo = refuse  # type: ignore[assignment]


if __name__ == "__main__":
    main()
