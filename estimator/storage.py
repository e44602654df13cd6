"""The tensors that lie on the device between steps: one row per kind, with its width and whether it is trained."""

import math
from dataclasses import dataclass

from estimator.dtypes import DType
from estimator.inventory import ModuleKind
from estimator.phases import Item
from estimator.recipe import QuantizationKind
from estimator.units import allocated


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One kind of stored tensor. Packed weights and each part of their quantization state are rows of their own."""

    pattern: str
    """Name as PEFT-free PyTorch would give it, `{}` for indices: `model.layers.{}.self_attn.q_proj.weight`, `….q_proj.weight.absmax`,
    `….q_proj.lora_A.weight`."""
    indices: tuple[tuple[int, ...], ...]
    """For each `{}` the numbers it takes, as in `TensorRow`."""
    item: Item
    """`weights`, `quantization_state`, `buffers` or `adapter_weights`."""
    shape: tuple[int, ...]
    """Logical shape: for packed weights that of the unpacked weight."""
    dtype: DType
    """Type of the storage: `uint8` for packed 4-bit weights, `int8` for LLM.int8."""
    raw_bytes: int
    """Storage of one copy [bytes]."""
    module_kind: ModuleKind
    module_class: str = ""
    """Class name of the owning module: weight decay spares `LayerNorm` by it."""
    trainable: bool = False
    quantization: QuantizationKind | None = None
    """Set on packed weights only."""

    @property
    def num_copies(self) -> int:
        return math.prod(len(choices) for choices in self.indices)

    @property
    def num_elements(self) -> int:
        """Logical scalars of one copy."""
        return math.prod(self.shape)

    @property
    def allocated_bytes(self) -> int:
        """All copies, each rounded up as the allocator does [bytes]."""
        return self.num_copies * allocated(self.raw_bytes)
