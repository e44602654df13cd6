"""What a step makes and releases, written down storage by storage."""

from bisect import bisect_right
from dataclasses import dataclass

from estimator.extent import Extent
from estimator.phases import Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Where a slice begins."""

    segment: Segment
    layer: int
    """-1 outside the layers."""
    event: int
    storage: int


class Log:
    """Every storage in the order in which it is made and released, in slices: layers forward, layers backward, and what lies between."""

    __slots__ = ("_ends", "_layers", "_starts", "backward", "events", "marks", "sizes")

    def __init__(self) -> None:
        self.backward = 0
        """Index of the event at which the backward pass begins."""
        self.sizes: list[Extent] = []
        self.events: list[int] = []
        """`i` when storage `i` is made, `~i` when it is released."""
        self.marks: list[Mark] = []
        self._layers: list[int] = []
        self._starts: list[int] = []
        self._ends = 0
        self._mark(Segment.OUTSIDE)

    def make(self, size: Extent) -> int:
        number = len(self.sizes)
        self.sizes.append(size)
        self.events.append(number)
        return number

    def release(self, number: int) -> None:
        self.events.append(~number)

    def enter_layer(self, layer: int, sequence: int) -> None:
        """The forward pass of a layer begins; `sequence` is the number of the last autograd node before it."""
        self._layers.append(layer)
        self._starts.append(sequence)
        self._mark(Segment.FORWARD, layer)

    def leave_layers(self, sequence: int) -> None:
        """All layers have run; `sequence` is the number of the last autograd node."""
        self._ends = sequence
        self._mark(Segment.OUTSIDE)

    def begin_backward(self) -> None:
        self.backward = len(self.events)
        self._mark(Segment.OUTSIDE)

    def visit(self, sequence: int) -> None:
        """The backward pass comes to an autograd node. Those of the head, and of layers that are recomputed, lie where the pass is."""
        if sequence > self._ends:
            return
        at = bisect_right(self._starts, sequence - 1) - 1
        segment, layer = (Segment.OUTSIDE, -1) if at < 0 else (Segment.BACKWARD, self._layers[at])
        if (self.marks[-1].segment, self.marks[-1].layer) != (segment, layer):
            self._mark(segment, layer)

    def _mark(self, segment: Segment, layer: int = -1) -> None:
        self.marks.append(Mark(segment=segment, layer=layer, event=len(self.events), storage=len(self.sizes)))
