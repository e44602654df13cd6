"""Every allocation and release of a run: size, moment, phase, module, operator."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby, pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from estimator.introspect.gradient_sums import ADD_IN_PLACE, sums_in_place
from estimator.introspect.trace.errors import LoopOverTokensError
from estimator.introspect.trace.known import Values
from estimator.phases import Item, Phase, Segment
from estimator.timeline import Allocation, Mark, Timeline

Kernel = Callable[..., Any]

_DEVICE = torch.ops.prim.device.default
_CPU = torch.device("cpu")


def _is_release(event: int) -> bool:
    return event < 0


class Watch(TorchDispatchMode):
    """Sees each storage that an operation returns, until it is freed.

    Runs above FakeTensorMode. What a kernel takes and gives back inside one call is seen only where the kernel is one of ours.

    Args:
        kernels: operations to be answered by something else, see `cuda_paths.KERNELS`.
        values: what is known of the tensors' content.
    """

    def __init__(self, kernels: Mapping[Any, Kernel], values: Values) -> None:
        super().__init__()
        self.kernels = kernels
        self.values = values
        self.phase = ""
        self.allocations: list[Allocation] = []
        self.events: list[int] = []
        """`i` when allocation `i` is made, `~i` when it is released."""
        self.marks: list[Mark] = []
        self.names: list[str] = []
        """Modules running forward, outermost first."""
        self.longest_loop: int | None = None
        """How many operations one call of a module may run; None for any number."""
        self._operations: list[int] = []
        self.deepest = ""
        """The module of the last operation."""
        self._modules_by_node: dict[int, str] = {}
        self._live: dict[int, int] = {}
        self._leaving = False
        self._elsewhere = False
        self._host_scalars = False
        self._foreign: set[int] = set()

    # -- what the caller says -----------------------------------------------------------------------------------------------------------

    def begin(self, phase: str) -> None:
        """What follows belongs to `phase`."""
        self.phase = phase
        self.mark(Segment.OUTSIDE)

    def mark(self, segment: Segment, layer: int = -1) -> None:
        """What follows belongs to one pass of a layer, or to none."""
        self.marks.append(Mark(event=len(self.events), phase=self.phase, segment=segment, layer=layer))

    def leave_layers(self) -> None:
        """The next operation is outside the layers; what is released before it still belongs to the last of them, as with the others."""
        self._leaving = True

    def take_in(self, tensor: torch.Tensor, item: str, name: str) -> None:
        """A tensor that was there before the run: a weight, a buffer, an input."""
        self._see(tensor, "", name, item)

    def call(self, tensor: torch.Tensor, item: str) -> None:
        """Says what a live tensor turned out to be."""
        index = self._live.get(tensor.untyped_storage()._cdata)
        if index is not None:
            self.allocations[index].item = item

    def rename(self, tensor: torch.Tensor, name: str) -> None:
        """Says what a live tensor is called."""
        index = self._live.get(tensor.untyped_storage()._cdata)
        if index is not None:
            self.allocations[index].module = name

    def settle(self) -> None:
        """What is alive now and has no item yet is kept for the backward pass."""
        for index in self._live.values():
            if not self.allocations[index].item:
                self.allocations[index].item = Item.ACTIVATIONS.value

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is made inside lies in memory of another kind."""
        self._elsewhere = True
        try:
            yield
        finally:
            self._elsewhere = False

    @contextmanager
    def host_scalars(self) -> Iterator[None]:
        """`torch.tensor(0.0)` stays on the host: optimizers keep their step counters so."""
        self._host_scalars = True
        try:
            yield
        finally:
            self._host_scalars = False

    def timeline(self, vocabulary: int | None = None, tile_columns: int | None = None) -> Timeline:
        """All that was seen; what nobody named came and went.

        Args:
            vocabulary: from the loss on, tensors of this width are logits.
            tile_columns: and so are matrices of this width, where the loss goes over the vocabulary tile by tile.
        """
        for allocation in self.allocations:
            shape = allocation.shape
            is_wide = (len(shape) > 1 and shape[-1] == vocabulary) or (len(shape) == 2 and shape[-1] == tile_columns)
            if is_wide and allocation.phase in (Phase.LOSS, Phase.BACKWARD) and allocation.item in ("", Item.ACTIVATIONS):
                allocation.item = Item.LOGITS.value
            allocation.item = allocation.item or Item.TEMPORARY.value
        return Timeline(allocations=tuple(self.allocations), events=self._ordered_events(), marks=tuple(self.marks))

    def _ordered_events(self) -> tuple[int, ...]:
        """Releases that follow one another are put in order: when a table of tensors goes, their order is that of their addresses."""
        borders = sorted({mark.event for mark in self.marks} | {len(self.events)})
        ordered: list[int] = []
        for start, end in pairwise([0, *borders]):
            for is_release, events in groupby(self.events[start:end], key=_is_release):
                run = list(events)
                ordered += sorted(run, reverse=True) if is_release else run
        return tuple(ordered)

    def enter(self, module: str) -> None:
        """A module's forward pass begins."""
        self.names.append(module)
        self._operations.append(0)

    def leave(self) -> None:
        """It ends."""
        self.names.pop()
        self._operations.pop()

    # -- what happens -------------------------------------------------------------------------------------------------------------------

    def _see(self, tensor: torch.Tensor, operator: str, module: str, item: str = "") -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._foreign:
            return
        if self._elsewhere or (self._host_scalars and operator == "lift_fresh"):
            self._foreign.add(key)
            weakref.finalize(storage, self._foreign.discard, key)
            return
        num_bytes = storage.nbytes()
        if num_bytes == 0:
            return
        index = len(self.allocations)
        self._live[key] = index
        self.allocations.append(
            Allocation(
                num_bytes=num_bytes,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                operator=operator,
                module=module,
                phase=self.phase,
                item=item,
                source=index,
            )
        )
        self.events.append(index)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        index = self._live.pop(key, None)
        if index is not None:
            self.events.append(~index)

    def _module(self) -> str:
        """The module an operation belongs to: in the backward pass, the one that ran when its node was made."""
        node = torch._C._current_autograd_node()
        if node is None:
            name = self.names[-1] if self.names else ""
            self._modules_by_node[torch.autograd._get_sequence_nr()] = name
            return name
        if self.names:  # recomputed inside the backward pass
            return self.names[-1]
        return self._modules_by_node.get(node._sequence_nr() + 1, "")

    def _count(self) -> None:
        if self._operations:
            self._operations[-1] += 1
            if self.longest_loop is not None and self._operations[-1] > self.longest_loop and not self.values.routing_matters:
                raise LoopOverTokensError(f"one call runs more than {self.longest_loop} operations")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # asked of every fake at every turn
            return _CPU
        kwargs = kwargs or {}
        value = self.values.read(func, args)
        if value is not None:
            return value
        if self._leaving:
            self._leaving = False
            self.mark(Segment.OUTSIDE)
        self.deepest = self.names[-1] if self.names else self.deepest
        if func.namespace == "aten":  # an error must not pass through queries such as `prim.device`
            self._count()
        result = self.values.sized(func, args, kwargs)
        if result is None:
            kernel = ADD_IN_PLACE if sums_in_place(func, args) else self.kernels.get(func, func)
            result = kernel(*args, **kwargs)
        results = [result] if isinstance(result, torch.Tensor) else [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.values.follow(func, args, kwargs, results)
        if results:
            module = self._module()
            operator = func._schema.name.removeprefix("aten::")
            for tensor in results:
                self._see(tensor, operator, module)
        return result
