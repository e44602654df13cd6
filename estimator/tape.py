"""A training step on tensors that have a size but no content: what autograd keeps, when it lets go, and the worst instant.

Blocks (`estimator.blocks`) are written as transformers writes them, on `Value`s. Every operator allocates its result, says what it saves
for the backward pass, and how its gradients come about; lifetimes are Python's own reference counts, as they are in PyTorch. The tape adds
up what is alive and keeps the instants at which it can be largest. Sizes stay polynomials in batch and sequence length, so that one run of
the tape answers for every batch and length. Where attention looks back at a cache, the number of keys is a third variable.

Legend: B micro-batch, S sequence length (of the queries), K keys that attention looks at.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import ge, le
from sys import _getframe, getrefcount
from types import FrameType
from weakref import ReferenceType, ref

from estimator.dtypes import DType
from estimator.extent import POWER_INDEX, POWERS, Extent, Snapshot
from estimator.kernels import Kernel
from estimator.log import Log
from estimator.phases import Item, Phase

Held = tuple[Item, Extent]


class Storage:
    """Memory of one tensor (or of several views of it); it is free when the last reference goes."""

    __slots__ = ("item", "number", "size", "tape")

    def __init__(self, tape: "Tape", size: Extent, item: Item) -> None:
        self.tape = tape
        self.size = size
        self.item = item
        self.number = -1
        if tape.log is None:
            tape.grow(item, size)
        else:
            self.number = tape.log.make(size)

    def __del__(self) -> None:
        log = self.tape.log
        if log is None:
            self.tape.shrink(self.item, self.size)
        else:
            log.release(self.number)

    def relabel(self, item: Item) -> None:
        if item is not self.item:
            if self.tape.log is None:
                self.tape.move(self.item, item, self.size)
            self.item = item


class Value:
    """A tensor: how many elements of which type, on which storage, made by which node."""

    __slots__ = ("dtype", "extent", "has_base", "node", "storage", "tape")

    def __init__(self, tape: "Tape", extent: Extent, dtype: DType, storage: Storage | None, node: "Node | Leaf | None" = None) -> None:
        self.tape = tape
        # Whether a gradient is a view that keeps the tensor it looks at alive.
        self.has_base = False
        self.extent = extent
        self.dtype = dtype
        self.storage = storage
        self.node = node

    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    def view(self, extent: Extent | None = None) -> "Value":
        """The same storage seen as a leaf without history (a gradient passed on, a detached tensor)."""
        same = Value(self.tape, extent or self.extent, self.dtype, self.storage)
        same.has_base = self.has_base
        return same

    def reshaped(self) -> "Value":
        """This gradient seen in another shape: as autograd's own views do, it keeps what it looks at alive, so that no other gradient is
        added into it.

        Source: torch, csrc/autograd/variable.h, DifferentiableViewMeta (`base_`).
        """
        same = self.view()
        same.has_base = True
        return same


class Parameter(Value):
    """A stored tensor of the model: its own memory is counted elsewhere, its gradient here."""

    __slots__ = ("name",)

    def __init__(self, tape: "Tape", name: str, count: int, dtype: DType, trainable: bool) -> None:
        super().__init__(tape, Extent(count), dtype, None)
        self.name = name
        if trainable:
            self.node = AccumulateGrad(self)


Gradients = Sequence[Value | None]
Backward = Callable[["Node", Value], Gradients]


class Node:
    """A step of the backward pass: what it saved, what it leads to."""

    __slots__ = ("backward", "collects", "inputs", "saved", "sequence", "stash")

    def __init__(self, sequence: int, inputs: Sequence[Value], saved: "Sequence[Value | Recomputable]", backward: Backward) -> None:
        self.sequence = sequence
        # Whether the node has several outputs, whose gradients wait side by side instead of being summed.
        self.collects = False
        # (node, extent, type) of every input: gradients are summed to its extent and cast to its type.
        self.inputs = tuple((v.node, v.extent, v.dtype) for v in inputs)
        self.saved = saved
        self.backward = backward
        # What a Python autograd function hangs on its context: out of reach of checkpointing, and freed only with the graph.
        self.stash: Sequence[Value] = ()

    def unpacked(self) -> list[Value]:
        """The saved tensors; the first look into a checkpointed layer computes the layer again."""
        return [s.unpack() if isinstance(s, Recomputable) else s for s in self.saved]


class Leaf:
    """Where a gradient arrives and goes no further."""

    __slots__ = ("name",)
    name: str


class AccumulateGrad(Leaf):
    """Where the gradient of a parameter arrives."""

    __slots__ = ("count", "dtype", "tape")

    def __init__(self, parameter: Parameter) -> None:
        self.tape = parameter.tape
        self.name = parameter.name
        self.dtype = parameter.dtype
        self.count = parameter.extent.coefficient

    def receive(self, gradient: Value) -> None:
        """The first gradient of a step is taken over as it is, a later one is added in place."""
        tape = self.tape
        if tape.accumulating or self.name in tape.gradients:
            return
        assert gradient.storage is not None
        gradient.storage.relabel(Item.GRADIENTS)
        tape.gradients[self.name] = gradient


class StopRecomputation(Exception):
    """Everything the backward pass will ask for has been computed again."""


class CheckpointFrame:
    """One checkpointed call (non-reentrant): saved tensors are dropped, and made again at the first look.

    Source: torch, utils/checkpoint.py, _checkpoint_without_reentrant_generator and _checkpoint_hook.
    """

    __slots__ = ("argument", "function", "holders", "next_index", "recomputed", "tape")

    def __init__(self, tape: "Tape", function: "Callable[[Value], Value]", argument: Value) -> None:
        self.tape = tape
        self.function = function
        self.argument = argument
        # What the forward pass saved, in order; entries die with graphs that lead nowhere.
        self.holders: list[ReferenceType[Recomputable]] = []
        self.next_index = 0
        self.recomputed: dict[int, Value] | None = None

    def recompute(self) -> None:
        self.recomputed = {}
        self.next_index = 0
        tape = self.tape
        outer, tape.frame = tape.frame, self
        try:
            with tape.autocasting(), tape.recording():
                self.function(self.argument)
        except StopRecomputation:
            pass
        finally:
            tape.frame = outer


class Recomputable:
    """A saved tensor of a checkpointed layer."""

    __slots__ = ("__weakref__", "frame", "index")

    def __init__(self, frame: CheckpointFrame, index: int) -> None:
        self.frame = frame
        self.index = index

    def unpack(self) -> Value:
        if self.frame.recomputed is None:
            self.frame.recompute()
        assert self.frame.recomputed is not None
        return self.frame.recomputed.pop(self.index)


class Tape:
    """Adds up what is alive, keeps the instants that can be the peak, and runs the backward pass."""

    def __init__(
        self,
        *,
        autocast_dtype: DType | None = None,
        accumulating: bool = False,
        cuda_kernels: bool = True,
        names: bool = False,
        training: bool = True,
        keeps_layer_inputs: bool = False,
        log: Log | None = None,
    ) -> None:
        self.log = log
        """Where storages are written down one by one, instead of added up."""
        self.autocast_dtype = autocast_dtype
        self.accumulating = accumulating
        """Gradients of an earlier micro-batch exist already and are counted elsewhere."""
        self.cuda_kernels = cuda_kernels
        """Whether CUDA's kernels run: chosen by the card, with memory of their own inside a call. Without it the program is the CPU's,
        for comparison."""
        self.names = names
        """Whether tensors carry the name of their module and operator, for explanations."""
        self.training = training
        """`module.training`: whether there is dropout."""
        self.keeps_layer_inputs = keeps_layer_inputs
        """Whether a hook holds on to inputs of reentrant checkpoints, and with them to their gradients, while the backward pass lasts."""
        self.hooked: list[Value] = []
        """What such hooks hold."""
        self.few_rows = False
        """Whether the batch is small enough for kernels that multiply by 4-bit weights as they are."""
        self.one_sequence = False
        """Whether there is one sequence, whose heads lie in memory as products one by one take them."""
        self.scope = ""
        """The module that is running."""
        self.kernels: set[Kernel] = set()
        """Which kernels ran."""
        self.autocast_enabled = False
        self.autocast_cache: dict[str, Value] = {}
        self.grad_enabled = False
        self.frame: CheckpointFrame | None = None
        self.gradients: dict[str, Value] = {}
        self.stashed: dict[int, Held] = {}
        """What autograd functions hung on their contexts since the last `take_stash`."""
        self.leaving_autocast: list[tuple[Item, Extent, int]] = []
        """Cached casts that stand for layers not run one by one."""
        self.live: Counter[Held] = Counter()
        self.totals = [0] * len(POWERS)
        self.peaks: dict[Phase, list[Snapshot]] = {}
        self.phase = Phase.FORWARD
        self.recast: dict[str, DType] = {}
        """Stored tensors that a forward pass gives another type for good, by name pattern."""
        self._rising = False
        self.sequence = 0
        """Number of the last node."""

    # -- what is alive ------------------------------------------------------------------------------------------------------------

    def grow(self, item: Item, size: Extent, number: int = 1) -> None:
        self.live[item, size] += number
        self._count(size, number)
        self._rising = True

    def shrink(self, item: Item, size: Extent, number: int = 1) -> None:
        if self._rising:
            self.note_peak()
        self._count(size, -number)
        left = self.live[item, size] - number
        if left:
            self.live[item, size] = left
        else:
            del self.live[item, size]

    def _count(self, size: Extent, number: int) -> None:
        _, batch, sequence, _, keys, offset, shift = size
        self.totals[POWER_INDEX[batch, sequence, keys]] += number * size.coefficient
        if offset:
            self.totals[POWER_INDEX[batch, sequence, 0]] += number * size.coefficient * offset
        if shift:
            self.totals[POWER_INDEX[batch, 0, keys]] += number * size.coefficient * shift

    def move(self, source: Item, target: Item, size: Extent) -> None:
        """A storage changes its name, not its size."""
        left = self.live[source, size] - 1
        if left:
            self.live[source, size] = left
        else:
            del self.live[source, size]
        self.live[target, size] += 1

    def note_peak(self) -> None:
        """Keep this instant unless one already kept is larger for every batch and length; drop those that it beats."""
        self._rising = False
        totals = tuple(self.totals)
        kept = self.peaks.setdefault(self.phase, [])
        if any(all(map(ge, other.totals, totals)) for other in kept):
            return
        kept[:] = [other for other in kept if not all(map(le, other.totals, totals))]
        kept.append(Snapshot(totals, tuple(self.live.items())))

    def enter(self, phase: Phase) -> None:
        """What follows belongs to `phase`."""
        if self.log is not None and phase is Phase.BACKWARD:
            self.log.begin_backward()
        self.note_peak()
        self.phase = phase
        self._rising = True

    # -- making values and nodes --------------------------------------------------------------------------------------------------

    def new(self, extent: Extent, dtype: DType, item: Item = Item.TEMPORARY) -> Value:
        """A fresh tensor."""
        size = extent.scaled(dtype.itemsize, label=f"{self.scope} {_operator()}".strip() if self.names else "")
        return Value(self, extent, dtype, Storage(self, size, item))

    def workspace(self, extent: Extent, dtype: DType) -> Value | None:
        """Memory a CUDA kernel takes for the length of one call."""
        return self.new(extent, dtype) if self.cuda_kernels else None

    def node(self, inputs: Sequence[Value], backward: Backward, saved: Sequence[Value] = ()) -> Node | None:
        """A node, if anything that leads here is trained. Called before the result is made, as autograd saves inputs before it runs an
        operator."""
        if not self.grad_enabled or all(v.node is None for v in inputs):
            return None
        self.sequence += 1
        return Node(self.sequence, inputs, [self.pack(v) for v in saved], backward)

    def save_output(self, node: Node | None, output: Value) -> None:
        """Save a result after the operator ran."""
        if node is not None:
            node.saved = [*node.saved, self.pack(output.view())]

    def pack(self, value: Value) -> "Value | Recomputable":
        frame = self.frame
        if frame is None:
            if value.storage is not None and value.storage.item is Item.TEMPORARY:
                value.storage.relabel(Item.ACTIVATIONS)
            return value.view()
        index = frame.next_index
        frame.next_index += 1
        if frame.recomputed is None:
            holder = Recomputable(frame, index)
            frame.holders.append(ref(holder))
            return holder
        if frame.holders[index]() is not None:
            frame.recomputed[index] = value.view()
            if value.storage is not None and value.storage.item is Item.TEMPORARY:
                value.storage.relabel(Item.ACTIVATIONS)
        if frame.next_index == len(frame.holders):
            raise StopRecomputation
        return value.view()  # the second graph lives until the recomputation stops

    def take_stash(self) -> tuple[tuple[Held, int], ...]:
        """What autograd functions hung on their contexts since the last call."""
        taken, self.stashed = self.stashed, {}
        return tuple(Counter(taken.values()).items())

    def stash(self, node: Node, values: Sequence[Value]) -> None:
        """Hang values on the context of an autograd function: they stay until the graph goes."""
        node.stash = tuple(v.view() for v in values)
        is_recomputing = self.frame is not None and self.frame.recomputed is not None
        for v in values:
            assert v.storage is not None
            if v.storage.item is Item.TEMPORARY:
                v.storage.relabel(Item.ACTIVATIONS)
            if not is_recomputing:
                self.stashed[id(v.storage)] = (v.storage.item, v.storage.size)

    # -- modes --------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def autocasting(self) -> Iterator[None]:
        """torch.autocast: on leaving it, the cached casts of trainable weights go."""
        if self.autocast_dtype is None or self.autocast_enabled:
            yield
            return
        self.autocast_enabled = True
        try:
            yield
        finally:
            self.autocast_enabled = False
            self.autocast_cache = {}
            for item, size, number in self.leaving_autocast:
                self.shrink(item, size, number)
            self.leaving_autocast = []

    @contextmanager
    def recording(self, enabled: bool = True) -> Iterator[None]:
        """torch.enable_grad, or torch.no_grad."""
        before, self.grad_enabled = self.grad_enabled, enabled
        try:
            yield
        finally:
            self.grad_enabled = before

    def checkpoint(self, function: "Callable[[Value], Value]", argument: Value, use_reentrant: bool) -> Value:
        """torch.utils.checkpoint of a call with one tensor argument."""
        if argument.storage is not None:
            argument.storage.relabel(Item.CHECKPOINTS)
        return self._reentrant(function, argument) if use_reentrant else self._non_reentrant(function, argument)

    def _non_reentrant(self, function: "Callable[[Value], Value]", argument: Value) -> Value:
        outer, self.frame = self.frame, CheckpointFrame(self, function, argument)
        try:
            return function(argument)
        finally:
            self.frame = outer

    def _reentrant(self, function: "Callable[[Value], Value]", argument: Value) -> Value:
        """Source: torch, utils/checkpoint.py, CheckpointFunction."""

        def backward(node: Node, gradient: Value) -> Gradients:
            (saved,) = node.unpacked()
            detached = saved.view()
            arrived = _Arrival()
            detached.node = arrived
            with self.autocasting(), self.recording():
                output = function(detached)
            assert isinstance(output.node, Node)
            self.backward(output.node, gradient)
            if self.keeps_layer_inputs:
                self.hooked += [value for value in (detached, arrived.gradient) if value is not None]
            return [arrived.gradient]

        node = self.node([argument], backward, [argument])
        with self.recording(False):
            output = function(argument)
        return Value(self, output.extent, output.dtype, output.storage, node)

    # -- the backward pass --------------------------------------------------------------------------------------------------------

    def backward(self, root: Node, gradient: Value) -> None:
        """Run all nodes that lead from `root`, youngest first.

        Source: torch, autograd/engine.cpp, evaluate_function, and input_buffer.cpp, accumulate.
        """
        waiting = _dependencies(root)
        buffers: dict[Node | str, Value] = {root: gradient}
        collected: dict[Node, list[Value]] = {}
        del gradient
        ready = [(-root.sequence, 0, root)]
        ties = 0
        while ready:
            _, _, node = heapq.heappop(ready)
            if self.log is not None:
                self.log.visit(node.sequence)
            gradient = buffers.pop(node)
            results = list(node.backward(node, gradient))
            for position, (following, extent, dtype) in enumerate(node.inputs):
                results[position] = None if following is None else self._fitted(results[position], extent, dtype)
            del gradient
            collected.pop(node, None)
            node.saved = ()
            edges = [edge[0] for edge in node.inputs]
            while results:
                # Popped, so that no name here keeps a gradient alive through the next node.
                self._deliver(edges.pop(0), results.pop(0), buffers, collected)
            for following, _, _ in node.inputs:
                key = _key(following)
                if key is None:
                    continue
                waiting[key] -= 1
                if waiting[key]:
                    continue
                if isinstance(following, AccumulateGrad) and following.name in buffers:
                    following.receive(buffers.pop(following.name))
                elif isinstance(following, Node):
                    ties += 1
                    heapq.heappush(ready, (-following.sequence, ties, following))

    def _deliver(
        self,
        following: "Node | Leaf | None",
        gradient: Value | None,
        buffers: "dict[Node | str, Value]",
        collected: dict[Node, list[Value]],
    ) -> None:
        if gradient is None or following is None:
            return
        match following:
            case AccumulateGrad():
                _accumulate(self, buffers, following.name, gradient)
            case _Arrival():
                following.add(self, gradient)
            case Node() if following.collects:
                collected.setdefault(following, []).append(gradient)
                buffers.setdefault(following, gradient)
            case Node():
                _accumulate(self, buffers, following, gradient)

    def _fitted(self, gradient: Value | None, extent: Extent, dtype: DType) -> Value | None:
        """A gradient summed over broadcast dimensions and cast to its input's type.

        Source: torch, autograd/engine.cpp, validate_outputs.
        """
        if gradient is None:
            return None
        if gradient.extent != extent:
            gradient = self.new(extent, gradient.dtype)
        return gradient if gradient.dtype is dtype else self.new(extent, dtype)


def _operator() -> str:
    """Name of the operator that asks for a tensor: the nearest caller of `Tape.new` that is not one of its helpers."""
    frame: FrameType | None = _getframe(2)
    while frame is not None and frame.f_code.co_name.startswith(("_", "<")):
        frame = frame.f_back
    return frame.f_code.co_name if frame is not None else ""


class _Arrival(Leaf):
    """The detached input of a reentrant checkpoint: its gradient is handed back to the outer pass."""

    __slots__ = ("gradient",)

    def __init__(self) -> None:
        self.name = "(input of a checkpoint)"
        self.gradient: Value | None = None

    def add(self, tape: Tape, gradient: Value | None) -> None:
        if self.gradient is None:
            self.gradient = gradient
        elif gradient is not None:
            self.gradient = _sum(tape, self.gradient, gradient)


def _key(following: "Node | Leaf | None") -> "Node | str | None":
    """What gradients wait under: a node, or the name of a parameter, which every use of it leads to."""
    return following.name if isinstance(following, AccumulateGrad) else following if isinstance(following, Node) else None


def _dependencies(root: Node) -> dict[Node | str, int]:
    """How many gradients each node and each parameter waits for."""
    waiting: dict[Node | str, int] = {}
    stack = [root]
    seen = {root}
    while stack:
        for following, _, _ in stack.pop().inputs:
            key = _key(following)
            if key is None:
                continue
            waiting[key] = waiting.get(key, 0) + 1
            if isinstance(following, Node) and following not in seen:
                seen.add(following)
                stack.append(following)
    return waiting


def _accumulate(tape: Tape, buffers: dict[Node | str, Value], node: Node | str, gradient: Value) -> None:
    if node in buffers:
        buffers[node] = _sum(tape, buffers.pop(node), gradient)
    else:
        buffers[node] = gradient


def _sum(tape: Tape, first: Value, second: Value) -> Value:
    """In place of the first where nobody else holds it, else a third tensor.

    Source: torch, csrc/autograd/input_buffer.cpp, can_accumulate_inplace and accumulate.
    """
    # Two references: the attribute of this Value, and getrefcount's own argument.
    if first.storage is not None and not first.has_base and getrefcount(first.storage) <= 2:
        return first
    return tape.new(first.extent, first.dtype)
