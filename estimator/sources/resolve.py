"""From what a user calls a model to its inventory: catalogue, config or Hub, in this order."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimator.errors import ConfigError, InspectionError, SourceError
from estimator.inventory import Inventory
from estimator.inventory_codec import decode
from estimator.sources import bounds, catalogue, configfile
from estimator.sources.access import Access, current
from estimator.sources.at_hand import NotAtHandError, is_only_at_hand
from estimator.sources.cache import InventoryCache, content_hash, default_cache

# What a bundled model does without is imported where it is used.
if TYPE_CHECKING:
    from estimator.sources.checkpoint import Checkpoint
    from estimator.sources.process import Inspector


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
    checkpoint: "Checkpoint | None" = None
    """What its files store, where they were read: of quantized checkpoints on the Hub, and where transformers has no class."""
    num_parameters: int | None = None
    """Logical scalars, where the inventory in use is that of packed tensors."""
    is_stale: bool = False
    """Whether it was kept from before, since the Hub does not answer."""

    @property
    def as_stored(self) -> "ResolvedModel":
        """The model with its weights as its files have them, where they are stored in a way that is not counted otherwise."""
        checkpoint = self.checkpoint
        if checkpoint is None or checkpoint.method in (None, "bitsandbytes") or self.inventory.is_stored:
            return self
        return replace(self, inventory=checkpoint.inventory, num_parameters=self.inventory.num_parameters)


def resolve(
    model: str | Path | Mapping[str, Any],
    revision: str | None = None,
    *,
    inspector: "Inspector | None" = None,
    cache: InventoryCache | None = None,
    access: Access | None = None,
) -> ResolvedModel:
    """The inventory of a model.

    Args:
        model: id of a catalogue or Hub model; the content of a config.json, also as `{"config": …}`; or the path of one.
            A string is never taken for a path: whoever lets people name files converts it to `Path`.
        revision: branch, tag or commit on the Hub. With one other than `main` the catalogue is passed over.
        inspector: the processes that build models; the program's own if None.
        cache: inventories built before; the program's own if None.
        access: of the caller; that of the question being answered if None.

    Raises:
        VramplanError: what `bounds.check`, `configfile.read`, `Lookup.config` and `Inspector.run` raise.
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
            return _from_hub(model, revision, access if access is not None else current(), inspector, cache)
        case Path():
            config = configfile.read(model)
        case _:
            config = _checked(model)
    inventory = build(config, inspector=inspector, cache=cache)
    return ResolvedModel(
        id=None, revision=None, source=ModelSource.CONFIG, inventory=inventory, config=config, has_own_code="auto_map" in config
    )


def is_at_hand(model: str | Mapping[str, Any], revision: str | None = None) -> bool:
    """Whether the inventory of a model is known by now, so that `resolve` asks neither the Hub nor a process that builds models.

    Args:
        model, revision: as of `resolve`.

    Raises:
        VramplanError: if the id, revision or config cannot be accepted.
    """
    if not isinstance(model, str):
        return _cache().get(content_hash(_checked(model))) is not None
    if revision in (None, "main") and catalogue.find(model) is not None:
        return True
    from estimator.sources.lookup import default_lookup

    lookup = current().lookup
    kept = (lookup if lookup is not None else default_lookup()).kept(model, revision)
    return kept is not None and _cache().get(content_hash(kept.config)) is not None


def _checked(model: Mapping[str, Any]) -> dict[str, Any]:
    inner = model.get("config") if len(model) == 1 else None
    return bounds.check(inner if inner is not None else model)


def _from_hub(
    model_id: str, revision: str | None, access: Access, inspector: "Inspector | None", cache: InventoryCache | None
) -> ResolvedModel:
    from estimator.sources.checkpoint import checkpoint_of, method_of
    from estimator.sources.lookup import default_lookup

    lookup = access.lookup if access.lookup is not None else default_lookup()
    found = lookup.config(model_id, revision, access)
    has_own_code, checkpoint = "auto_map" in found.config, None
    if method_of(found.config) is not None:
        # An answer for the weights as the class has them stands without the headers, and says so.
        with suppress(SourceError):
            checkpoint = checkpoint_of(found.config, lookup.files(model_id, found, access))
    try:
        inventory = build(found.config, inspector=inspector, cache=cache, is_public=found.is_public)
    except ConfigError as error:
        if not has_own_code or not _is_unknown(error):
            raise
        checkpoint = checkpoint or checkpoint_of(found.config, lookup.files(model_id, found, access))
        inventory = checkpoint.inventory
    return ResolvedModel(
        id=model_id,
        revision=found.revision,
        source=ModelSource.HUB,
        inventory=inventory,
        config=found.config,
        is_public=found.is_public,
        has_own_code=has_own_code,
        checkpoint=checkpoint,
        is_stale=found.is_stale,
    )


def _is_unknown(error: ConfigError) -> bool:
    return "is not known to transformers" in error.message


def build(
    config: Mapping[str, Any],
    *,
    inspector: "Inspector | None" = None,
    cache: InventoryCache | None = None,
    is_public: bool = True,
) -> Inventory:
    """The inventory of a config, from the cache or by building the model on the meta device in a process of its own.

    Args:
        config: the content of a config.json, checked by `bounds.check`.
        is_public: False for what must be kept nowhere, neither on disk nor for other callers.

    Raises:
        ConfigError: if transformers knows no such model; the message says so where the repository would bring code of its own. If the
            model that the config makes, defaults included, could not run.
        InspectionError: if the model cannot be built, or not within the limits.
        NotAtHandError: see `at_hand.only_at_hand`.
    """
    try:
        inventory = _built(config, inspector, cache, is_public=is_public)
    except InspectionError:
        bounds.check_built(config, {}, is_hollow=True)
        raise
    bounds.check_built(config, inventory.config, is_hollow=any(row.num_elements == 0 for row in inventory.rows))
    return inventory


def _built(config: Mapping[str, Any], inspector: "Inspector | None", cache: InventoryCache | None, *, is_public: bool) -> Inventory:
    key = content_hash(config)
    if cache is None:
        cache = _cache()
    if is_only_at_hand():  # what is on a disk or in a database may have to be waited for too
        if (held := cache.held(key)) is None:
            raise NotAtHandError
        return held
    if (found := cache.get(key)) is not None:
        return found
    if inspector is None:
        from estimator.sources.process import default_inspector

        inspector = default_inspector()
    try:
        inventory = decode(inspector.run("inventory", {"config": dict(config), "content_hash": key}))
    except ConfigError as error:
        if "auto_map" in config and _is_unknown(error):
            message = f"{error.message}; the repository brings code of its own (auto_map), which is never run here"
            raise ConfigError(message, field="model.config.model_type") from None
        raise
    if is_public:
        cache.put(inventory)
    return inventory


def _cache() -> InventoryCache:
    own = current().inventories
    return own if own is not None else default_cache()
