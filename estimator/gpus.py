"""The GPU catalogue: what CUDA gives on each card, how fast it is, and on what evidence."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from estimator.dtypes import DType
from estimator.errors import RequestError, UnknownNameError
from estimator.units import MIB

_CATALOGUE = Path(__file__).with_name("data") / "gpus.json"

# Words of NVML names that tell no two cards apart.
_FILLER = re.compile(r"nvidia|geforce|tesla|generation|amd|instinct")
# Chips of Apple: `m3 max`, `apple m2 ultra`, `mps`.
_APPLE = re.compile(r"(apple.*|mps|metal|macbook.*|mac(mini|studio|pro)|m[1-9](pro|max|ultra)?)(\d+gb)?")


# A memory size on a label, alone (`24`, `24GB`) or behind a name (`a100 40gb`).
_LABEL = re.compile(r"(?P<name>.*?)[\s_-]*?(?<![\d.])(?P<size>\d{1,3}(?:\.\d+)?)\s*(?P<unit>gb?)?", re.IGNORECASE)
# How a card is built, which names may say beside its size: `a100-pcie-40gb`.
_FORMS = re.compile(r"sxm|pcie|nvl")
_FORM_WORDS = re.compile(r"sxm\d?|pcie|nvl|hbm\d?e?")


class Vendor(StrEnum):
    """Whose card it is: bitsandbytes, flash-attn and this catalogue's memory facts are about CUDA first."""

    NVIDIA = "nvidia"
    AMD = "amd"


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
    vendor: Vendor = Vendor.NVIDIA
    is_modified: bool = False
    """Whether third parties changed its memory: found by its id or by name and total, never by name alone."""
    memory_bandwidth: float | None = None
    """Of the card's own memory [bytes/s]."""
    dense_flops: Mapping[DType, float] = field(default_factory=dict, compare=False)
    """Peak of dense matrix products with sums in float32, by type of the factors, where it is known [FLOP/s]."""
    spec_source: str = ""
    """Where bandwidth and peaks were read."""
    spec_certainty: str = "low"
    """`high`, `medium` or `low`: how well bandwidth and peaks are known."""
    matmul_share: float | None = None
    """Of its dense peak, what the best bfloat16 product reached in a published benchmark."""
    matmul_share_source: str = ""

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
        vendor=Vendor(row.get("vendor", "nvidia")),
        is_modified=row.get("is_modified", False),
        memory_bandwidth=None if row["memory_bandwidth_gb_s"] is None else row["memory_bandwidth_gb_s"] * 1e9,
        dense_flops={DType(name): tflops * 1e12 for name, tflops in row["dense_tflops"].items() if tflops is not None},
        spec_source=row["spec_source"],
        spec_certainty=row["spec_certainty"],
        matmul_share=row.get("matmul_share"),
        matmul_share_source=row.get("matmul_share_source", ""),
    )


@cache
def all_gpus() -> tuple[Gpu, ...]:
    """Every card of the catalogue, read at the first call."""
    return tuple(_parse(row) for row in json.loads(_CATALOGUE.read_text(encoding="utf-8"))["gpus"])


def name_key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _FILLER.sub("", name.lower()))


@cache
def _by_id() -> dict[str, Gpu]:
    return {gpu.id: gpu for gpu in all_gpus()}


@cache
def _by_name() -> dict[str, tuple[Gpu, ...]]:
    found: dict[str, dict[str, Gpu]] = {}
    for gpu in all_gpus():
        for name in gpu.names:
            found.setdefault(name_key(name), {})[gpu.id] = gpu
    return {key: tuple(gpus.values()) for key, gpus in found.items()}


def find_gpus(name: str) -> tuple[Gpu, ...]:
    """All cards of an id, an alias or an NVML name; none where it is not known."""
    exact = _by_id().get(name.strip().lower())
    return (exact,) if exact is not None else _by_name().get(name_key(name), ())


