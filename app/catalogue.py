"""What can be named: models, their tensors, and GPUs."""

from collections.abc import Mapping
from typing import Any

from app.answer import Json
from estimator.gpus import all_gpus
from estimator.inventory import Inventory
from estimator.sources import catalogue
from estimator.sources.resolve import resolve


def list_models(text: str | None = None) -> list[Json]:
    """The bundled models whose id or type contains `text`."""
    wanted = (text or "").lower()
    return [
        {"id": entry.id, "model_type": entry.model_type, "model_class": entry.model_class, "num_parameters": entry.num_parameters}
        for entry in catalogue.entries()
        if wanted in entry.id.lower() or wanted in entry.model_type.lower()
    ]


def list_gpus() -> list[Json]:
    """The cards that are known by name."""
    return [
        {
            "id": gpu.id,
            "name": gpu.name,
            "capacity_bytes": gpu.capacity_bytes,
            "capacity_basis": gpu.capacity_basis,
            "compute_capability": ".".join(map(str, gpu.compute_capability)),
            "bf16": gpu.bf16,
        }
        for gpu in all_gpus()
    ]


def inspect_model(model: str | Mapping[str, Any], revision: str | None = None) -> Json:
    """Every tensor of a model."""
    found = resolve(model, revision)
    inventory = found.inventory
    return {
        "schema_version": 1,
        "model": {
            "id": found.id,
            "revision": found.revision,
            "model_type": inventory.model_type,
            "source": found.source.value,
            "num_parameters": inventory.num_parameters,
        },
        "model_class": inventory.model_class,
        "num_layers": inventory.num_layers,
        "checkpoint_dtype": inventory.checkpoint_dtype.value if inventory.checkpoint_dtype is not None else None,
        "attn_implementations": list(inventory.supported_attention),
        "tensors": _tensors(inventory),
    }


def _tensors(inventory: Inventory) -> list[Json]:
    return [
        {
            "name": row.pattern,
            "shape": list(row.shape),
            "copies": row.num_copies,
            "num_parameters": row.num_copies * row.num_elements,
            "role": row.role.value,
            "module_kind": row.module_kind.value,
            "module_class": row.module_class,
            "tied_to": row.tied_to,
        }
        for row in inventory.rows
    ]
