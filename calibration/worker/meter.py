"""Reads the allocator at the borders between phases."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from calibration.record import Figures, PhasePeak

BACKWARD_HEAD = "backward_head"
BACKWARD_LAYERS = "backward_layers"
# Each takes some KB of the host's memory; a step of the largest models makes some ten thousand.
_MOST_ENTRIES = 1_000_000
_PHASES = ("forward", "loss", "backward", "optimizer_step", "prefill", "decode")


class Meter(Protocol):
    """What a run tells: where it is."""

    def loaded(self, model: torch.nn.Module) -> None:
        """The model and its adapters stand."""

    def begin_step(self) -> None:
        """An optimizer step begins, or a call of `generate`."""

    def close(self, span: str) -> None:
        """A span ends here, and the next one begins."""

    def figures(self) -> Figures | None:
        """What was seen so far."""


@contextmanager
def recorded(path: Path | None, complain: Callable[[str], None]) -> Iterator[None]:
    """Keeps the allocator's history and writes it at the end, whatever the end is; a file that pytorch.org/memory_viz opens.

    Args:
        path: of the file; nothing is kept if None.
        complain: told why nothing could be written; the run is worth more than its history, and so is the reason why it failed.

    Source: torch 2.13, cuda/memory.py, _record_memory_history and _dump_snapshot.
    """
    if path is None:
        yield
        return
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=_MOST_ENTRIES)
    try:
        yield
    finally:
        try:
            torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
        except Exception as error:
            complain(f"the allocator's history could not be written to {path}: {error}")
        torch.cuda.memory._record_memory_history(enabled=None)


class SilentMeter:
    """On the CPU there is nothing to read."""

    def loaded(self, model: torch.nn.Module) -> None:
        pass

    def begin_step(self) -> None:
        pass

    def close(self, span: str) -> None:
        pass

    def figures(self) -> Figures | None:
        return None


@dataclass
class _Spans:
    """Largest allocated and reserved bytes by span."""

    allocated: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)

    def note(self, span: str, allocated: int, reserved: int) -> None:
        self.allocated[span] = max(allocated, self.allocated.get(span, 0))
        self.reserved[span] = max(reserved, self.reserved.get(span, 0))

    def peak(self, spans: list[str]) -> PhasePeak | None:
        seen = [span for span in spans if span in self.allocated]
        if not seen:
            return None
        return PhasePeak(
            allocated_bytes=max(self.allocated[span] for span in seen), reserved_bytes=max(self.reserved[span] for span in seen)
        )


class CudaMeter:
    """Peaks by span of the step that runs now; reading one resets torch's own counters."""

    def __init__(self, foreign_bytes: int, cap_bytes: int | None = None, *, is_training: bool = True) -> None:
        """Creates the CUDA context.

        Args:
            foreign_bytes: what others used on the card before this process came [bytes].
            cap_bytes: what this process may have of the card, context and libraries included; None for all of it [bytes].
            is_training: whether a trainer runs, which gives back what loading left in the allocator's cache.
        """
        self._is_training = is_training
        self._foreign_bytes = foreign_bytes
        self._cap_bytes = cap_bytes
        self._num_updates = 0
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        self._context_bytes = self._own_device_bytes() - torch.cuda.memory_reserved()
        self._load = _Spans()
        self._step = _Spans()
        self._run_allocated_bytes = 0
        self._loaded_bytes: int | None = None
        self._steady_bytes: int | None = None
        self._num_parameters: int | None = None
        self._num_trainable: int | None = None
        self._hold_to_cap()
        torch.cuda.reset_peak_memory_stats()

    def loaded(self, model: torch.nn.Module) -> None:
        self._read("load", self._load)
        if self._is_training:
            torch.cuda.empty_cache()  # it starts from segments in use, not from what quantization left behind
        self._loaded_bytes = torch.cuda.memory_allocated()
        self._num_parameters, self._num_trainable = count_parameters(model)
        self._hold_to_cap()
        torch.cuda.reset_peak_memory_stats()

    def begin_step(self) -> None:
        torch.cuda.synchronize()
        self._run_allocated_bytes = max(self._run_allocated_bytes, torch.cuda.max_memory_allocated())
        self._step = _Spans()
        self._steady_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def close(self, span: str) -> None:
        self._read(span, self._step)
        self._num_updates += span == "optimizer_step"
        self._hold_to_cap()

    def figures(self) -> Figures | None:
        if self._loaded_bytes is None:
            self._read("load", self._load)
        else:
            # what ran since the last border, so that an out-of-memory ending shows how far it came
            self._run_allocated_bytes = max(self._run_allocated_bytes, torch.cuda.max_memory_allocated())
        phases = {"load": self._load.peak(["load"])}
        for phase in _PHASES:
            spans = [phase, BACKWARD_HEAD, BACKWARD_LAYERS] if phase == "backward" else [phase]
            phases[phase] = self._step.peak(spans)
        whole = self._step.peak(list(self._step.allocated))
        statistics = torch.cuda.memory_stats()
        return Figures(
            context_bytes=max(0, self._context_bytes),
            loaded_bytes=self._loaded_bytes,
            steady_state_bytes=self._steady_bytes,
            phases={phase: peak for phase, peak in phases.items() if peak is not None},
            backward_head_bytes=self._step.allocated.get(BACKWARD_HEAD),
            backward_layers_bytes=self._step.allocated.get(BACKWARD_LAYERS),
            peak_allocated_bytes=whole.allocated_bytes if whole else None,
            peak_reserved_bytes=whole.reserved_bytes if whole else None,
            run_allocated_bytes=self._run_allocated_bytes or None,
            device_bytes=max(0, self._own_device_bytes()),
            num_parameters=self._num_parameters,
            num_trainable=self._num_trainable,
            num_allocation_retries=statistics.get("num_alloc_retries"),
            num_segments=statistics.get("segment.all.current"),
        )

    def _own_device_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free - self._foreign_bytes

    def _hold_to_cap(self) -> None:
        """Lets the allocator have what context and libraries, as far as they are loaded, leave of the cap.

        Until the first update: from then on managed memory of paged optimizers lies outside the allocator too, and a card that is really
        full would push it out.
        """
        if self._cap_bytes is None or self._num_updates:
            return
        total = torch.cuda.mem_get_info()[1]
        outside = max(0, self._own_device_bytes() - torch.cuda.memory_reserved())
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, self._cap_bytes - outside) / total))

    def _read(self, span: str, spans: _Spans) -> None:
        torch.cuda.synchronize()
        allocated = torch.cuda.max_memory_allocated()
        spans.note(span, allocated, torch.cuda.max_memory_reserved())
        self._run_allocated_bytes = max(self._run_allocated_bytes, allocated)
        torch.cuda.reset_peak_memory_stats()


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Logical scalars of a model and how many of them are trained; packed 4-bit weights count unpacked."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return total, trainable
