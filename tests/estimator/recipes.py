"""Recipes on bundled models, as users would ask for them."""

from functools import cache

from estimator.dtypes import DType
from estimator.inventory import Inventory
from estimator.recipe import Adapter, Attention, Inference, Loss, Quantization, QuantizationKind, Recipe, Trainer, Training
from estimator.sources.resolve import resolve
from estimator.stack import Stack

NF4 = Quantization(kind=QuantizationKind.NF4, double_quant=True, compute_dtype=DType.BFLOAT16)
ALL_LINEAR = Adapter(r=16, target_modules="all-linear")


@cache
def model(name: str) -> Inventory:
    """A bundled model."""
    return resolve(name, None).inventory


def training(
    batch: int = 1,
    length: int = 512,
    *,
    method: str = "qlora",
    adapter: Adapter = ALL_LINEAR,
    optimizer: str = "adamw_torch_fused",
    checkpointing: bool = True,
    loss: Loss = Loss.STOCK,
    accumulation: int = 1,
    attention: Attention = Attention.SDPA,
    every_n_layers: int = 1,
    compute_capability: tuple[int, int] = (8, 0),
    stack: Stack | None = None,
) -> Recipe:
    """`full`, `lora` or `qlora` in bfloat16."""
    return Recipe(
        dtype=DType.BFLOAT16,
        attention=attention,
        quantization=NF4 if method == "qlora" else None,
        adapter=None if method == "full" else adapter,
        trainer=Trainer.TRANSFORMERS if loss is Loss.STOCK else Trainer.TRL,
        training=Training(
            micro_batch_size=batch,
            sequence_length=length,
            optimizer=optimizer,
            autocast_dtype=DType.BFLOAT16,
            gradient_checkpointing=checkpointing,
            checkpoint_every_n_layers=every_n_layers,
            gradient_accumulation_steps=accumulation,
            loss=loss,
        ),
        compute_capability=compute_capability,
        stack=stack or Stack(),
    )


def inference(batch: int = 1, prompt: int = 512, new: int = 64) -> Recipe:
    """Generation in bfloat16 with a dynamic cache."""
    return Recipe(
        dtype=DType.BFLOAT16,
        attention=Attention.SDPA,
        inference=Inference(batch_size=batch, prompt_length=prompt, max_new_tokens=new),
        stack=Stack(),
    )
