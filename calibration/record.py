"""What was seen: one JSON object a line, appended and never changed.

Schema version 1. All figures are bytes, named as in the answer of the service; `allocated` ≤ `reserved` ≤ `device`.
"""

import fcntl
import os
import platform
from collections.abc import Iterator
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, model_validator

from calibration.case import Case


class Outcome(StrEnum):
    """How a case ended."""

    OK = "ok"
    OOM = "oom"  # censored: the peak is above what the figures show
    FAILED = "failed"
    TIMEOUT = "timeout"


class Kind(StrEnum):
    """What the figures rest on."""

    MEASURED = "measured"  # a real card
    TRACED = "traced"  # the same step under fake tensors
    DRY_RUN = "dry_run"  # the step ran on the CPU; there are no figures


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PhasePeak(_Frozen):
    """The largest values within one phase of the last step [bytes]."""

    allocated_bytes: NonNegativeInt
    """`torch.cuda.max_memory_allocated`."""
    reserved_bytes: NonNegativeInt
    """`torch.cuda.max_memory_reserved`."""


class Figures(_Frozen):
    """What the card showed. On an `oom` outcome: as far as the run came."""

    context_bytes: NonNegativeInt | None = None
    """Device memory this process takes before its first large tensor: CUDA context and libraries loaded so far."""
    loaded_bytes: NonNegativeInt | None = None
    """Allocated once the model and its adapters stand."""
    steady_state_bytes: NonNegativeInt | None = None
    """Allocated just before the last step."""
    phases: dict[str, PhasePeak] = {}
    """Peaks of `load`, and of `forward`, `loss`, `backward`, `optimizer_step` in the last step."""
    backward_head_bytes: NonNegativeInt | None = None
    """Allocated peak of the backward pass through loss and head, before it enters the layers."""
    backward_layers_bytes: NonNegativeInt | None = None
    """Allocated peak of the backward pass through the layers."""
    peak_allocated_bytes: NonNegativeInt | None = None
    """Largest allocation of the last step."""
    peak_reserved_bytes: NonNegativeInt | None = None
    """Largest reservation of the last step."""
    run_allocated_bytes: NonNegativeInt | None = None
    """Largest allocation of all steps, the first one included."""
    device_bytes: NonNegativeInt | None = None
    """Device memory in use after the last step, less what others used before the run: segments, context, libraries, managed memory."""
    nvml_process_bytes: NonNegativeInt | None = None
    """What the driver (NVML) says that this process holds at the end, None where it does not tell; in whole MiB."""
    nvml_device_bytes: NonNegativeInt | None = None
    """What the driver says is in use on the card at the end, by whomever; in whole MiB."""
    num_parameters: NonNegativeInt | None = None
    """Logical scalars, packed weights unpacked."""
    num_trainable: NonNegativeInt | None = None
    num_allocation_retries: NonNegativeInt | None = None
    """Times the allocator had to give segments back to the card; above 0 the reserved figures are squeezed ones."""
    num_segments: NonNegativeInt | None = None
    """Segments held after the last step."""


class Environment(_Frozen):
    """Where it was seen. Records of different environments are never mixed in silence."""

    gpu: str | None = None
    compute_capability: str | None = None
    num_multiprocessors: int | None = None
    total_bytes: int | None = None
    """What CUDA reports as total."""
    driver: str | None = None
    cuda: str | None = None
    torch: str
    transformers: str
    peft: str | None = None
    bitsandbytes: str | None = None
    accelerate: str | None = None
    trl: str | None = None
    python: str
    system: str
    allocator_config: str = ""
    """`PYTORCH_ALLOC_CONF` or its older name."""

    @property
    def key(self) -> tuple[str | None, ...]:
        """What must be equal for two records of a case to answer the same question."""
        return (self.gpu, self.torch, self.transformers, self.peft, self.bitsandbytes, self.trl, self.allocator_config)


def allocator_config() -> str:
    """The allocator's options of this process, as PyTorch reads them."""
    return os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))


