"""Single changes to a request that can save memory: the fields to set, and what each costs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf
from typing import Any

from app.answer import Json
from app.request import Request
from estimator.allocator_settings import parse_settings
from estimator.dtypes import DType
from estimator.gpus import Gpu, Vendor, all_gpus
from estimator.inventory import Inventory
from estimator.liger import fuses_loss
from estimator.offers import cheapest
from estimator.phases import Item
from estimator.planner import LENGTH_STEP, divisors
from estimator.recipe import Attention, Loss, ObjectiveKind, Recipe, Trainer
from estimator.static_memory import static_memory
from estimator.step import needs_mask
from estimator.storage import StoredTensor
from estimator.units import gib

# Compute capability from which bfloat16 is not emulated.
NATIVE_BFLOAT16 = (8, 0)
# Ranks that people use.
_RANKS = (64, 32, 16, 8, 4)
_LORA = {"r": 16, "target_modules": "all-linear"}
_ATTENTION_ALONE = ["q_proj", "v_proj"]
_NUM_CARDS = (2, 4, 8)


class Cost(StrEnum):
    """What a change takes from the user, the smallest first."""

    NONE = "none"  # a setting: the same training, as fast
    STEPS = "steps"  # the same training in smaller pieces
    PACKAGE = "package"  # the same training with a package more
    THROUGHPUT = "throughput"  # the same training, slower
    PRECISION = "precision"
    CODE = "code"  # another trainer, with defaults of its own
    QUALITY = "quality"  # another training
    DATA = "data"
    MONEY = "money"

    @property
    def rank(self) -> int:
        """The place in the order of preference."""
        return list(Cost).index(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """One change."""

    set: Json
    """Path of a field and its value."""
    cost: Cost
    costs: str
    """The same for people."""
    family: str
    """Changes of one kind, of which one is enough; they follow each other from the mildest to the strongest."""


def levers(request: Request, recipe: Recipe, inventory: Inventory, payload: Mapping[str, Any], *, global_batch: int) -> list[Lever]:
    """What could be changed, the smallest cost first. Whether it helps, or is accepted at all, is for an estimate to say.

    Args:
        payload: the request as it was written, whose fields some changes take away.
        global_batch: samples per optimizer step of one card, which changes of the micro-batch keep.
    """
    found = [
        *_allocator(request, recipe),
        *_kernels(request, recipe),
        *_losses(request, recipe, inventory),
        *_batches(recipe, global_batch),
        *_recomputing(recipe),
        *_weights(recipe, inventory, payload),
        *_adapters(recipe, inventory),
        *_lengths(recipe),
        *_machines(request, recipe, global_batch),
    ]
    return sorted(found, key=lambda lever: lever.cost.rank)


def _lever(family: str, cost: Cost, costs: str, setting: Json) -> Lever:
    return Lever(set=setting, cost=cost, costs=costs, family=family)


def _allocator(request: Request, recipe: Recipe) -> Iterator[Lever]:
    """Segments that grow: blocks of any size are cut from them, so that less lies idle.

    Source: torch, docs/source/notes/cuda.rst, `expandable_segments`; c10/cuda/CUDACachingAllocator.cpp (CUDA's virtual memory, Linux).
    """
    if recipe.vendor is not Vendor.NVIDIA or parse_settings(request.pytorch_cuda_alloc_conf).expandable_segments:
        return
    others = [part for part in request.pytorch_cuda_alloc_conf.split(",") if part and not part.strip().startswith("expandable_segments")]
    yield _lever(
        "expandable_segments",
        Cost.NONE,
        "an environment variable of the run; needs Linux",
        {"pytorch_cuda_alloc_conf": ",".join((*others, "expandable_segments:True"))},
    )


def _kernels(request: Request, recipe: Recipe) -> Iterator[Lever]:
    training = recipe.training
    assert training is not None
    if request.attn_implementation == Attention.EAGER:
        yield _lever("sdpa", Cost.NONE, "attention weights are not returned", {"attn_implementation": "sdpa"})
    would_help = (training.flattened and needs_mask(recipe)) or recipe.attention is Attention.EAGER
    if would_help and recipe.compute_capability >= NATIVE_BFLOAT16:
        yield _lever("flash_attention_2", Cost.PACKAGE, "needs flash-attn", {"attn_implementation": "flash_attention_2"})
    if training.padded and recipe.trainer is Trainer.TRL:
        yield _lever(
            "packing",
            Cost.DATA,
            "samples share rows instead of being padded: an optimizer step sees more of them",
            {"training.packing": True},
        )
        yield _lever("padding_free", Cost.NONE, "samples lie end to end instead of being padded", {"training.padding_free": True})


def _losses(request: Request, recipe: Recipe, inventory: Inventory) -> Iterator[Lever]:
    training = recipe.training
    assert training is not None
    if training.loss is not Loss.STOCK or training.objective.kind is not ObjectiveKind.SFT:
        return
    stack, asked = recipe.stack, request.training.loss_type if request.training is not None else None
    if recipe.trainer is Trainer.TRL and stack.sft_knows_chunked_loss and not stack.sft_tiles_loss and asked != "dft":
        costs = "SFTTrainer's loss in chunks of tokens: the head's products are made twice"  # fused_loss.chunked_loss
        yield _lever("chunked_loss", Cost.THROUGHPUT, costs, {"training.loss_type": "chunked_nll"})
    if fuses_loss(inventory):
        yield _lever("liger", Cost.PACKAGE, "needs liger-kernel", {"training.use_liger_kernel": True})
    if recipe.trainer is Trainer.TRANSFORMERS and (stack.sft_tiles_loss or stack.sft_chunks_loss_by_default):
        yield _lever("trl", Cost.CODE, "TRL's SFTTrainer with its fused loss, and its defaults for all else", {"trainer": "trl"})


def _batches(recipe: Recipe, global_batch: int) -> Iterator[Lever]:
    training = recipe.training
    assert training is not None
    for size in reversed(divisors(global_batch)):
        if size < training.micro_batch_size:
            yield _lever(
                "micro_batch",
                Cost.STEPS,
                f"{global_batch // size} accumulation steps instead of {training.gradient_accumulation_steps}",
                {"training.per_device_train_batch_size": size, "training.gradient_accumulation_steps": global_batch // size},
            )


def _recomputing(recipe: Recipe) -> Iterator[Lever]:
    training, quantization = recipe.training, recipe.quantization
    assert training is not None
    if not training.gradient_checkpointing:
        yield _lever("checkpointing", Cost.THROUGHPUT, "about 30 % slower", {"training.gradient_checkpointing": True})
    elif quantization is not None and not quantization.kind.is_4bit and not training.use_reentrant:
        yield _lever(
            "reentrant",
            Cost.NONE,
            "inputs of the layers must require gradients",
            {"training.gradient_checkpointing_kwargs.use_reentrant": True},
        )


def _weights(recipe: Recipe, inventory: Inventory, payload: Mapping[str, Any]) -> Iterator[Lever]:
    training, quantization = recipe.training, recipe.quantization
    assert training is not None
    half = DType.BFLOAT16 if recipe.compute_capability >= NATIVE_BFLOAT16 else DType.FLOAT16
    if training.optimizer == "adamw_torch":
        yield _lever(
            "fused", Cost.NONE, "the same optimizer, all of a tensor's step in one kernel", {"training.optim": "adamw_torch_fused"}
        )
    if "8bit" not in training.optimizer and "4bit" not in training.optimizer:
        yield _lever("optimizer", Cost.PRECISION, "8-bit optimizer states, which may be paged out", {"training.optim": "paged_adamw_8bit"})
    if recipe.prepare_for_kbit_training:
        kept = upcast_parts(inventory, recipe)
        if kept:
            yield _lever("preparation", Cost.PRECISION, f"{kept} stay in 16 bits", {"prepare_model_for_kbit_training": False})
    if not recipe.dtype.is_half and (recipe.adapter is not None or half is DType.BFLOAT16):  # trained float16 weights are refused
        yield _lever("dtype", Cost.PRECISION, "16-bit weights", {"dtype": half.value})
    nf4 = {"quantization": _nf4(half), **{name: None for name in ("load_in_4bit", "load_in_8bit") if payload.get(name) is not None}}
    if recipe.adapter is None:
        yield _lever("lora", Cost.QUALITY, "trains an adapter, not the model", {"peft": _LORA})
        yield _lever("qlora", Cost.QUALITY, "trains an adapter on 4-bit base weights, slower steps", {"peft": _LORA, **nf4})
    elif quantization is None or not quantization.kind.is_4bit:
        yield _lever("nf4", Cost.PRECISION, "slower steps, 4-bit base weights", nf4)
    elif not quantization.double_quant:
        yield _lever("double_quant", Cost.NONE, "the constants are quantized as well", {"quantization.bnb_4bit_use_double_quant": True})


def upcast_parts(inventory: Inventory, recipe: Recipe) -> str:
    """What the preparation for k-bit training turns into float32, the largest part first, with its size in 16 bits; empty: nothing.

    Source: peft, utils/other.py, prepare_model_for_kbit_training: every 16-bit parameter but packed 4-bit weights, fused experts included.
    """
    unprepared = static_memory(inventory, replace(recipe, prepare_for_kbit_training=False)).tensors
    sizes: dict[str, int] = {}
    for tensor in unprepared:
        if tensor.item is Item.WEIGHTS and tensor.dtype.is_half and tensor.quantization is None:
            part = _part_of(tensor, inventory)
            sizes[part] = sizes.get(part, 0) + tensor.num_copies * tensor.raw_bytes
    named = [f"{part} ({gib(size)})" for part, size in sorted(sizes.items(), key=lambda pair: -pair[1])]
    return ", ".join(named[:-1]) + (" and " if len(named) > 1 else "") + "".join(named[-1:])


def _part_of(tensor: StoredTensor, inventory: Inventory) -> str:
    name = f"{tensor.pattern}."
    if "experts" in tensor.pattern:
        return "experts"
    if inventory.input_embedding is not None and name.startswith(f"{inventory.input_embedding}."):
        return "embedding"
    if inventory.output_embedding is not None and name.startswith(f"{inventory.output_embedding}."):
        return "head"
    return "norms" if "norm" in tensor.module_class.lower() or "norm" in tensor.pattern.lower() else "other layers"


def _adapters(recipe: Recipe, inventory: Inventory) -> Iterator[Lever]:
    adapter = recipe.adapter
    if adapter is None:
        return
    for rank in _RANKS:
        if rank < adapter.r:
            yield _lever("rank", Cost.QUALITY, f"rank {rank} instead of {adapter.r}", {"peft.r": rank})
    has_them = all(any(row.module_pattern.endswith(f".{name}") for row in inventory.parameters) for name in _ATTENTION_ALONE)
    if has_them and (isinstance(adapter.target_modules, str) or len(adapter.target_modules or ()) > len(_ATTENTION_ALONE)):
        yield _lever("targets", Cost.QUALITY, "adapters on queries and values alone", {"peft.target_modules": _ATTENTION_ALONE})


def _lengths(recipe: Recipe) -> Iterator[Lever]:
    training = recipe.training
    assert training is not None
    half = training.sequence_length // 2 // LENGTH_STEP * LENGTH_STEP
    if half:
        yield shorter(half)


def shorter(length: int) -> Lever:
    """Shorter samples."""
    return _lever("length", Cost.DATA, "longer samples are cut", {"training.max_length": length})


def _machines(request: Request, recipe: Recipe, global_batch: int) -> Iterator[Lever]:
    """More cards, which share the samples of an optimizer step evenly: where they cannot, that number is not offered."""
    assert recipe.training is not None
    hardware = request.hardware
    if hardware is None or hardware.num_gpus > 1 or (hardware.strategy != "single" and not recipe.parallel.strategy.runs_alone):
        return
    strategy = {"hardware.strategy": "fsdp"} if hardware.strategy == "single" else {}  # else it is said, here or in `training`
    for number in _NUM_CARDS:
        steps, rest = divmod(global_batch, recipe.training.micro_batch_size * number)
        if rest:
            continue
        sizes = {} if steps == recipe.training.gradient_accumulation_steps else {"training.gradient_accumulation_steps": steps}
        yield _lever(
            "num_gpus",
            Cost.MONEY,
            f"{number} cards that share weights, states and the samples of a step",
            {"hardware.num_gpus": number, **strategy, **sizes},
        )


def another_card(gpu: Gpu, payload: Mapping[str, Any]) -> Lever:
    """The same run on another card."""
    hardware = payload.get("hardware")
    given = hardware if isinstance(hardware, Mapping) else {}
    offer = cheapest(gpu.id)
    price = f", {offer.usd_per_hour_min:.2f} USD/h at {offer.provider} ({offer.date})" if offer is not None else ""
    others = {f"hardware.{name}": None for name in ("capacity_gib", "nvidia_smi") if given.get(name) is not None}
    return Lever(
        set={"hardware.gpu": gpu.id, **others},
        cost=Cost.MONEY,
        family="card",
        costs=f"a card of {gpu.label_gb:g} GB{price}",
    )


def larger_cards(capacity_bytes: int, recipe: Recipe) -> list[Gpu]:
    """Cards for bitsandbytes' CUDA path that hold more, the smallest label first; of one label the cheapest, those without a price last.

    A run in bfloat16 is not sent from a card that computes in it to one that emulates it.
    """
    keeps_native = computes_in_bfloat16(recipe) and recipe.compute_capability >= NATIVE_BFLOAT16
    larger = [
        gpu
        for gpu in all_gpus()
        if gpu.capacity_bytes > capacity_bytes
        and gpu.vendor is Vendor.NVIDIA
        and not gpu.is_modified
        and (gpu.compute_capability >= NATIVE_BFLOAT16 or not keeps_native)
    ]
    return sorted(larger, key=lambda gpu: (gpu.label_gb, _price(gpu), gpu.capacity_bytes))


def computes_in_bfloat16(recipe: Recipe) -> bool:
    """Whether weights, autocast or 4-bit products are of that type."""
    training, quantization = recipe.training, recipe.quantization
    products = quantization.compute_dtype if quantization is not None and quantization.kind.is_4bit else None
    return DType.BFLOAT16 in (recipe.dtype, training.autocast_dtype if training is not None else None, products)


def _price(gpu: Gpu) -> float:
    offer = cheapest(gpu.id)
    return offer.usd_per_hour_min if offer is not None else inf


def _nf4(compute_dtype: DType) -> Json:
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute_dtype.value,
    }
