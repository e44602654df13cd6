"""What the driver says about a card, asked without creating a CUDA context."""

import os
import re
import shutil
import subprocess

from estimator.nvidia_smi import SmiProcess
from estimator.units import MIB

_PROCESS_FIELDS = "pid,used_memory,process_name"
_SLICE = re.compile(r"\bMIG (?:\d+c\.)?\d+g\.\d+gb\b")
_VERSION = re.compile(r"\d+(?:\.\d+)+")


def is_slice(name: str) -> bool:
    """Whether CUDA's name of a card is that of a slice of one, such as `NVIDIA A100-SXM4-40GB MIG 3g.20gb`.

    Source: NVIDIA Multi-Instance GPU User Guide, MIG Device Names.
    """
    return _SLICE.search(name) is not None


def card_id(gpu: int) -> str:
    """What nvidia-smi and CUDA call the card with this index among those that CUDA_VISIBLE_DEVICES leaves."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not visible:
        return str(gpu)
    return visible[gpu] if gpu < len(visible) else ""


def used_bytes(card: str) -> int | None:
    """Memory in use on a card by all processes [bytes]; None where nvidia-smi is missing or does not tell."""
    answer = _query("memory.used", card)
    return int(answer) * MIB if answer is not None and answer.isdigit() else None


def total_bytes(card: str) -> int | None:
    """Memory of a card as nvidia-smi has it: more than CUDA gives [bytes]."""
    answer = _query("memory.total", card)
    return int(answer) * MIB if answer is not None and answer.isdigit() else None


def card_name(card: str) -> str | None:
    """Its name, as torch has it too."""
    return _query("name", card)


def driver_version(card: str) -> str | None:
    """Of the driver, which is the same for all cards: where nvidia-smi does not know this one, as with a slice, any other is asked."""
    for one in (card, None):
        found = _VERSION.match(_ask("--query-gpu=driver_version", one) or "")
        if found is not None:
            return found[0]
    return None


def own_bytes(card: str) -> int | None:
    """What the driver says that this process holds on a card [bytes]; None where it does not tell, as in many containers."""
    return next((one.used_bytes for one in processes(card) or () if one.pid == os.getpid()), None)


def processes(card: str) -> tuple[SmiProcess, ...] | None:
    """Who computes on a card; None where nvidia-smi is missing or does not tell. In a container others may be hidden."""
    answer = _ask(f"--query-compute-apps={_PROCESS_FIELDS}", card)
    if answer is None:
        return None
    rows = (line.split(",", 2) for line in answer.splitlines() if line.count(",") >= 2)
    return tuple(
        SmiProcess(pid=int(pid), name=name.strip(), used_bytes=int(used) * MIB if used.strip().isdigit() else None)
        for pid, used, name in rows
        if pid.strip().isdigit()
    )


def _query(field: str, card: str) -> str | None:
    return _ask(f"--query-gpu={field}", card) or None


def _ask(query: str, card: str | None) -> str | None:
    """The answer about one card, or about all where none is named."""
    program = shutil.which("nvidia-smi")
    if program is None or card == "":
        return None
    named = [f"--id={card}"] if card is not None else []
    command = [program, *named, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
