"""`device_map="auto"`: which module lies on which card.

Modules are placed in order, a decoder layer never split, and a card is left when the next one does not fit.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from estimator.errors import RequestError
from estimator.inventory import Inventory
from estimator.patterns import copies
from estimator.phases import Item
from estimator.recipe import Recipe
from estimator.static_memory import Preparation, loaded_tensors
from estimator.storage import StoredTensor

# What transformers takes of the memory of each card for a bitsandbytes model.
# Source: transformers, quantizers/quantizer_bnb_4bit.py and quantizer_bnb_8bit.py, adjust_max_memory.
QUANTIZED_SHARE = 0.90
# Memory of a card that nobody limited [bytes].
UNLIMITED = 2**60


@dataclass(slots=True, kw_only=True)
class _Tree:
    """Modules and parameters by name, with their sizes as transformers counts them before loading."""

    children: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    sizes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    modules: set[str] = field(default_factory=set)
    layers: frozenset[str] = frozenset()
    tied: dict[str, str] = field(default_factory=dict)
    """Parameters without storage of their own, and where it is."""

    def add(self, name: str, size: float) -> None:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path, parent = ".".join(parts[:end]), ".".join(parts[: end - 1])
            if path not in self.children[parent]:
                self.children[parent].append(path)
            self.modules.add(parent)
            self.sizes[path] += size
        self.sizes[""] += size

    def is_whole(self, name: str) -> bool:
        """Whether it is a decoder layer or has no modules in it."""
        return name in self.layers or not any(child in self.modules for child in self.children.get(name, ()))

    def largest_layer(self, names: Iterable[str]) -> tuple[float, list[str]]:
        """The largest part that cannot be split, and all that are as large.

        Source: accelerate, utils/modeling.py, get_max_layer_size.
        """
        largest, found = 0.0, []
        waiting = [name for name in names if name in self.modules]
        while waiting:
            name = waiting.pop(0)
            if not self.is_whole(name):
                waiting = [child for child in self.children[name] if child in self.modules] + waiting
            elif self.sizes[name] > largest:
                largest, found = self.sizes[name], [name]
            elif self.sizes[name] == largest:
                found.append(name)
        return largest, found

    def split(self, name: str) -> list[str]:
        """Parameters of a module, then the modules in it."""
        return sorted(self.children[name], key=lambda child: child in self.modules)


def _tree(inventory: Inventory, tensors: Iterable[StoredTensor]) -> _Tree:
    prefix = inventory.layers_prefix
    tree = _Tree(layers=frozenset(f"{prefix}.{index}" for index in range(inventory.num_layers)))
    for tensor in tensors:
        if tensor.item is Item.QUANTIZATION_STATE:
            continue
        width: float = tensor.dtype.itemsize
        if tensor.quantization is not None:
            width = 0.5 if tensor.quantization.is_4bit else 1
        for _, name in copies(tensor.pattern, tensor.indices):
            tree.add(name, tensor.num_elements * width)
    for row in inventory.rows:
        if row.tied_to is not None:
            for name in row.names():
                tree.add(name, 0)
                tree.tied[name] = row.tied_to
    return tree


def balanced_memory(tree: _Tree, limits: Sequence[float]) -> list[float]:
    """What each card may hold, so that all get about the same; the last one keeps all it has.

    Source: transformers, integrations/accelerate.py, get_balanced_memory.
    """
    if len(limits) < 2:
        return list(limits)
    leaves = [name for name in tree.modules if any(child not in tree.modules for child in tree.children[name])]
    direct = (sum(tree.sizes[c] for c in tree.children[name] if c not in tree.modules) for name in leaves)
    largest = max((tree.sizes[name] for name in tree.layers if name in tree.modules), default=0)
    per_card = tree.sizes[""] // len(limits) + int(1.25 * max(largest, max(direct, default=0)))
    return [*(min(per_card, limit) for limit in limits[:-1]), limits[-1]]


def _place(tree: _Tree, limits: Sequence[float]) -> dict[str, int]:
    """Card of each module.

    Source: transformers, integrations/accelerate.py, infer_auto_device_map.
    """
    placed: dict[str, int] = {}
    waiting = tree.split("")
    used = [0.0] * len(limits)
    card = 0
    largest, names = tree.largest_layer(waiting)
    while waiting:
        if card == len(limits):
            raise RequestError(
                f"hardware.strategy: 'device_map' leaves {waiting[0]} without a card; accepted: more or larger cards",
                field="hardware.strategy",
            )
        name = waiting.pop(0)
        names = [n for n in names if n != name and not n.startswith(f"{name}.")]
        if not names:
            largest, names = tree.largest_layer(waiting)
        ties = [n for n in waiting if _are_tied(tree, name, n)]
        free = limits[card] - used[card] - (largest if card == 0 else 0)
        size = tree.sizes[name] + sum(tree.sizes[n] for n in ties)
        if size <= free:
            used[card] += size
            for member in (name, *ties):
                placed[member] = card
            waiting = [n for n in waiting if n not in ties]
            continue
        if tree.is_whole(name) or tree.sizes[name] < free:
            waiting.insert(0, name)
            card += 1
            continue
        waiting = tree.split(name) + waiting
        largest, names = tree.largest_layer(waiting)
    return placed


def _are_tied(tree: _Tree, one: str, other: str) -> bool:
    for name, source in tree.tied.items():
        ends = (name, source)
        inside = [any(f"{end}.".startswith(f"{module}.") for end in ends) for module in (one, other)]
        apart = not all(f"{end}.".startswith(f"{one}.") for end in ends)
        if all(inside) and apart:
            return True
    return False


@lru_cache(maxsize=256)
def _placement(inventory: Inventory, preparation: Preparation, limits: tuple[int, ...]) -> Mapping[str, int]:
    tree = _tree(inventory, loaded_tensors(inventory, preparation))
    memory = balanced_memory(tree, limits)
    if preparation.quantization is not None:
        memory = [size * QUANTIZED_SHARE for size in memory]
    return _place(tree, memory)


def placement(inventory: Inventory, recipe: Recipe) -> Mapping[str, int]:
    """The card of each module that is placed as a whole.

    Raises:
        RequestError: if a module is left over when the last card is full.
    """
    parallel = recipe.parallel
    limits = parallel.max_memory_bytes or (UNLIMITED,) * parallel.num_gpus
    return _placement(inventory, Preparation.of(recipe), limits)


def card_of(placed: Mapping[str, int], name: str) -> int:
    """Where a tensor lies, or a module of which all is on one card."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        card = placed.get(".".join(parts[:end]))
        if card is not None:
            return card
    raise KeyError(name)
