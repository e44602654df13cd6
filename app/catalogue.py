"""What can be named: models, their tensors, and GPUs."""

from collections.abc import Mapping
from typing import Any

from app.answer import Json
from app.prices import current
from estimator.errors import UnknownNameError
from estimator.gpu_filter import GpuFilter, matching
from estimator.gpus import Gpu
from estimator.inventory import Inventory
from estimator.offers import Offer
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


def list_gpus(wanted: GpuFilter | None = None, sort: str = "catalogue") -> list[Json]:
    """The cards that are known by name, or those that a filter lets through.

    Args:
        wanted: which cards, and how many of them in one machine; offers are those it looks at.
        sort: one of `SORTS`.

    Raises:
        UnknownNameError: if there is no such order.
    """
    if sort not in SORTS:
        raise UnknownNameError.of("sort", sort, SORTS)
    wanted = wanted or GpuFilter(book=current())
    gpus = list(matching(wanted))
    match sort:
        case "memory":
            gpus.sort(key=lambda gpu: gpu.capacity_bytes)
        case "bandwidth":
            gpus.sort(key=lambda gpu: -(gpu.memory_bandwidth or 0))
        case "price":
            gpus.sort(key=lambda gpu: _lowest(gpu, wanted))
    return [_gpu(gpu, wanted) for gpu in gpus]


SORTS = ("catalogue", "memory", "price", "bandwidth")


def _lowest(gpu: Gpu, wanted: GpuFilter) -> float:
    """What one hour of the cheapest machine costs; cards without a price come last [USD]."""
    return min((offer.usd_per_hour_min for offer in _offers(gpu, wanted) if offer.usd_per_hour_max), default=float("inf"))


def _offers(gpu: Gpu, wanted: GpuFilter) -> list[Offer]:
    return [
        offer
        for offer in wanted.book.of(gpu.id)
        if offer.count in wanted.count
        and offer.usd_per_hour_min in wanted.usd_per_hour
        and (not wanted.providers or offer.provider in wanted.providers)
    ]


def _gpu(gpu: Gpu, wanted: GpuFilter) -> Json:
    return {
        "id": gpu.id,
        "name": gpu.name,
        "vendor": gpu.vendor.value,
        "architecture": gpu.architecture,
        "label_gb": gpu.label_gb,
        "capacity_bytes": gpu.capacity_bytes,
        "capacity_basis": gpu.capacity_basis,
        "nvidia_smi_bytes": gpu.nvidia_smi_bytes,
        "context_bytes": gpu.context_bytes,
        "context_basis": gpu.context_basis,
        "compute_capability": ".".join(map(str, gpu.compute_capability)),
        "num_multiprocessors": gpu.num_sms,
        "bf16": gpu.bf16,
        "fp8": gpu.fp8,
        "memory_bandwidth_bytes_per_second": gpu.memory_bandwidth,
        "dense_flops_per_second": {dtype.value: flops for dtype, flops in gpu.dense_flops.items()},
        "certainty": gpu.certainty,
        "source": gpu.source,
        "spec_certainty": gpu.spec_certainty,
        "spec_source": gpu.spec_source,
        "note": gpu.note,
        "providers": sorted(wanted.book.providers_of(gpu.id)),
        "offers": [
            {
                "provider": offer.provider,
                "count": offer.count,
                "usd_per_hour": [offer.usd_per_hour_min, offer.usd_per_hour_max],
                "date": offer.date,
                "source": offer.source,
                "note": offer.note,
            }
            for offer in _offers(gpu, wanted)
        ],
    }


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
