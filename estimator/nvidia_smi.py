"""What `nvidia-smi` prints, read back: the cards of a machine, what is in use on them, and by whom.

Understood are the table of `nvidia-smi`, `nvidia-smi -L`, `nvidia-smi -q` and `--query-gpu=name,memory.total,memory.free --format=csv`.
"""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from estimator.errors import RequestError
from estimator.gpus import Gpu, all_gpus, distance, find_gpus, name_key
from estimator.units import MIB, gib

MAX_CHARACTERS = 262_144
MAX_CARDS = 64
_MAX_LINE, _MAX_NAME = 1024, 64
# A total further from the catalogue's than this belongs to another variant of the card (ECC switched, memory changed).
SAME_TOTAL = 0.03

_MODES = frozenset({"On", "Off", "N/A", "WDDM", "TCC", "MCDM"})
_TABLE_USAGE = re.compile(r"(\d{1,9})MiB\s{0,8}/\s{0,8}(\d{1,9})MiB")
_TYPES = frozenset({"C", "G", "C+G", "M", "M+C"})
_SLICED = re.compile(r"MIG devices:|MIG \d{1,2}g\.\d{1,3}gb")
_LISTED = re.compile(r"GPU (\d{1,3}): (\S.{0,80}?)(?: \(UUID: [\w-]{1,60}\))?")
_DETAILED = re.compile(r"GPU [0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d")
_MEBIBYTES = re.compile(r"(\d{1,9})\s{0,4}(?:MiB)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class SmiProcess:
    """A process that holds memory of a card."""

    pid: int
    name: str
    used_bytes: int | None
    """None where the driver does not say, as under Windows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmiCard:
    """One card as nvidia-smi shows it."""

    index: int
    name: str
    """Shortened with `...` in tables of old drivers."""
    total_bytes: int | None = None
    used_bytes: int | None = None
    free_bytes: int | None = None
    processes: tuple[SmiProcess, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCard:
    """A card that was read, and what the catalogue knows of it."""

    read: SmiCard
    gpu: Gpu
    capacity_bytes: int
    """What CUDA gives of it when nobody else is there [bytes]."""
    is_variant: bool
    """Whether its total is not the catalogue's: another variant, of which only the difference to the total is taken over."""

    @property
    def occupied_bytes(self) -> int:
        """What others hold of the capacity: what is missing from it in the free memory, else what is in use, else the sum of processes
        [bytes]."""
        if self.read.free_bytes is not None:
            return max(self.capacity_bytes - self.read.free_bytes, 0)
        if self.read.used_bytes is not None:
            return min(self.read.used_bytes, self.capacity_bytes)
        return min(sum(process.used_bytes or 0 for process in self.read.processes), self.capacity_bytes)


def read_cards(text: str, *, field: str = "hardware.nvidia_smi") -> tuple[SmiCard, ...]:
    """The cards of a paste, in the order in which they stand.

    Raises:
        RequestError: if no form of nvidia-smi's output is recognized, or a card is cut into MIG slices.
    """
    if len(text) > MAX_CHARACTERS:
        raise RequestError(f"{field}: more than {MAX_CHARACTERS:,} characters", field=field)
    lines = [line.rstrip() for line in text.expandtabs().splitlines() if len(line) <= _MAX_LINE]
    if any(_SLICED.search(line) for line in lines) or _has_slices(lines):
        raise RequestError(f"{field}: cards in MIG slices are not answered for; give hardware.capacity_gib of the slice", field=field)
    for read in (_detailed, _table, _listed, _table_of_values):
        found = tuple(read(lines))
        if found:
            return found[:MAX_CARDS]
    raise RequestError(
        f"{field}: no card is recognized; paste the output of nvidia-smi, nvidia-smi -L, nvidia-smi -q or "
        "nvidia-smi --query-gpu=name,memory.total,memory.free --format=csv",
        field=field,
    )


def identify(card: SmiCard, *, field: str = "hardware.nvidia_smi") -> FoundCard:
    """The catalogue's card for one that was read: by name and total.

    Raises:
        RequestError: if the catalogue has none of that name, or several and no total was printed.
    """
    candidates = _candidates(card, field)
    if not candidates:
        raise RequestError(
            f"{field}: {card.name!r} is not in the catalogue; give hardware.capacity_gib, what "
            "torch.cuda.get_device_properties(0).total_memory says divided by 2**30",
            field=field,
        )
    total = card.total_bytes
    if total is None:
        usual = [gpu for gpu in candidates if not gpu.is_modified]
        if len(usual) != 1:
            listed = ", ".join(gpu.id for gpu in candidates)
            raise RequestError(f"{field}: {card.name!r} names several cards ({listed}); paste an output that shows its memory", field=field)
        return FoundCard(read=card, gpu=usual[0], capacity_bytes=usual[0].capacity_bytes, is_variant=False)
    gpu = min(candidates, key=lambda gpu: distance(gpu, total))
    shown = gpu.nvidia_smi_bytes or gpu.capacity_bytes
    if abs(shown - total) <= SAME_TOTAL * shown:
        return FoundCard(read=card, gpu=gpu, capacity_bytes=min(gpu.capacity_bytes, total), is_variant=False)
    return FoundCard(read=card, gpu=gpu, capacity_bytes=total - (shown - gpu.capacity_bytes), is_variant=True)


def usage_sentence(card: FoundCard) -> str:
    """Who holds what, in a sentence; empty where nobody holds anything."""
    if not card.occupied_bytes and not card.read.processes:
        return ""
    named = ", ".join(
        f"{process.name} (pid {process.pid}{'' if process.used_bytes is None else f', {gib(process.used_bytes)}'})"
        for process in card.read.processes[:8]
    )
    by = named or "processes that are not listed"
    return f"{gib(card.occupied_bytes)} of GPU {card.read.index} ({card.gpu.name}) are in use by {by}"


def _candidates(card: SmiCard, field: str) -> tuple[Gpu, ...]:
    """Cards of a name; of a shortened one those of the printed total, if their names begin so.

    Raises:
        RequestError: if what is left of the name and the total do not settle the card.
    """
    if not card.name.endswith("..."):
        return find_gpus(card.name)
    start, total = name_key(card.name.removesuffix("...")), card.total_bytes
    beginning = [gpu for gpu in all_gpus() if any(name_key(known).startswith(start) for known in (gpu.nvml_name, *gpu.aliases))]
    if total is None:
        return tuple(beginning)
    alike = tuple(gpu for gpu in beginning if distance(gpu, total) <= SAME_TOTAL * total)
    if len(alike) > 1:
        raise RequestError(
            f"{field}: nvidia-smi has shortened the name to {card.name!r}, which may be {', '.join(gpu.id for gpu in alike)}; paste the "
            "output of nvidia-smi --query-gpu=name,memory.total,memory.free --format=csv",
            field=field,
        )
    return alike


# -- the table ------------------------------------------------------------------------------------------------------------------------


def _table(lines: list[str]) -> Iterator[SmiCard]:
    processes: dict[int, list[SmiProcess]] = {}
    cards: list[SmiCard] = []
    for number, line in enumerate(lines):
        named = _named_row(line)
        if named is not None:
            usage = next((found for below in lines[number + 1 : number + 3] if (found := _TABLE_USAGE.search(below))), None)
            if usage is not None:
                cards.append(SmiCard(index=named[0], name=named[1], used_bytes=int(usage[1]) * MIB, total_bytes=int(usage[2]) * MIB))
                continue
        process = _process_row(line) if cards else None
        if process is not None:
            processes.setdefault(process[0], []).append(process[1])
    for card in cards:
        yield replace(card, processes=tuple(processes.get(card.index, ())))


def _named_row(line: str) -> tuple[int, str] | None:
    """Index and name of `|   0  NVIDIA GeForce RTX 4090        Off |   00000000:01:00.0 Off | …`."""
    cells = line.split("|")
    words = cells[1].split() if len(cells) > 2 else []
    if len(words) < 3 or not _is_number(words[0]) or words[-1] not in _MODES:
        return None
    return int(words[0]), " ".join(words[1:-1])


def _process_row(line: str) -> tuple[int, SmiProcess] | None:
    """Card and process of `|    0   N/A  N/A      2021      G   /usr/lib/xorg/Xorg       120MiB |`; old drivers have no instances."""
    words = line.strip().strip("|").split()
    if len(words) < 5 or not _is_number(words[0]):
        return None
    index, rest = words[0], words[1:]
    if rest[1] not in _TYPES:  # the columns of instances
        rest = rest[2:]
    if len(rest) < 4 or not _is_number(rest[0]) or rest[1] not in _TYPES:
        return None
    pid, _, *path, held = rest
    used = _bytes_of(held)
    if used is None and held != "N/A":
        return None
    return int(index), SmiProcess(pid=int(pid), name=_base_name(" ".join(path)), used_bytes=used)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10


def _base_name(path: str) -> str:
    """A program without its folders, which may name people, and without what terminals act on."""
    name = re.split(r"[/\\]", path.strip())[-1] or path.strip()
    return "".join(c if c.isprintable() else "?" for c in name)[:_MAX_NAME]


# -- `-L` -----------------------------------------------------------------------------------------------------------------------------


def _listed(lines: list[str]) -> Iterator[SmiCard]:
    for line in lines:
        match = _LISTED.fullmatch(line.strip())
        if match is not None:
            yield SmiCard(index=int(match[1]), name=match[2])


# -- `-q` -----------------------------------------------------------------------------------------------------------------------------


def _has_slices(lines: list[str]) -> bool:
    """Whether the long form says that a card's MIG mode is on."""
    return any(
        below.partition(":")[0].strip() == "Current" and below.partition(":")[2].strip() == "Enabled"
        for line, below in pairwise(lines)
        if line.strip().rstrip(" :") == "MIG Mode"
    )


def _detailed(lines: list[str]) -> Iterator[SmiCard]:
    starts = [number for number, line in enumerate(lines) if _DETAILED.fullmatch(line.strip())]
    for index, (start, end) in enumerate(pairwise([*starts, len(lines)])):
        card = _detailed_card(index, lines[start + 1 : end])
        if card is not None:
            yield card


def _detailed_card(index: int, lines: list[str]) -> SmiCard | None:
    section, name = "", None
    memory: dict[str, int] = {}
    processes: list[dict[str, str]] = []
    for line in lines:
        label, colon, value = (part.strip() for part in line.partition(":"))
        if not colon:
            section = label or section
            continue
        if label == "Product Name":
            name = value
        elif section == "FB Memory Usage" and (number := _bytes_of(value)) is not None:
            memory.setdefault(label, number)
        elif label == "Process ID":
            processes.append({label: value})
        elif processes and label in ("Name", "Used GPU Memory", "Type"):
            processes[-1].setdefault(label, value)
    if name is None or "Total" not in memory:
        return None
    return SmiCard(
        index=index,
        name=name,
        total_bytes=memory["Total"],
        used_bytes=memory.get("Used"),
        free_bytes=memory.get("Free"),
        processes=tuple(_detailed_process(fields) for fields in processes if _is_number(fields["Process ID"])),
    )


def _detailed_process(fields: Mapping[str, str]) -> SmiProcess:
    name = _base_name(fields.get("Name", "")) or "a process"
    return SmiProcess(pid=int(fields["Process ID"]), name=name, used_bytes=_bytes_of(fields.get("Used GPU Memory", "")))


# -- comma-separated values -----------------------------------------------------------------------------------------------------------


def _table_of_values(lines: list[str]) -> Iterator[SmiCard]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(line for line in lines if line.strip()) if len(row) > 1]
    if not rows:
        return
    header = [cell.partition("[")[0].strip().lower() for cell in rows[0]]
    if "name" in header or "gpu_name" in header:
        rows = rows[1:]
    elif _bytes_of(rows[0][0]) is None and all(_bytes_of(cell) is not None for cell in rows[0][1:]):
        header = ["name", "memory.total", "memory.free"][: len(rows[0])]
    else:
        return
    for number, row in enumerate(rows):
        cells = dict(zip(header, row, strict=False))
        name, total = cells.get("name") or cells.get("gpu_name"), _bytes_of(cells.get("memory.total", ""))
        if not name:
            continue
        free, used = _bytes_of(cells.get("memory.free", "")), _bytes_of(cells.get("memory.used", ""))
        index = cells.get("index", "")
        yield SmiCard(index=int(index) if _is_number(index) else number, name=name, total_bytes=total, used_bytes=used, free_bytes=free)


def _bytes_of(text: str) -> int | None:
    match = _MEBIBYTES.fullmatch(text.strip())
    return None if match is None else int(match[1]) * MIB
