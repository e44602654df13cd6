"""From what a user calls a model to its inventory: catalogue, config or Hub, in this order."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from estimator.errors import ConfigError
from estimator.inventory import Inventory
from estimator.inventory_codec import decode
from estimator.sources import bounds, catalogue, configfile, hub
from estimator.sources.cache import InventoryCache, content_hash, default_cache
from estimator.sources.process import Inspector, default_inspector


class ModelSource(StrEnum):
    """Where a config came from."""

    CATALOGUE = "catalogue"
    HUB = "hub"
    CONFIG = "config"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model that can be estimated."""

    id: str | None
    """As the Hub writes it; None for a config given as such."""
    revision: str | None
    """The commit of a Hub model; None for others."""
    source: ModelSource
    inventory: Inventory
    config: Mapping[str, Any]
    """The content of its config.json, checked."""
    is_public: bool = True
    """Whether what is learnt of it may be kept on disk."""
    has_own_code: bool = False
    """Whether its repository brings code (`auto_map`), which was not run: transformers' own class stands for it."""


def resolve(
    model: str | Path | Mapping[str, Any],
    revision: str | None = None,
    *,
    inspector: Inspector | None = None,
    cache: InventoryCache | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    deadline_seconds: float = hub.DEADLINE_SECONDS,
) -> ResolvedModel:
    """The inventory of a model.

    Args:
        model: id of a catalogue or Hub model; the content of a config.json, also as `{"config": …}`; or the path of one.
            A string is never taken for a path: whoever lets people name files converts it to `Path`.
        revision: branch, tag or commit on the Hub. With one other than `main` the catalogue is passed over.
        inspector: the processes that build models; the program's own if None.
        cache: inventories built before; the program's own if None.
        token, endpoint, deadline_seconds: see `hub.fetch`.

    Raises:
        VramplanError: what `bounds.check`, `configfile.read`, `hub.fetch` and `Inspector.run` raise.
    """
    match model:
        case str():
            if revision in (None, "main") and (entry := catalogue.find(model)) is not None:
                bundled = catalogue.load(entry.file)
                own_code = "auto_map" in bundled.config
                return ResolvedModel(
                    id=bundled.id,
                    revision=None,
                    source=ModelSource.CATALOGUE,
                    inventory=bundled.inventory,
                    config=bundled.config,
                    has_own_code=own_code,
                )
            found = hub.fetch(model, revision, token=token, endpoint=endpoint, deadline_seconds=deadline_seconds)
            inventory = build(found.config, inspector=inspector, cache=cache, on_disk=found.is_public)
            own_code = "auto_map" in found.config
            return ResolvedModel(
                id=model,
                revision=found.revision,
                source=ModelSource.HUB,
                inventory=inventory,
                config=found.config,
                is_public=found.is_public,
                has_own_code=own_code,
            )
        case Path():
            config = configfile.read(model)
        case _:
            inner = model.get("config") if len(model) == 1 else None
            config = bounds.check(inner if inner is not None else model)
    inventory = build(config, inspector=inspector, cache=cache)
    return ResolvedModel(
        id=None, revision=None, source=ModelSource.CONFIG, inventory=inventory, config=config, has_own_code="auto_map" in config
    )


def build(
    config: Mapping[str, Any],
    *,
    inspector: Inspector | None = None,
    cache: InventoryCache | None = None,
    on_disk: bool = True,
) -> Inventory:
    """The inventory of a config, from the cache or by building the model on the meta device in a process of its own.

    Args:
        config: the content of a config.json, checked by `bounds.check`.
        on_disk: False for what must not be stored.

    Raises:
        ConfigError: if transformers knows no such model; the message says so where the repository would bring code of its own.
        InspectionError: if the model cannot be built, or not within the limits.
    """
    key = content_hash(config)
    cache = cache if cache is not None else default_cache()
    if (found := cache.get(key)) is not None:
        return found
    inspector = inspector if inspector is not None else default_inspector()
    try:
        inventory = decode(inspector.run("inventory", {"config": dict(config), "content_hash": key}))
    except ConfigError as error:
        if "auto_map" in config and "is not known to transformers" in error.message:
            message = f"{error.message}; the repository brings code of its own (auto_map), which is never run here"
            raise ConfigError(message, field="model.config.model_type") from None
        raise
    cache.put(inventory, on_disk=on_disk)
    return inventory
