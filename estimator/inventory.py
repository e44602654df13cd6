"""Every tensor the framework would create for a model: the table all arithmetic stands on."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product
from types import MappingProxyType

from estimator.dtypes import DType


class ModuleKind(StrEnum):
    """What owns a tensor, as far as quantization, adapters and optimizers tell modules apart."""

    LINEAR = "linear"  # type(module) is torch.nn.Linear, nothing derived from it
    CONV1D = "conv1d"  # transformers.pytorch_utils.Conv1D: weight is (in, out)
    EMBEDDING = "embedding"  # isinstance of torch.nn.Embedding
    OTHER = "other"  # norms, convolutions, fused experts, routers, raw parameters


class TensorRole(StrEnum):
    """How a tensor is registered with its module."""

    PARAMETER = "parameter"
    BUFFER = "buffer"  # persistent: part of the state dict
    NONPERSISTENT_BUFFER = "nonpersistent_buffer"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """One kind of tensor, repeated over layers (and experts, where these are modules)."""

    pattern: str
    """Qualified name with each numeric path component replaced by `{}`: `model.layers.{}.mlp.up_proj.weight`."""
    indices: tuple[tuple[int, ...], ...]
    """For each `{}` in turn the numbers it takes; the copies are the cartesian product. Empty when there is no `{}`."""
    shape: tuple[int, ...]
    dtype: DType
    """As `from_config` creates it under float32: parameters float32 unless the module fixes another type; buffers their own."""
    role: TensorRole
    module_kind: ModuleKind
    module_class: str
    """Class name of the owning module: `Linear`, `LlamaRMSNorm`, `MixtralExperts`."""
    tied_to: str | None = None
    """Full name of the tensor whose storage this one shares: counted there, not here."""
    dtype_is_fixed: bool = False
    """Whether the module asks for `dtype` by name, so that another load dtype does not change it (rotary frequencies, some routers)."""
    is_frozen: bool = False
    """Whether the module itself turns the gradient off: not trained even without an adapter (sinusoidal positions)."""

    @property
    def num_copies(self) -> int:
        """Number of tensors this row stands for."""
        return math.prod(len(choices) for choices in self.indices)

    @property
    def num_elements(self) -> int:
        """Scalars in one copy."""
        return math.prod(self.shape)

    @property
    def module_pattern(self) -> str:
        """Pattern of the owning module's name."""
        return self.pattern.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Name of the tensor inside its module: `weight`, `bias`, `gate_up_proj`."""
        return self.pattern.rpartition(".")[2]

    def names(self) -> Iterator[str]:
        """Full names of all copies."""
        for numbers in product(*self.indices):
            yield self.pattern.format(*numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """A model as its framework would build it, without weights. Compared and hashed by `content_hash`."""

    content_hash: str
    """Identifies config content and library versions."""
    model_type: str
    """`model_type` of the text decoder whose blocks are modelled (for composite configs the text part's)."""
    model_class: str
    """`LlamaForCausalLM`."""
    transformers_version: str
    rows: tuple[TensorRow, ...] = field(repr=False)
    """Parameters, then buffers, each in registration order."""
    input_embedding: str | None
    """Module name of the input embedding: `model.embed_tokens`."""
    output_embedding: str | None
    """Module name of the head, also when tied: `lm_head`."""
    last_parameter_module: str
    """Module that owns the last parameter in `named_parameters()`: bitsandbytes skips it by default."""
    layers_prefix: str | None
    """Module name of the list of decoder layers: `model.layers`."""
    num_layers: int
    keep_in_fp32_modules: tuple[str, ...] = ()
    """`_keep_in_fp32_modules` of the class."""
    keep_in_fp32_modules_strict: tuple[str, ...] = ()
    tied_names: tuple[str, ...] = ()
    """Full names of all tensors that share another's storage, and of the tensors they share, as the class declares it
    (`all_tied_weights_keys`): what the skip rule of quantization reads."""
    supported_attention: tuple[str, ...] = ("eager",)
    default_attention: str = "eager"
    """What transformers would choose with `attn_implementation` absent."""
    config: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    """The (text) config as transformers resolved it: plain JSON values only."""
    checkpoint_dtype: DType | None = None
    """The config's own `dtype`, what `dtype="auto"` means."""
    is_stored: bool = False
    """Whether the rows are those of a checkpoint's files, without a class: only what they take when loaded can be told."""

    def __hash__(self) -> int:
        return hash(self.content_hash)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inventory) and other.content_hash == self.content_hash

    @property
    def parameters(self) -> tuple[TensorRow, ...]:
        """Rows that are parameters with storage of their own."""
        return tuple(r for r in self.rows if r.role is TensorRole.PARAMETER and r.tied_to is None)

    @property
    def buffers(self) -> tuple[TensorRow, ...]:
        return tuple(r for r in self.rows if r.role is not TensorRole.PARAMETER and r.tied_to is None)

    @property
    def num_positions(self) -> int | None:
        """How many positions the config says the model knows."""
        known = (self.config.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
        return next((value for value in known if isinstance(value, int)), None)

    @property
    def learns_positions(self) -> bool:
        """Whether positions are learned, so that more than there are cannot be had."""
        return any(
            row.module_kind is ModuleKind.EMBEDDING and (row.module_pattern.endswith("wpe") or "position" in row.module_pattern)
            for row in self.parameters
        )

    @property
    def num_parameters(self) -> int:
        """Logical scalars of the model, a tied tensor counted once."""
        return sum(r.num_elements * r.num_copies for r in self.parameters)
