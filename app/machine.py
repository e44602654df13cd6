"""Warnings about the machine: what others hold of its memory, its other cards, and cards that are not CUDA's."""

from collections.abc import Iterable

from app.answered import Answered, Rule
from estimator.gpus import Vendor
from estimator.optimizers import BITSANDBYTES
from estimator.units import gib


def _in_use(a: Answered) -> Iterable[str]:
    if a.card is not None and a.card.occupants:
        yield (
            f"{a.card.occupants}; it is counted against the capacity. Processes left over from earlier runs, notebooks above all, hold "
            "memory until they end."
        )


def _rank(a: Answered) -> str:
    number = a.recipe.parallel.num_gpus
    return "most" if number == 1 else f"least of the {number} with the most"


def _other_cards(a: Answered) -> Iterable[str]:
    if a.card is not None and a.card.beside:
        yield (
            f"nvidia-smi shows {1 + len(a.card.beside)} cards; this is the answer for {a.card.name}, which has the {_rank(a)} free memory. "
            f"Beside it: {', '.join(a.card.beside)}."
        )


def _variant(a: Answered) -> Iterable[str]:
    if a.card is not None and a.card.is_variant:
        yield (
            f"this {a.card.name} reports another total than the catalogue's (error correction switched, or memory changed): "
            f"{gib(a.card.capacity_bytes)} is what is left of it when the driver keeps as much as usual."
        )


def _outside_cuda(a: Answered) -> Iterable[str]:
    """Source: bitsandbytes 0.50, README.md, table of accelerators: gfx942 under ROCm."""
    if a.card is None or a.card.vendor is Vendor.NVIDIA:
        return
    training = a.recipe.training
    optimizer = training is not None and training.optimizer in BITSANDBYTES
    if a.recipe.quantization is not None or optimizer:
        what = "quantized layers" if a.recipe.quantization is not None else "optimizer"
        yield (
            f"{a.card.name} is outside bitsandbytes' CUDA path: its {what} run there on a ROCm build of their own (bitsandbytes 0.50 lists "
            "gfx942), and what this answer says of them was read from the CUDA build. 16-bit LoRA needs no bitsandbytes."
        )


def _one_rank(a: Answered) -> Iterable[str]:
    """Source: transformers 5.23, trainer.py, Trainer.__init__ (ParallelMode.DISTRIBUTED)."""
    parallel = a.recipe.parallel
    if parallel.strategy.runs_alone and parallel.num_gpus == 1:
        launch = (
            " The Trainer takes FSDP in a launched process only (torchrun, accelerate launch)." if not parallel.strategy.zero_stage else ""
        )
        yield (
            f"{parallel.strategy.value} on one GPU shares nothing out: this is the answer for a single process, which casts, copies and "
            f"offloads as each of several does. hardware.num_gpus says how many there are.{launch}"
        )


RULES: tuple[tuple[Rule, str], ...] = (
    (_in_use, "memory_in_use"),
    (_other_cards, "several_cards"),
    (_variant, "card_variant"),
    (_outside_cuda, "outside_cuda"),
    (_one_rank, "one_rank"),
)
