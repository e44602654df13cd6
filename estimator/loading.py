"""Loading: what passes through the device, and what it leaves of blocks that are larger than the weights in them.

A weight that is quantized on the device passes through it in full; the next packed weight takes the block that is freed, and of a block
larger than 1 MiB no more than 1 MiB stays with the tensor that gets it: `memory_allocated` counts the whole block. How often that happens
follows from the order and the sizes of the weights, so that the loading is replayed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeAlias

from estimator.allocator import SMALL_REQUEST_BYTES
from estimator.caching_allocator import Allocator, Block, CachingAllocator, Taken
from estimator.dtypes import DType
from estimator.inventory import Inventory
from estimator.parallelism.options import Strategy
from estimator.patterns import copies, in_order
from estimator.phases import Item
from estimator.quantization import BLOCK_SIZE
from estimator.recipe import Recipe
from estimator.stack import Stack
from estimator.static_memory import Preparation, loaded_tensors, static_memory
from estimator.storage import StoredTensor
from estimator.units import allocated, ceil_div

IN_FULL = ".full"
"""Ends the name of a weight that is about to be packed."""
_PARTS = f".parts{IN_FULL}"
_WARM_UP = "warm-up"
REFERENCE = "ref_model."
"""Begins the names of an objective's second model."""

_ABSMAX_BYTES = DType.FLOAT32.itemsize
_HALF_BYTES = DType.FLOAT16.itemsize

# Checkpoints of these hold the experts of a layer in one tensor, as the model does. Those of all others hold them one by one.
# Source: transformers 5.23, conversion_mapping.py: model types without a MergeModulelist.
_STORED_MERGED = frozenset(
    (
        "aria_text",
        "dots3_note_text",
        "gpt_oss",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
        "hy_v4",
        "inkling2_text",
        "inkling_text",
        "jetmoe",
        "llama4_text",
        "minimax_m3_vl_text",
        "qwen3_vl_moe_text",
        "zaya",
    )
)


def merges_experts(tensor: StoredTensor, model_type: str, stack: Stack) -> bool:
    """Whether loading puts a tensor together from those of single experts, on the device.

    Source: transformers 5.23, core_model_loading.py, WeightConverter.convert: the parts are moved to the device first.
    """
    is_fused = not stack.experts_are_modules and len(tensor.shape) == 3 and ".experts." in tensor.pattern
    return is_fused and model_type not in _STORED_MERGED


def passing_bytes(tensors: Iterable[StoredTensor], model_type: str, preparation: Preparation) -> int:
    """The most that lies on the device beside what stays, while one tensor is loaded [bytes].

    A weight that is quantized passes through in full; LLM.int8 takes it through float16: as loaded, as float16, as int8. Experts that are
    merged lie there twice: as parts, or joined by stacking, and as the tensor that they become.

    Source: transformers, core_model_loading.py (on-the-fly quantization is synchronous; MergeModulelist and Concatenate let go of their
    parts when the new tensor stands); integrations/bitsandbytes.py, Bnb8bitQuantize.convert; bitsandbytes, nn/modules.py,
    Int8Params._quantize.
    """
    width = preparation.dtype.itemsize
    most = 0
    for tensor in tensors:
        if tensor.quantization is not None:
            most = max(most, tensor.num_elements * (width if tensor.quantization.is_4bit else width + DType.FLOAT16.itemsize))
        elif merges_experts(tensor, model_type, preparation.stack):
            most = max(most, tensor.num_elements * width)
    return allocated(most)


def transient_bytes(inventory: Inventory, recipe: Recipe, *, adapter_bytes: int) -> int:
    """The most that lies on the device while models are loaded and prepared, above what that ends with, adapters included [bytes].

    What passes through in loading is counted as if all weights of that model were there then; float32 weights and adapters are not yet.
    An objective's second model is loaded when the first one has its adapters.

    Args:
        adapter_bytes: of the adapters, which are made once the first model is loaded and prepared [bytes].
    """
    second, first = recipe.of_reference, _above_own_end(inventory, recipe)
    if second is None:
        return max(0, first - adapter_bytes)
    return max(first - adapter_bytes - static_memory(inventory, second).loaded_bytes, _above_own_end(inventory, second))


def _above_own_end(inventory: Inventory, recipe: Recipe) -> int:
    """The most that one model takes while it is loaded and prepared, above what it ends with [bytes]."""
    preparation = Preparation.of(recipe)
    tensors = loaded_tensors(inventory, preparation)
    passing, twice = passing_bytes(tensors, inventory.model_type, preparation), 0
    if preparation.quantization is not None and preparation.prepare_for_kbit_training:
        twice, grown = _raising_bytes(tensors)
        passing -= grown
    return max(0, passing, twice)


