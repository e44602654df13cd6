"""Memory over a grid of micro-batches and lengths, and the largest batch that fits at each length."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from estimator.grid import LARGEST_BYTES, Evaluator, Ints, Sizes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sweep:
    """One row for each micro-batch, one column for each length."""

    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    allocated_bytes: Ints
    """Peaks [bytes]."""
    device_bytes: Ints
    """What the card must hold [bytes]."""
    required_bytes: Ints
    """The same with its margin [bytes]."""

    @property
    def is_in_range(self) -> bool:
        """Whether every point is within what is worked out to the byte."""
        return bool((self.allocated_bytes <= LARGEST_BYTES).all())

    def verdicts(self, usable_bytes: int) -> list[list[str]]:
        """`fits`, `tight` or `does_not_fit` for each point."""
        names = np.array(["does_not_fit", "tight", "fits"], dtype=object)
        kinds = (self.device_bytes <= usable_bytes).astype(np.int64) + (
            (self.required_bytes <= usable_bytes) & (self.device_bytes <= usable_bytes)
        )
        return names[kinds].tolist()  # type: ignore[no-any-return]

    def frontier(self, usable_bytes: int) -> list[int | None]:
        """The largest of the micro-batches that fits at each length."""
        fits = self.required_bytes <= usable_bytes
        largest = np.where(fits, np.array(self.batches)[:, None], 0).max(axis=0)
        return [int(batch) or None for batch in largest]


def sweep(evaluator: Evaluator, batches: Sequence[int], lengths: Sequence[int], *, steps: int, context_bytes: int) -> Sweep:
    """Every micro-batch at every length.

    Args:
        evaluator: of the recipe.
        batches, lengths: of the grid.
        steps: accumulation steps at every point.
        context_bytes: of the card [bytes].
    """
    batch, length = np.meshgrid(np.array(batches, dtype=np.int64), np.array(lengths, dtype=np.int64), indexing="ij")
    memory = evaluator.memory(Sizes.of(batch, length, steps))
    shape = batch.shape
    return Sweep(
        batches=tuple(batches),
        lengths=tuple(lengths),
        allocated_bytes=memory.allocated_bytes.reshape(shape),
        device_bytes=memory.device_bytes(context_bytes).reshape(shape),
        required_bytes=memory.required_bytes(context_bytes).reshape(shape),
    )
