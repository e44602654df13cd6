"""Loading: what passes through the device, and what it leaves of blocks that are larger than the weights in them.

A weight that is quantized on the device passes through it in full; the next packed weight takes the block that is freed, and of a block
larger than 1 MiB no more than 1 MiB stays with the tensor that gets it: `memory_allocated` counts the whole block. How often that happens
follows from the order and the sizes of the weights, so that the loading is replayed.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

from estimator.allocator import SMALL_REQUEST_BYTES
from estimator.caching_allocator import Block, CachingAllocator
from estimator.dtypes import DType
from estimator.inventory import Inventory
from estimator.patterns import copies, in_order
from estimator.phases import Item
from estimator.quantization import BLOCK_SIZE
from estimator.recipe import Recipe
from estimator.stack import Stack
from estimator.static_memory import Preparation, loaded_tensors
from estimator.storage import StoredTensor
from estimator.units import allocated, ceil_div

_ABSMAX_BYTES = DType.FLOAT32.itemsize

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


def unsplit_bytes(inventory: Inventory, recipe: Recipe) -> int:
    """Bytes of allocated blocks that no weight asked for, once a 4-bit model is loaded.

    Only for transformers before 4.50, whose loading fills segments from the start; its order of weights is that of their names, as
    safetensors files give them. Later a block of about the model's size is made first and the weights are cut from it, in which only the
    last piece can be left whole: at most 1 MiB, which is not counted (transformers 4.50, modeling_utils.py, caching_allocator_warmup; no
    measurement is at hand). Other models are moved to the device as they are: what rounding leaves there is not counted either.

    Returns:
        The sum over blocks [bytes]; 0 where the loading is not known.

    Source: transformers 4.48, modeling_utils.py, load_state_dict and _load_state_dict_into_meta_model; quantizers/quantizer_bnb_4bit.py,
    create_quantized_param; safetensors, torch.py, load_file (`keys` in order).
    """
    quantization = recipe.quantization
    if quantization is None or not quantization.kind.is_4bit or not recipe.stack.loads_without_warmup:
        return 0
    return _unsplit_bytes(inventory, Preparation.of(recipe))


@lru_cache(maxsize=64)
def _unsplit_bytes(inventory: Inventory, preparation: Preparation) -> int:
    # The small pool splits at 512 bytes, which is what sizes are rounded to: what is small leaves no trace.
    loaded = load(CachingAllocator(), inventory, preparation, above=SMALL_REQUEST_BYTES)
    return sum(block.size - allocated(block.requested_bytes) for block in loaded.values())


class NoRoomError(Exception):
    """The card cannot hold what is asked for."""


def place(allocator: CachingAllocator, num_bytes: int) -> Block:
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
    placed = _Placed(allocator, above)
    tensors = loaded_tensors(inventory, preparation)
    if not preparation.stack.loads_without_warmup:
        _warm_up(allocator, tensors, preparation)
    _load(placed, tensors, inventory.model_type, preparation)
    if preparation.prepare_for_kbit_training:
        _raise(placed, tensors)
    return placed.blocks


class _Placed:
    """Blocks by the name of the tensor in them."""

    def __init__(self, allocator: CachingAllocator, above: int) -> None:
        self.allocator = allocator
        self.above = above
        self.blocks: dict[str, Block] = {}

    def make(self, name: str, num_bytes: int) -> None:
        """Puts a tensor in a block; a former one of that name goes then."""
        former = self.blocks.pop(name, None)
        if num_bytes > self.above:
            self.blocks[name] = place(self.allocator, num_bytes)
        if former is not None:
            self.allocator.free(former)

    def drop(self, name: str) -> None:
        if (block := self.blocks.pop(name, None)) is not None:
            self.allocator.free(block)


def _warm_up(allocator: CachingAllocator, tensors: Iterable[StoredTensor], preparation: Preparation) -> None:
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
    allocator.free(place(allocator, sum(sizes)))


def _load(placed: _Placed, tensors: Iterable[StoredTensor], model_type: str, preparation: Preparation) -> None:
    """Weights in the order of their names, then buffers."""
    named = [(name, t) for t in tensors if t.item is not Item.QUANTIZATION_STATE for _, name in copies(t.pattern, t.indices)]
    for name, tensor in sorted(named, key=lambda entry: (entry[1].item is Item.BUFFERS, entry[0])):
        if tensor.quantization is None and merges_experts(tensor, model_type, preparation.stack):
            placed.make(f"{name} in parts", tensor.raw_bytes)
            placed.make(name, tensor.raw_bytes)
            placed.drop(f"{name} in parts")
        elif tensor.quantization is None:
            placed.make(name, tensor.raw_bytes)
        elif tensor.quantization.is_4bit:
            _pack(placed, name, tensor, preparation)
        else:
            _pack_int8(placed, name, tensor, preparation)


def _pack(placed: _Placed, name: str, tensor: StoredTensor, preparation: Preparation) -> None:
    """The weight in full, its scales, the packed weight; with double quantization the scales in bytes, and the first ones go.

    Source: bitsandbytes 0.43.3, nn/modules.py, Params4bit._quantize; functional.py, quantize_4bit and quantize_blockwise.
    """
    assert preparation.quantization is not None
    num_blocks = ceil_div(tensor.num_elements, BLOCK_SIZE)
    full, scales = f"{name} in full", f"{name}.absmax"
    placed.make(full, tensor.num_elements * preparation.dtype.itemsize)
    placed.make(scales, num_blocks * _ABSMAX_BYTES)
    placed.make(name, tensor.raw_bytes)
    if preparation.quantization.double_quant:
        placed.make(scales, num_blocks)
    placed.drop(full)


def _pack_int8(placed: _Placed, name: str, tensor: StoredTensor, preparation: Preparation) -> None:
    """The weight in full, as float16 where it is not, the packed weight and one scale a row.

    Source: bitsandbytes, nn/modules.py, Int8Params._quantize.
    """
    full, half = f"{name} in full", f"{name} in half"
    placed.make(full, tensor.num_elements * preparation.dtype.itemsize)
    if preparation.dtype is not DType.FLOAT16:
        placed.make(half, tensor.num_elements * DType.FLOAT16.itemsize)
    placed.make(name, tensor.raw_bytes)
    placed.make(f"{name}.SCB", tensor.shape[0] * _ABSMAX_BYTES)
    placed.drop(half)
    placed.drop(full)


def _raise(placed: _Placed, tensors: Sequence[StoredTensor]) -> None:
    """Every 16-bit weight's block is replaced by one of float32.

    Source: peft, utils/other.py, prepare_model_for_kbit_training.
    """
    for position, name in in_order((t.pattern, t.indices) for t in tensors):
        tensor = tensors[position]
        if tensor.quantization is None and tensor.item is Item.WEIGHTS and tensor.dtype.is_half:
            placed.make(name, tensor.num_elements * DType.FLOAT32.itemsize)