def find_gpu(name: str, *, field: str = "hardware.gpu", total_bytes: int | None = None) -> Gpu:
    """The card of an id (`rtx4090`), an alias (`4090`), an NVML name (`NVIDIA GeForce RTX 4090`), any of them with the size on its label
    (`a100 40gb`), or of that size alone where one card has it (`11GB`).

    Args:
        name: case, blanks, hyphens and the words NVIDIA, GeForce and Tesla do not matter.
        field: what error messages call it.
        total_bytes: total memory that CUDA or nvidia-smi reports; decides between cards of one name [bytes].

    Raises:
        UnknownNameError: if no card has this name, or several have and `total_bytes` is absent; the message lists those.
        RequestError: if it is a chip of Apple.
    """
    exact = _by_id().get(name.strip().lower())
    if exact is not None and total_bytes is None:
        return exact
    candidates = _by_name().get(name_key(name), ())
    if not candidates and _APPLE.fullmatch(name_key(name)):
        raise RequestError(APPLE_ANSWER.format(field=field, name=name), field=field)
    candidates = candidates or _by_label(name, field)
    if not candidates:
        raise UnknownNameError.of(field, name, _by_id())
    if total_bytes is not None:
        return min(candidates, key=lambda gpu: distance(gpu, total_bytes))
    usual = [gpu for gpu in candidates if not gpu.is_modified] if len(candidates) > 1 else candidates
    if len(usual) != 1:
        raise _ambiguous(field, name, usual or candidates)
    return usual[0]


def _by_label(name: str, field: str) -> tuple[Gpu, ...]:
    """Cards of a name and the size on their label, or of a size alone.

    Raises:
        UnknownNameError: if there are cards of the name, and none of that size.
    """
    match = _LABEL.fullmatch(name.strip())
    if match is None:
        return _of_form(name)
    size = float(match["size"])
    if not match["name"]:
        return tuple(gpu for gpu in all_gpus() if gpu.label_gb == size and not gpu.is_modified)
    named = _by_name().get(name_key(match["name"]), ()) or _of_form(match["name"])
    found = tuple(gpu for gpu in named if gpu.label_gb == size)
    if named and not found:
        raise UnknownNameError(f"{field}: {name!r} is not known with {size:g} GB; accepted: {_listed(named)}", field=field)
    return found


def _of_form(name: str) -> tuple[Gpu, ...]:
    """Cards of a name that says how they are built."""
    key = name_key(name)
    forms = set(_FORMS.findall(key))
    named = _by_name().get(_FORM_WORDS.sub("", key), ()) if forms else ()
    return tuple(gpu for gpu in named if any(forms <= set(_FORMS.findall(name_key(one))) for one in gpu.names))


def distance(gpu: Gpu, total_bytes: int) -> int:
    """How far a reported total is from the card's, as CUDA or as nvidia-smi shows it [bytes]."""
    totals = (gpu.capacity_bytes, gpu.nvidia_smi_bytes or gpu.capacity_bytes)
    return min(abs(total - total_bytes) for total in totals)


APPLE_ANSWER = (
    "{field}: {name!r} is Apple Silicon, which has no CUDA: bitsandbytes' 4-bit and 8-bit layers, flash-attn and paged optimizers do not "
    "run there, memory is the system's. Use MLX instead: `pip install mlx-lm`, then `mlx_lm.lora` trains LoRA on a model that "
    "`mlx_lm.convert -q` has quantized to 4 bits. Cards that are answered for: `vramplan gpus`"
)


def _ambiguous(field: str, name: str, candidates: Iterable[Gpu]) -> UnknownNameError:
    return UnknownNameError(f"{field}: {name!r} names more than one card; say which: {_listed(candidates)}", field=field)


def _listed(gpus: Iterable[Gpu]) -> str:
    return ", ".join(f"{gpu.id} ({gpu.label_gb:g} GB)" for gpu in gpus)
