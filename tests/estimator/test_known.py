"""Values that a traced program looks at: what is known of them, and when it no longer is."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from estimator.introspect.trace.errors import NeedsValuesError
from estimator.introspect.trace.known import Values
from estimator.introspect.trace.routing import Routing
from estimator.introspect.trace.watch import Watch

Write = Callable[[torch.Tensor, torch.Tensor], object]


def read_after(write: Write, known: list[float] | None) -> float:
    """The first of four known numbers after two of them are written to through a view.

    Args:
        known: what is written; None for values that are not known.
    """
    with FakeTensorMode():
        watch = Watch({}, Values(Routing.BALANCED))
        watch.begin("given")
        weights = torch.empty(2)
        watch.take_in(weights, "weights", "")
        with watch:
            watch.begin("forward")
            numbers = torch.arange(4.0)
            write(numbers[:2], weights if known is None else torch.tensor(known))
            return numbers[0].item()


def test_what_is_written_through_a_view_is_read_from_its_base() -> None:
    real = torch.arange(4.0)
    real[:2].copy_(torch.tensor([5.0, 6.0]))
    assert read_after(torch.Tensor.copy_, [5.0, 6.0]) == real[0].item()


@pytest.mark.parametrize(
    "write",
    [
        torch.Tensor.copy_,
        lambda view, unknown: torch.add(unknown, 1.0, out=view),
        lambda view, unknown: torch._foreach_add_([view], [unknown]),
    ],
    ids=["in place", "out", "several"],
)
def test_unknown_values_written_through_a_view_leave_nothing_known_of_its_base(write: Write) -> None:
    with pytest.raises(NeedsValuesError):
        read_after(write, None)
