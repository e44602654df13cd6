"""What the driver says about a card, asked without creating a CUDA context."""

import os
import shutil
import subprocess

from estimator.units import MIB


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
    return _query("driver_version", card)


def _query(field: str, card: str) -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None or not card:
        return None
    command = [program, f"--id={card}", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
