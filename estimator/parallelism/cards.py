"""The part of a model that lies on one card of a device map, as a model of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from estimator.inventory import Inventory, TensorRow
from estimator.parallelism.placement import card_of, placement
from estimator.patterns import partition
from estimator.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What one card has of the model."""

    number: int
    inventory: Inventory
    """Without the layers of other cards; of the other modules of other cards nothing but their names."""
    holds: str
    """In words."""
    has_head: bool


def cards(inventory: Inventory, recipe: Recipe) -> tuple[Card, ...]:
    """Every card with its part, in order.

    Raises:
        RequestError: if a module is left over when the last card is full.
    """
    placed = placement(inventory, recipe)
    return tuple(_card(inventory, placed, number, recipe.parallel.num_gpus) for number in range(recipe.parallel.num_gpus))


def _card(inventory: Inventory, placed: Mapping[str, int], number: int, num_cards: int) -> Card:
    prefix = f"{inventory.layers_prefix}."
    rows = []
    layers: set[int] = set()
    others: list[str] = []
    for row in inventory.rows:
        for card, indices in partition(row.pattern, row.indices, lambda name: card_of(placed, name)):
            part = replace(row, indices=indices)
            if card == number:
                rows.append(part)
                if row.pattern.startswith(prefix):
                    layers.update(indices[0])
                elif row.leaf == "weight":
                    others.append(row.module_pattern)
            elif not row.pattern.startswith(prefix):
                rows.append(_emptied(part))
    has_head = inventory.output_embedding is not None and card_of(placed, f"{inventory.output_embedding}.weight") == number
    # Logits are made where the head is.
    config = inventory.config if has_head else {**inventory.config, "vocab_size": 1}
    listed = f"layers {min(layers)} to {max(layers)}" if layers else "no layers"
    return Card(
        number=number,
        inventory=replace(
            inventory,
            content_hash=f"{inventory.content_hash}, card {number} of {num_cards}: {sorted(layers)}, {others}",
            rows=tuple(rows),
            config=config,
        ),
        holds=", ".join([listed, *dict.fromkeys(others)]),
        has_head=has_head,
    )


def _emptied(row: TensorRow) -> TensorRow:
    """A tensor that lies elsewhere: the step knows its name, and it takes nothing."""
    return replace(row, shape=(0, *row.shape[1:]))