def environment_here(**card: Any) -> Environment:
    """This machine and its libraries; records made here and the search for them agree on it.

    Args:
        card: the fields of `Environment` that say what the card is; none where no card is used.
    """
    return Environment(
        **card,
        torch=package_version("torch") or "",
        transformers=package_version("transformers") or "",
        peft=package_version("peft"),
        bitsandbytes=package_version("bitsandbytes"),
        accelerate=package_version("accelerate"),
        trl=package_version("trl"),
        python=platform.python_version(),
        system=platform.platform(),
        allocator_config=allocator_config(),
    )


def package_version(name: str) -> str | None:
    """Version of an installed package, None without it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class Provenance(_Frozen):
    """Whose record it is, and from when."""

    vramplan: str
    """Version that ran the case."""
    started_at: str
    """UTC, ISO 8601."""
    duration_seconds: float
    step_seconds: float | None = None
    """Wall time of the last step."""
    foreign_before_bytes: int | None = None
    """Used on the card by others before the run; None where the driver does not tell."""
    foreign_after_bytes: int | None = None
    """The same after it."""
    cap_card: str | None = None
    """Card of the catalogue whose memory `case.cap_bytes` is."""
    planned_batch_size: int | None = None
    """Micro-batch that the planner recommended under the cap; 0 where it said that none fits."""
    planned_by_policy: dict[str, int] | None = None
    """The same by policy of the planner; None in records from before there were several."""


# Others' use of the card above this makes device figures worthless.
CONTAMINATION_LIMIT_BYTES = 16 * 2**20


class Record(_Frozen):
    """One case and what came of it."""

    schema_version: Literal[1] = 1
    case_hash: str
    case: Case
    kind: Kind
    outcome: Outcome
    figures: Figures | None = None
    environment: Environment | None = None
    provenance: Provenance
    error: str | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.case_hash != self.case.hash:
            raise ValueError("case_hash: is not the hash of the case")
        if self.kind is Kind.DRY_RUN and self.figures is not None:
            raise ValueError("figures: a dry run has none")
        return self

    @property
    def contaminated(self) -> bool:
        """Whether someone else used the card before or after the run."""
        foreign = (self.provenance.foreign_before_bytes, self.provenance.foreign_after_bytes)
        return any(value is not None and value > CONTAMINATION_LIMIT_BYTES for value in foreign)

    @property
    def is_measurement(self) -> bool:
        """Whether a fit may use it: seen on a card that nobody else was using."""
        return self.kind is Kind.MEASURED and self.outcome in (Outcome.OK, Outcome.OOM) and not self.contaminated


class RecordFile:
    """An append-only JSONL file that survives a kill at any instant: what `append` returned from is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Record) -> None:
        """Writes one record and waits until it is on the disk; several processes may append to one file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = record.model_dump_json(exclude_none=True).encode() + b"\n"
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _drop_torn_tail(file.fileno())
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def __iter__(self) -> Iterator[Record]:
        """All whole records. A last line without its end was never acknowledged and is skipped.

        Raises:
            ValueError: naming the line, if a whole line is no record of this schema.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                if not line.strip():
                    continue
                try:
                    yield Record.model_validate_json(line)
                except ValidationError as error:
                    raise ValueError(f"{self.path}, line {number}: not a record of schema version 1: {error.errors()[0]['msg']}") from error

    def has(self, case: Case, kind: Kind) -> bool:
        """Whether the case has an answer already. Failures and timeouts are none: they are tried again."""
        done = (Outcome.OK, Outcome.OOM)
        return any(record.case_hash == case.hash and record.kind is kind and record.outcome in done for record in self)


def _drop_torn_tail(descriptor: int) -> None:
    """Cuts off what a killed writer left behind the last line end."""
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        chunk = os.pread(descriptor, end - start, start)
        if (at := chunk.rfind(b"\n")) >= 0:
            end = start + at + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
