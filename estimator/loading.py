"""What loading leaves of blocks that are larger than the weights in them.

A weight that is quantized on the device passes through it in full; the next packed weight takes the block that is freed, and of a block
larger than 1 MiB no more than 1 MiB stays with the tensor that gets it: `memory_allocated` counts the whole block. How often that happens
follows from the order and the sizes of the weights, so that the loading is replayed.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache

from estimator.allocator import SMALL_REQUEST_BYTES
from estimator.caching_allocator import Block, CachingAllocator
from estimator.dtypes import DType
from estimator.inventory import Inventory
from estimator.patterns import copies
from estimator.phases import Item
from estimator.quantization import BLOCK_SIZE
from estimator.recipe import Recipe
from estimator.static_memory import Preparation, loaded_tensors
from estimator.storage import StoredTensor
from estimator.units import allocated, ceil_div

_ABSMAX_BYTES = DType.FLOAT32.itemsize


def unsplit_bytes(inventory: Inventory, recipe: Recipe) -> int:
    """Bytes of allocated blocks that no weight asked for, once a 4-bit model is loaded.

    Only for transformers before 4.50, whose loading fills segments from the start; its order of weights is that of their names, as
    safetensors files give them. Later a block of about the model's size is made first, and no measurement is at hand. Other models are
    moved to the device as they are: what rounding leaves there is not counted either.

    Returns:
        The sum over blocks [bytes]; 0 where the loading is not known.

    Source: transformers 4.48, modeling_utils.py, load_state_dict and _load_state_dict_into_meta_model; quantizers/quantizer_bnb_4bit.py,
    create_quantized_param; safetensors 0.4.5 and 0.5.2, torch.py, load_file (answers sorted names).
    """
    quantization = recipe.quantization
    if quantization is None or not quantization.kind.is_4bit or not recipe.stack.loads_without_warmup:
        return 0
    return _unsplit_bytes(inventory, Preparation.of(recipe))


@lru_cache(maxsize=64)
def _unsplit_bytes(inventory: Inventory, preparation: Preparation) -> int:
    allocator = CachingAllocator()
    loaded = list(_load(allocator, loaded_tensors(inventory, preparation), preparation))
    if preparation.prepare_for_kbit_training:
        loaded = [(tensor, _raised(allocator, tensor, block)) for tensor, block in loaded]
    return sum(block.size - allocated(block.requested_bytes) for _, block in loaded)


def _load(allocator: CachingAllocator, tensors: Iterable[StoredTensor], preparation: Preparation) -> Iterator[tuple[StoredTensor, Block]]:
    """Weights in the order of their names, then buffers; the blocks that stay.

    The small pool splits at 512 bytes, which is what sizes are rounded to: what is small leaves no trace here.
    """
    named = [(name, t) for t in tensors if t.item is not Item.QUANTIZATION_STATE for _, name in copies(t.pattern, t.indices)]
    for _, tensor in sorted(named, key=lambda entry: (entry[1].item is Item.BUFFERS, entry[0])):
        blocks = _large(allocator, tensor.raw_bytes) if tensor.quantization is None else _quantize(allocator, tensor, preparation)
        for block in blocks:
            yield tensor, block


def _quantize(allocator: CachingAllocator, tensor: StoredTensor, preparation: Preparation) -> list[Block]:
    """The weight in full, its scales, the packed weight; with double quantization the scales in bytes, and the first ones go.

    Source: bitsandbytes 0.43.3, nn/modules.py, Params4bit._quantize; functional.py, quantize_4bit and quantize_blockwise.
    """
    assert preparation.quantization is not None
    num_blocks = ceil_div(tensor.num_elements, BLOCK_SIZE)
    passing = _large(allocator, tensor.num_elements * preparation.dtype.itemsize)
    scales = _large(allocator, num_blocks * _ABSMAX_BYTES)
    kept = _large(allocator, tensor.raw_bytes)
    if preparation.quantization.double_quant:
        kept += _large(allocator, num_blocks)
        passing = scales + passing
    else:
        kept += scales
    for block in passing:
        allocator.free(block)
    return kept


def _raised(allocator: CachingAllocator, tensor: StoredTensor, block: Block) -> Block:
    """A 16-bit weight's block after it was replaced by a float32 one.

    Source: peft, utils/other.py, prepare_model_for_kbit_training.
    """
    if tensor.quantization is not None or tensor.item is not Item.WEIGHTS or not tensor.dtype.is_half:
        return block
    (replacement,) = _large(allocator, tensor.num_elements * DType.FLOAT32.itemsize)
    allocator.free(block)
    return replacement


def _large(allocator: CachingAllocator, num_bytes: int) -> list[Block]:
    """A block of the large pool, or none for a small tensor."""
    if num_bytes <= SMALL_REQUEST_BYTES:
        return []
    block = allocator.allocate(num_bytes)
    assert block is not None, "the card has no limit"
    return [block]