def _raising_bytes(tensors: Sequence[StoredTensor]) -> tuple[int, int]:
    """16-bit weights that become float32 one after another: each lies there in both types for a moment, those after it in 16 bits yet.

    Returns:
        The most above all of them in float32, and how much they have grown in the end [bytes].
    """
    most = later = 0
    for num_elements in reversed([t.num_elements for t, _ in _raised(tensors)]):
        half = allocated(num_elements * _HALF_BYTES)
        most = max(most, half - later)
        later += allocated(num_elements * DType.FLOAT32.itemsize) - half
    return most, later


def unsplit_bytes(inventory: Inventory, recipe: Recipe) -> int:
    """Bytes of allocated blocks that no weight asked for, once a model is loaded.

    A 4-bit model is known before transformers 4.50, whose loading fills segments from the start; its order of weights is that of their
    names, as safetensors files give them. Later a block of about the model's size is made first and the weights are cut from it, in which
    only the last piece can be left whole: at most 1 MiB, which is not counted (transformers 4.50, modeling_utils.py,
    caching_allocator_warmup; no measurement is at hand). The same block serves a model that is loaded on the device for inference. One
    that is trained in 16 or 32 bit is made on the host and moved, tensor by tensor. What is sharded or flattened afterwards lies elsewhere.

    Returns:
        The sum over blocks [bytes]; 0 where the loading is not known.

    Source: transformers 4.48, modeling_utils.py, load_state_dict and _load_state_dict_into_meta_model; quantizers/quantizer_bnb_4bit.py,
    create_quantized_param; safetensors 0.4.5 and 0.5.2, torch.py, load_file (answers sorted names); for models that are moved, see
    `placements`.
    """
    quantization, is_filled = recipe.quantization, recipe.stack.loads_without_warmup
    if quantization is not None:
        return _unsplit_bytes(inventory, Preparation.of(recipe)) if quantization.kind.is_4bit and is_filled else 0
    is_whole = recipe.parallel.strategy in (Strategy.SINGLE, Strategy.DDP)
    if not is_whole or (recipe.training is None and not is_filled):
        return 0
    # The same for all sizes and cards.
    return _unsplit_moved_bytes(inventory, replace(recipe.without_sizes(), compute_capability=(8, 0), num_multiprocessors=0))


@lru_cache(maxsize=64)
def _unsplit_bytes(inventory: Inventory, preparation: Preparation) -> int:
    # The small pool splits at 512 bytes, which is what sizes are rounded to: what is small leaves no trace.
    return _beyond_requests(load(CachingAllocator(), inventory, preparation, above=SMALL_REQUEST_BYTES))


@lru_cache(maxsize=64)
def _unsplit_moved_bytes(inventory: Inventory, recipe: Recipe) -> int:
    allocator, blocks = CachingAllocator(), dict[str, Block]()
    for name, num_bytes in placements(inventory, recipe):
        if num_bytes > SMALL_REQUEST_BYTES:
            put(allocator, blocks, name, num_bytes)
    return _beyond_requests(blocks)


def _beyond_requests(loaded: Mapping[str, Block]) -> int:
    return sum(block.size - allocated(block.requested_bytes) for block in loaded.values())


class NoRoomError(Exception):
    """The card cannot hold what is asked for."""


def place(allocator: Allocator[Taken], num_bytes: int) -> Taken:
    """A block for a tensor of at least one byte.

    Raises:
        NoRoomError: if there is none.
    """
    block = allocator.allocate(num_bytes)
    if block is None:
        raise NoRoomError
    return block


def load(allocator: CachingAllocator, inventory: Inventory, preparation: Preparation, *, above: int = 0) -> dict[str, Block]:
    """A quantized model loaded and prepared for training, before adapters and casts.

    Args:
        allocator: that is to hold it.
        above: tensors up to this size are left out [bytes].

    Returns:
        The block of every tensor that stays, by name.

    Raises:
        NoRoomError: if it does not fit.
    """
    blocks: dict[str, Block] = {}
    for name, num_bytes in loading(inventory, preparation):
        put(allocator, blocks, name, num_bytes if num_bytes > above else 0)
    return blocks


def put(allocator: Allocator[Taken], blocks: dict[str, Taken], name: str, num_bytes: int) -> None:
    """Carries out a `Placement` on an allocator.

    Raises:
        NoRoomError: if it does not fit.
    """
    former = blocks.pop(name, None)
    if num_bytes:
        blocks[name] = place(allocator, num_bytes)
    if former is not None:
        allocator.free(former)


Placement: TypeAlias = tuple[str, int]
"""A tensor that is made: its name and size [bytes]. One of that name goes once the new one is there; with size 0 it only goes."""


def placements(inventory: Inventory, recipe: Recipe) -> Iterator[Placement]:
    """Everything that is made before the first step of a training run, in order.

    Quantized models are loaded on the card; others are made on the host, and moved by the trainer in the order of their modules.

    Source: transformers, trainer.py, Trainer._move_model_to_device; quantizers/quantizer_bnb_4bit.py, update_device_map; for the second
    model trl 1.16, trainer/dpo_trainer.py, DPOTrainer.__init__.
    """
    yield from _placements(inventory, recipe)
    second = recipe.of_reference
    if second is not None:
        yield from ((f"{REFERENCE}{name}", num_bytes) for name, num_bytes in _placements(inventory, second))


