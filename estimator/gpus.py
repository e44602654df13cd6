"""The GPU catalogue: what CUDA gives on each card, and on what evidence."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from estimator.errors import UnknownNameError
from estimator.units import MIB

_CATALOGUE = Path(__file__).with_name("data") / "gpus.json"

# Words of NVML names that tell no two cards apart.
_FILLER = re.compile(r"nvidia|geforce|tesla|generation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card. NVML names are not unique: 10 and 12 GB variants of a card can share one."""

    id: str
    name: str
    """As a person would say it: the NVML name without the vendor."""
    nvml_name: str
    aliases: tuple[str, ...]
    architecture: str
    compute_capability: tuple[int, int]
    label_gb: float
    """What the box says [GB]."""
    capacity_bytes: int
    """What CUDA reports as total on Linux: the smallest value seen over drivers [bytes]."""
    capacity_basis: str
    """`measured` (seen in public logs) or `estimated` (by analogy with sister cards)."""
    nvidia_smi_bytes: int | None
    """What nvidia-smi reports as total: more than a process can get [bytes]."""
    num_sms: int
    bf16: bool
    """Native bfloat16 arithmetic, compute capability 8.0 and above."""
    fp8: bool
    context_bytes: int
    """A bare CUDA context, before any library is loaded [bytes]."""
    context_basis: str
    """`measured` or `estimated` (by `device.context_bytes` from the number of multiprocessors)."""
    certainty: str
    """`high`, `medium` or `low`: how well capacity and multiprocessors are known."""
    source: str
    """Where the capacity was seen."""
    note: str

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which it is found."""
        return (self.id, self.nvml_name, *self.aliases)


def _parse(row: dict[str, Any]) -> Gpu:
    major, minor = row["compute_capability"]
    smi_mib = row.get("nvidia_smi_mib")
    return Gpu(
        id=row["id"],
        name=row["nvml_name"].removeprefix("NVIDIA "),
        nvml_name=row["nvml_name"],
        aliases=tuple(row["aliases"]),
        architecture=row["architecture"],
        compute_capability=(major, minor),
        label_gb=row["label_gb"],
        capacity_bytes=row["capacity_mib"] * MIB,
        capacity_basis=row["capacity_basis"],
        nvidia_smi_bytes=None if smi_mib is None else smi_mib * MIB,
        num_sms=row["num_sms"],
        bf16=row["bf16"],
        fp8=row["fp8"],
        context_bytes=row["context_mib"] * MIB,
        context_basis=row["context_basis"],
        certainty=row["certainty"],
        source=row["capacity_source"],
        note=row.get("note", ""),
    )


@cache
def all_gpus() -> tuple[Gpu, ...]:
    """Every card of the catalogue, read at the first call."""
    return tuple(_parse(row) for row in json.loads(_CATALOGUE.read_text(encoding="utf-8"))["gpus"])


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _FILLER.sub("", name.lower()))


@cache
def _by_id() -> dict[str, Gpu]:
    return {gpu.id: gpu for gpu in all_gpus()}


@cache
def _by_name() -> dict[str, tuple[Gpu, ...]]:
    found: dict[str, dict[str, Gpu]] = {}
    for gpu in all_gpus():
        for name in gpu.names:
            found.setdefault(_key(name), {})[gpu.id] = gpu
    return {key: tuple(gpus.values()) for key, gpus in found.items()}


def find_gpu(name: str, *, field: str = "hardware.gpu", total_bytes: int | None = None) -> Gpu:
    """The card of an id (`rtx4090`), an alias (`4090`) or an NVML name (`NVIDIA GeForce RTX 4090`).

    Args:
        name: case, blanks, hyphens and the words NVIDIA, GeForce and Tesla do not matter.
        field: what error messages call it.
        total_bytes: total memory that CUDA reports; decides between cards of one name [bytes].

    Raises:
        UnknownNameError: if no card has this name, or several have and `total_bytes` is absent.
    """
    exact = _by_id().get(name.strip().lower())
    if exact is not None and total_bytes is None:
        return exact
    candidates = _by_name().get(_key(name), ())
    if not candidates:
        raise UnknownNameError.of(field, name, _by_id())
    if len(candidates) == 1:
        return candidates[0]
    if total_bytes is None:
        raise _ambiguous(field, name, candidates)
    return min(candidates, key=lambda gpu: abs(gpu.capacity_bytes - total_bytes))


def _ambiguous(field: str, name: str, candidates: Iterable[Gpu]) -> UnknownNameError:
    listed = ", ".join(f"{gpu.id} ({gpu.label_gb:g} GB)" for gpu in candidates)
    return UnknownNameError(f"{field}: {name!r} names more than one card; say which: {listed}", field=field)
