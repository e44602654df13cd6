"""A question with all that was found out about it: what warnings look at."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from app.card import Card
from app.request import Request
from estimator.estimate import Estimate
from estimator.inventory import Inventory
from estimator.phases import Item
from estimator.recipe import Recipe
from estimator.storage import StoredTensor

if TYPE_CHECKING:
    from estimator.sources.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Everything a warning may look at."""

    request: Request
    inventory: Inventory
    recipe: Recipe
    estimate: Estimate
    stored: tuple[StoredTensor, ...]
    """What lies on the device between steps."""
    card: Card | None
    unmodelled: tuple[str, ...]
    """Fields that change this run's memory, and that no formula covers."""
    evaluation: tuple[str, ...]
    """Fields of an evaluation during training; empty without one."""
    has_own_code: bool
    """Whether the model's repository brings code, which is never run."""
    checkpoint: "Checkpoint | None"
    """What the files of a model on the Hub store, where they were looked at."""
    is_stale: bool
    """Whether the config was kept from before, since the Hub does not answer."""
    has_interval: bool
    without_quantization: Estimate | None
    """The same run as plain 16-bit LoRA; None when it was not asked for or is not modelled."""
    with_reentry: Estimate | None
    """The same run of LLM.int8 with reentrant checkpointing; None when it has that already, or nothing to do with it."""

    @cached_property
    def base(self) -> tuple[StoredTensor, ...]:
        """The frozen or full base weights, packed or not."""
        return tuple(tensor for tensor in self.stored if tensor.item is Item.WEIGHTS)

    @cached_property
    def unquantized(self) -> tuple[StoredTensor, ...]:
        return tuple(tensor for tensor in self.base if tensor.quantization is None)

    def peak_bytes(self, *items: Item) -> int:
        """The most that these items take together in any phase [bytes]."""
        return max(sum(line.num_bytes for line in phase.items if line.item in items) for phase in self.estimate.phases)

    def number(self, *names: str) -> int | None:
        """The first of these fields that the model's config has as a whole number."""
        return next((value for name in names if isinstance(value := self.inventory.config.get(name), int)), None)


Rule = Callable[[Answered], Iterable[str]]
"""Yields the sentences of one warning; none where there is nothing to warn of."""