def _placements(inventory: Inventory, recipe: Recipe) -> Iterator[Placement]:
    held: dict[str, int] = {}
    if recipe.quantization is not None:
        for name, num_bytes in loading(inventory, Preparation.of(recipe)):
            held[name] = num_bytes
            yield name, num_bytes
    for tensor, name in one_by_one(static_memory(inventory, recipe).tensors):
        if held.get(name) != tensor.raw_bytes:
            yield name, tensor.raw_bytes


def one_by_one(tensors: Sequence[StoredTensor]) -> Iterator[tuple[StoredTensor, str]]:
    """Every copy with its name, in the order of the modules."""
    return ((tensors[position], name) for position, name in in_order((t.pattern, t.indices) for t in tensors))


def loading(inventory: Inventory, preparation: Preparation) -> Iterator[Placement]:
    """A quantized model loaded and prepared for training: weights in the order of their names, then buffers."""
    tensors = loaded_tensors(inventory, preparation)
    if not preparation.stack.loads_without_warmup:
        yield from _warm_up(tensors, preparation)
    named = [(name, t) for t in tensors if t.item is not Item.QUANTIZATION_STATE for _, name in copies(t.pattern, t.indices)]
    for name, tensor in sorted(named, key=lambda entry: (entry[1].item is Item.BUFFERS, entry[0])):
        if tensor.quantization is None and merges_experts(tensor, inventory.model_type, preparation.stack):
            yield from ((f"{name}{_PARTS}", tensor.raw_bytes), (name, tensor.raw_bytes), (f"{name}{_PARTS}", 0))
        elif tensor.quantization is None:
            yield name, tensor.raw_bytes
        elif tensor.quantization.is_4bit:
            yield from _pack(name, tensor, preparation)
        else:
            yield from _pack_int8(name, tensor, preparation)
    if preparation.prepare_for_kbit_training:
        yield from _raise(tensors)


def _warm_up(tensors: Iterable[StoredTensor], preparation: Preparation) -> Iterator[Placement]:
    """One block of about the model's size, made and freed: the weights then find it.

    Source: transformers 5.23, modeling_utils.py, caching_allocator_warmup and get_total_byte_count; quantizers/quantizer_bnb_4bit.py and
    quantizer_bnb_8bit.py, param_element_size.
    """
    quantization = preparation.quantization
    assert quantization is not None
    halved = 2 if quantization.kind.is_4bit else 1
    sizes = (
        t.num_copies * (t.num_elements // halved if t.quantization is not None else t.raw_bytes)
        for t in tensors
        if t.item is not Item.QUANTIZATION_STATE
    )
    yield _WARM_UP, sum(sizes)
    yield _WARM_UP, 0


def _pack(name: str, tensor: StoredTensor, preparation: Preparation) -> Iterator[Placement]:
    """The weight in full, its scales, the packed weight; with double quantization the scales in bytes, and the first ones go.

    Source: bitsandbytes 0.43.3, nn/modules.py, Params4bit._quantize; functional.py, quantize_4bit and quantize_blockwise.
    """
    assert preparation.quantization is not None
    num_blocks = ceil_div(tensor.num_elements, BLOCK_SIZE)
    full, scales = f"{name}{IN_FULL}", f"{name}.absmax"
    yield full, tensor.num_elements * preparation.dtype.itemsize
    yield scales, num_blocks * _ABSMAX_BYTES
    yield name, tensor.raw_bytes
    if preparation.quantization.double_quant:
        yield scales, num_blocks
    yield full, 0


def _pack_int8(name: str, tensor: StoredTensor, preparation: Preparation) -> Iterator[Placement]:
    """The weight in full, as float16 where it is not, the packed weight and one scale a row.

    Source: bitsandbytes, nn/modules.py, Int8Params._quantize.
    """
    full, half = f"{name}{IN_FULL}", f"{name}.half{IN_FULL}"
    yield full, tensor.num_elements * preparation.dtype.itemsize
    if preparation.dtype is not DType.FLOAT16:
        yield half, tensor.num_elements * DType.FLOAT16.itemsize
    yield name, tensor.raw_bytes
    yield f"{name}.SCB", tensor.shape[0] * _ABSMAX_BYTES
    if preparation.dtype is not DType.FLOAT16:
        yield half, 0
    yield full, 0


def _raise(tensors: Sequence[StoredTensor]) -> Iterator[Placement]:
    """Every 16-bit weight is replaced by one of float32.

    Source: peft, utils/other.py, prepare_model_for_kbit_training.
    """
    for tensor, name in _raised(tensors):
        yield name, tensor.num_elements * DType.FLOAT32.itemsize


def _raised(tensors: Sequence[StoredTensor]) -> Iterator[tuple[StoredTensor, str]]:
    for tensor, name in one_by_one(tensors):
        if tensor.quantization is None and tensor.item is Item.WEIGHTS and tensor.dtype.is_half:
            yield tensor, name
