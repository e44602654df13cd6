"""How a run is spread over cards, in the words of the libraries that spread it."""

from dataclasses import dataclass
from enum import StrEnum

from estimator.units import MIB


class Strategy(StrEnum):
    """Who holds what."""

    SINGLE = "single"
    DDP = "ddp"  # torch's DistributedDataParallel
    ZERO1 = "zero1"  # DeepSpeed: optimizer states shared out
    ZERO2 = "zero2"  # and gradients
    ZERO3 = "zero3"  # and parameters
    FSDP = "fsdp"  # torch's fully_shard (FSDP2) or FullyShardedDataParallel (FSDP1), as accelerate applies it
    DEVICE_MAP = "device_map"  # layers placed on cards by accelerate, one process
    TENSOR_PARALLEL = "tensor_parallel"  # every layer cut along its width by transformers, `tp_plan="auto"`

    @property
    def is_data_parallel(self) -> bool:
        """Whether each rank reads samples of its own."""
        return self not in (Strategy.SINGLE, Strategy.DEVICE_MAP, Strategy.TENSOR_PARALLEL)

    @property
    def runs_alone(self) -> bool:
        """Whether its library does its work on a single rank too, with copies, casts and offloading as on several."""
        return self is Strategy.FSDP or self.zero_stage > 0

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's stage; 0 for other strategies."""
        return {Strategy.ZERO1: 1, Strategy.ZERO2: 2, Strategy.ZERO3: 3}.get(self, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ddp:
    """Fields of `TrainingArguments` and of accelerate's `DistributedDataParallelKwargs`.

    Source: torch, csrc/distributed/c10d/reducer.hpp (kDefaultBucketBytesCap, kDefaultFirstBucketBytes).
    """

    bucket_cap_mb: int | None = None
    """`ddp_bucket_cap_mb`; None = torch's default, 25 MiB after a first bucket of 1 MiB [MiB]."""
    find_unused_parameters: bool | None = None
    """`ddp_find_unused_parameters`; None = what the Trainer chooses."""
    gradient_as_bucket_view: bool = False
    static_graph: bool = False

    @property
    def limits_bytes(self) -> tuple[int, ...]:
        """Sizes at which buckets are closed: the first, then all others [bytes]."""
        return (1 * MIB, 25 * MIB) if self.bucket_cap_mb is None or self.bucket_cap_mb == 25 else (self.bucket_cap_mb * MIB,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero:
    """Fields of `zero_optimization` in a DeepSpeed JSON; sizes count elements, not bytes.

    Source: deepspeed, runtime/zero/config.py, DeepSpeedZeroConfig.
    """

    offload_optimizer: bool = False
    """`offload_optimizer.device` is `cpu`."""
    offload_param: bool = False
    """`offload_param.device` is `cpu`."""
    reduce_bucket_size: int = 500_000_000
    allgather_bucket_size: int = 500_000_000
    prefetch_bucket_size: int = 50_000_000
    """`stage3_prefetch_bucket_size`."""
    max_live_parameters: int = 1_000_000_000
    """`stage3_max_live_parameters`."""
    param_persistence_threshold: int = 100_000
    """`stage3_param_persistence_threshold`."""
    overlap_comm: bool | None = None
    """None = DeepSpeed's default: true at stage 3."""
    contiguous_gradients: bool = True


class BackwardPrefetch(StrEnum):
    """When FSDP1 gathers the next unit of the backward pass."""

    PRE = "BACKWARD_PRE"  # before the gradients of the unit that runs
    POST = "BACKWARD_POST"  # after them
    NONE = "NO_PREFETCH"  # when it is needed


@dataclass(frozen=True, slots=True, kw_only=True)
class Fsdp:
    """Fields of `fsdp_config`, with the Trainer's defaults; what version 1 alone knows has no meaning in version 2."""

    version: int = 2
    """1 = FullyShardedDataParallel, 2 = fully_shard."""
    reshard_after_forward: bool = True
    """In version 1 FULL_SHARD; SHARD_GRAD_OP if false."""
    offload_params: bool = False
    """`cpu_offload`: parameters, gradients and states on the host."""
    use_orig_params: bool = True
    """Of version 1."""
    backward_prefetch: BackwardPrefetch = BackwardPrefetch.NONE
    """Of version 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How a run is spread over cards."""

    strategy: Strategy = Strategy.SINGLE
    num_gpus: int = 1
    ddp: Ddp = Ddp()
    zero: Zero = Zero()
    fsdp: Fsdp = Fsdp()
    max_memory_bytes: tuple[int, ...] = ()
    """`max_memory` of a device map, one figure for each card; empty = what is free on equal, large enough cards [bytes]."""

    @property
    def is_spread(self) -> bool:
        """Whether several cards share the work, or one is run by a library that shares it out."""
        return self.strategy is not Strategy.SINGLE and (self.num_gpus > 1 or self.strategy.runs_alone)

    @property
    def num_replicas(self) -> int:
        """Ranks that read samples of their own: the global batch is `micro-batch × accumulation × num_replicas`."""
        return self.num_gpus if self.strategy.is_data_parallel else 1
