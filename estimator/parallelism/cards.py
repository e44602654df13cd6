"""The part of a model that lies on one card of a device map, as a model of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

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
    borrows_layer: bool
    """Whether it has no layer of its own and counts another card's last one: an adapter needs one to be on."""


@lru_cache(maxsize=256)
def cards(inventory: Inventory, recipe: Recipe) -> tuple[Card, ...]:
    """Every card with its part, in order; kept by recipe, so that callers leave sizes out of it.

    Raises:
        RequestError: if a module is left over when the last card is full.
    """
    placed = placement(inventory, recipe)
    num_cards = recipe.parallel.num_gpus
    return tuple(_card(inventory, placed, number, num_cards, adapted=recipe.adapter is not None) for number in range(num_cards))


def _card(inventory: Inventory, placed: Mapping[str, int], number: int, num_cards: int, *, adapted: bool) -> Card:
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
    borrows = adapted and not layers
    if borrows:
        last = inventory.num_layers - 1
        rows += [
            replace(r, indices=((last,), *r.indices[1:])) for r in inventory.rows if r.pattern.startswith(prefix) and last in r.indices[0]
        ]
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
        borrows_layer=borrows,
    )


def _emptied(row: TensorRow) -> TensorRow:
    """A tensor that lies elsewhere: the step knows its name, and it takes nothing."""
    return replace(row, shape=(0, *row.shape[1:]))
