"""Which storages are alive, and which were when most bytes were."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from estimator.introspect.gradient_sums import ADD_IN_PLACE, sums_in_place

Kernel = Callable[..., Any]


@dataclass(slots=True, eq=False)
class Storage:
    """One storage: who made it and when. The label is set later, when it is known what became of it."""

    num_bytes: int
    """As counted: rounded up to the tracker's granularity [bytes]."""
    shape: tuple[int, ...]
    """Of the first tensor that was seen on it."""
    dtype: torch.dtype
    op: str
    phase: str
    order: int
    """Number of the operation that made it."""
    label: str = "activation"
    """`activation` until the caller knows better: `gradient`, `optimizer_state`."""

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape)) or "scalar"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.num_bytes:>9} B  {dtype:8} {shape:16} {self.label:15} {self.phase:14} #{self.order} {self.op}"


@dataclass(slots=True)
class Peak:
    """The worst instant of one phase."""

    phase: str
    num_bytes: int = 0
    """Live above what was known beforehand [bytes]."""
    op: str = ""
    order: int = 0
    storages: tuple[Storage, ...] = ()

    def by(self, key: Callable[[Storage], object]) -> dict[object, int]:
        """Bytes at the peak grouped by any property of a storage."""
        sums: Counter[object] = Counter()
        for storage in self.storages:
            sums[key(storage)] += storage.num_bytes
        return dict(sums)


@dataclass(slots=True)
class Event:
    """One operation that changed what is alive."""

    order: int
    phase: str
    op: str
    made: tuple[Storage, ...]
    live_bytes: int
    """After the operation, its inputs not yet released [bytes]."""


@dataclass(slots=True)
class _Known:
    """Marks a storage that existed before: parameters, buffers, inputs."""

    num_bytes: int
    label: str


class LiveStorages(TorchDispatchMode):
    """Counts every storage that an operation returns, until it is freed.

    Tensors that autograd functions stash on `ctx` are seen too, unlike by `saved_tensors_hooks`. What a kernel allocates and frees inside
    itself is not: on CUDA that is the kernel's workspace, another term.

    Args:
        granularity_bytes: sizes are rounded up to it; 512 counts as `torch.cuda.memory_allocated` does [bytes].
        kernels: operations to be answered by something else, see `cuda_paths.KERNELS`.
        log: whether to keep every operation that made a storage.
    """

    def __init__(self, *, granularity_bytes: int = 1, kernels: Mapping[Any, Kernel] | None = None, log: bool = False) -> None:
        super().__init__()
        self.granularity_bytes = granularity_bytes
        self.kernels = kernels or {}
        self.log: list[Event] | None = [] if log else None
        self.changes: list[int] | None = [] if log else None
        """Every storage when it is made, and with a minus when it is released, in order [bytes]."""
        self.live_bytes = 0
        self.known_bytes: Counter[str] = Counter()
        self.order = 0
        self.phase = ""
        self.peak = Peak(phase="")
        self.peaks: list[Peak] = []
        self._known: dict[int, _Known] = {}
        self._live: dict[int, Storage] = {}

    def know(self, tensors: Iterable[torch.Tensor], label: str) -> None:
        """Count these storages as `known_bytes[label]` and not as live."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known or storage.nbytes() == 0:
                continue
            known = _Known(self._rounded(storage.nbytes()), label)
            self._known[key] = known
            self.known_bytes[label] += known.num_bytes
            weakref.finalize(storage, self._forget, key)

    def label(self, tensors: Iterable[torch.Tensor], label: str) -> None:
        """Say what live storages turned out to be; snapshots taken before show it too."""
        for tensor in tensors:
            storage = self._live.get(tensor.untyped_storage()._cdata)
            if storage is not None:
                storage.label = label

    def begin(self, phase: str) -> Peak:
        """Start a phase and return its peak, which is filled while it lasts."""
        self.phase = phase
        self.peak = Peak(phase=phase, num_bytes=self.live_bytes, op="(on entry)", order=self.order, storages=self.snapshot())
        self.peaks.append(self.peak)
        return self.peak

    def snapshot(self) -> tuple[Storage, ...]:
        """Everything alive now, oldest first."""
        return tuple(self._live.values())

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self.granularity_bytes) * self.granularity_bytes

    def _forget(self, key: int) -> None:
        known = self._known.pop(key)
        self.known_bytes[known.label] -= known.num_bytes

    def _free(self, key: int) -> None:
        num_bytes = self._live.pop(key).num_bytes
        self.live_bytes -= num_bytes
        if self.changes is not None:
            self.changes.append(-num_bytes)

    def _see(self, tensor: torch.Tensor, op: str) -> Storage | None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._live or storage.nbytes() == 0 or storage.device.type == "meta":
            return None
        seen = Storage(self._rounded(storage.nbytes()), tuple(tensor.shape), tensor.dtype, op, self.phase, self.order)
        self._live[key] = seen
        self.live_bytes += seen.num_bytes
        if self.changes is not None:
            self.changes.append(seen.num_bytes)
        weakref.finalize(storage, self._free, key)
        return seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = ADD_IN_PLACE if sums_in_place(func, args) else self.kernels.get(func, func)
        result = kernel(*args, **(kwargs or {}))
        op = str(func).removeprefix("aten.").removesuffix(".default")
        self.order += 1
        made = tuple(s for t in tree_leaves(result) if isinstance(t, torch.Tensor) and (s := self._see(t, op)))
        if made:
            if self.log is not None:
                self.log.append(Event(self.order, self.phase, op, made, self.live_bytes))
            if self.live_bytes > self.peak.num_bytes:
                self.peak.num_bytes, self.peak.op, self.peak.order = self.live_bytes, op, self.order
                self.peak.storages = self.snapshot()
        return result
