"""Inventories that were already asked for: in memory, and on disk in the user's cache folder.

Keys are hashes of the config's content and the library versions, so an entry never becomes stale, and nobody can read an entry without
already holding the config it was made from.
"""

import hashlib
import json
import os
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from estimator.inventory import Inventory
from estimator.inventory_codec import FORMAT, decode, encode

VARIABLE = "VRAMPLAN_CACHE_DIR"
_KEY = re.compile(r"[0-9a-f]{64}")


@cache
def library_versions(names: tuple[str, ...] = ("torch", "transformers")) -> tuple[tuple[str, str], ...]:
    """Versions of installed libraries, by default those that decide what an inventory looks like; reads metadata, imports nothing.

    A library that is not installed counts as `absent`: the catalogue answers without it.
    """
    return tuple((name, _version(name)) for name in names)


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # takes 20 ms, and the catalogue needs no versions

    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def content_hash(config: Mapping[str, Any], versions: tuple[tuple[str, str], ...] | None = None) -> str:
    """What identifies the inventory of a config: SHA-256 over its content, the library versions and the format of inventories."""
    content = {"config": config, "versions": versions or library_versions(), "format": FORMAT}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def default_directory() -> Path:
    """`$VRAMPLAN_CACHE_DIR`, else `vramplan` in the user's folder for caches (XDG Base Directory Specification)."""
    if configured := os.environ.get(VARIABLE):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vramplan"


class InventoryCache:
    """A bounded store of inventories; safe to use from many threads and processes.

    Args:
        directory: where files live; None keeps everything in memory.
        max_entries: inventories held in memory (about 50 KiB each).
        max_files: files held on disk (about 5 KiB each); the oldest go first.
    """

    def __init__(self, directory: Path | None, *, max_entries: int = 256, max_files: int = 4096) -> None:
        self._directory = directory
        self._max_entries = max_entries
        self._max_files = max_files
        self._entries: OrderedDict[str, Inventory] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Inventory | None:
        """The inventory of a content hash, or None. A file that cannot be read is no entry, and is removed."""
        if (found := self.held(key)) is not None:
            return found
        if (found := self._read(key)) is not None:
            self._remember(found)
        return found

    def held(self, key: str) -> Inventory | None:
        """The same as far as it is in memory."""
        with self._lock:
            if (found := self._entries.get(key)) is not None:
                self._entries.move_to_end(key)
            return found

    def put(self, inventory: Inventory) -> None:
        """Keeps an inventory under its content hash; never that of a private model."""
        self._remember(inventory)
        self._write(inventory)

    def _remember(self, inventory: Inventory) -> None:
        with self._lock:
            self._entries[inventory.content_hash] = inventory
            self._entries.move_to_end(inventory.content_hash)
            while len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)

    def _file(self, key: str) -> Path | None:
        return self._directory / f"{key}.json" if self._directory is not None and _KEY.fullmatch(key) else None

    def _read(self, key: str) -> Inventory | None:
        path = self._file(key)
        if path is None or (data := read_json(path)) is None:
            return None
        try:
            inventory = decode(data)
        except (ValueError, RecursionError):
            inventory = None
        if inventory is None or inventory.content_hash != key:
            with suppress(OSError):
                path.unlink()
            return None
        return inventory

    def _write(self, inventory: Inventory) -> None:
        if (path := self._file(inventory.content_hash)) is not None:
            write_json(path, encode(inventory), max_files=self._max_files)


def read_json(path: Path) -> Any:
    """The content of a file, or None if there is none. What cannot be read is removed."""
    try:
        return json.loads(path.read_bytes())
    except OSError:
        return None
    except (ValueError, RecursionError):
        with suppress(OSError):
            path.unlink()
        return None


def write_json(path: Path, data: object, *, max_files: int = 4096) -> None:
    """Writes beside and renames, so that readers see a whole file or none. A disk that is full or read-only only costs the cache.

    Args:
        max_files: kept in the folder; the oldest go first.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            file.write(json.dumps(data, separators=(",", ":")).encode())
        temporary.replace(path)
        _prune(path.parent, max_files)
    except OSError:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def _prune(directory: Path, max_files: int) -> None:
    files = list(directory.glob("*.json"))
    if len(files) > max_files:
        files.sort(key=lambda path: path.stat().st_mtime)
        for path in files[: len(files) - max_files]:
            with suppress(OSError):
                path.unlink()


@cache
def default_cache() -> InventoryCache:
    """The cache of this program."""
    return InventoryCache(default_directory() / "inventories")
