"""The bundled models: facts and inventories compiled beforehand, so that answering needs no framework and no network."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from estimator.dtypes import DType
from estimator.inventory import Inventory
from estimator.inventory_codec import decode

DIRECTORY = Path(__file__).parent.parent / "data" / "models"
INDEX = "index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """One line of the index."""

    id: str
    file: str
    model_type: str
    model_class: str
    num_parameters: int
    aliases: tuple[str, ...] = ()
    """Other ids of the same model: former names on the Hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The parameter count that others published for a model, and how it agrees."""

    num_parameters: int | None
    source: str | None
    agreement: str | None
    """`exact`, `exact (tied weights counted twice)`, `difference`, or `attributed` (the difference is not accounted for term by term)."""
    differences: Mapping[str, str]
    """What the published count holds beside the parameters: name → number of scalars, as a sum of products of integers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The type of a checkpoint's weights whose config names none."""

    dtype: DType
    source: str
    """Who says so: the sizes of the files over the number of parameters, the storages in them, a model card."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueModel:
    """A bundled model."""

    id: str
    source: str
    """Where the config's values come from."""
    note: str | None
    published: Published
    weights: Weights | None
    """None where the config names the type, or where nothing does."""
    config: Mapping[str, Any]
    """The facts of its config.json that have a bearing on memory."""
    inventory: Inventory


@cache
def entries() -> tuple[CatalogueEntry, ...]:
    """All bundled models, by id."""
    lines = json.loads((DIRECTORY / INDEX).read_bytes())["models"]
    return tuple(CatalogueEntry(**{**line, "aliases": tuple(line.get("aliases", ()))}) for line in lines)


def find(model_id: str) -> CatalogueEntry | None:
    """The entry of an id, in whatever case it is written, as on the Hub; None if the model is not bundled."""
    return _by_id().get(model_id.lower())


@cache
def _by_id() -> dict[str, CatalogueEntry]:
    return {name.lower(): entry for entry in entries() for name in (*entry.aliases, entry.id)}


@lru_cache(maxsize=64)
def load(file: str) -> CatalogueModel:
    """A bundled model.

    Args:
        file: name of a file in the catalogue, as the index has it; never made from an id.
    """
    data = json.loads((DIRECTORY / file).read_bytes())
    published, weights = data["published"], data.get("weights")
    return CatalogueModel(
        id=data["id"],
        source=data["source"],
        note=data["note"],
        published=Published(
            num_parameters=published["num_parameters"],
            source=published["source"],
            agreement=published["agreement"],
            differences=published["differences"],
        ),
        weights=Weights(dtype=DType(weights["dtype"]), source=weights["source"]) if weights is not None else None,
        config=data["config"],
        inventory=decode(data["inventory"]),
    )
