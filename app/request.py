"""The question as users write it, checked field by field. Defaults are not resolved here: absent stays absent."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from estimator.nvidia_smi import MAX_CHARACTERS

MAX_BATCH = 65_536
MAX_LENGTH = 2**24
MAX_RANK = 16_384
MAX_ACCUMULATION = 2**20
MAX_STEP_TOKENS = 2**44
MAX_GIB = 16_384

Name = Annotated[str, Field(min_length=1, max_length=512)]
Names = Annotated[list[Name], Field(max_length=1024)]
Batch = Annotated[int, Field(ge=1, le=MAX_BATCH)]
Length = Annotated[int, Field(ge=1, le=MAX_LENGTH)]
Accumulation = Annotated[int, Field(ge=1, le=MAX_ACCUMULATION)]


class Border(BaseModel):
    """What crosses the border: unknown names, booleans as numbers, NaN and infinities are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


class InlineModel(Border):
    """A model given by the content of its config.json."""

    config: dict[str, JsonValue]


class QuantizationFields(Border):
    """`BitsAndBytesConfig`."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: Name = "float32"
    bnb_4bit_quant_storage: Name = "uint8"
    llm_int8_threshold: Annotated[float, Field(ge=0, le=1e6)] = 6.0
    llm_int8_skip_modules: Names | None = None


class PeftFields(Border):
    """`LoraConfig`."""

    r: Annotated[int, Field(ge=1, le=MAX_RANK)] = 8
    target_modules: Names | Name | None = None
    exclude_modules: Names | Name | None = None
    target_parameters: Names | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_dora: bool = False
    use_rslora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    modules_to_save: Names | None = None
    rank_pattern: Annotated[dict[Name, Annotated[int, Field(ge=1, le=MAX_RANK)]], Field(max_length=1024)] | None = None
    layers_to_transform: Annotated[list[Annotated[int, Field(ge=0, le=100_000)]], Field(max_length=10_000)] | int | None = None
    layers_pattern: Names | Name | None = None
    trainable_token_indices: list[int] | dict[Name, list[int]] | None = None


class CheckpointingFields(Border):
    """`gradient_checkpointing_kwargs`."""

    use_reentrant: bool | None = None
    every_n_layers: Annotated[int, Field(ge=1, le=100_000)] = 1
    offload: bool = False
    selective: bool = False
    preserve_rng_state: bool = True
    determinism_check: str = "default"
    debug: bool = False


class LigerFields(Border):
    """`liger_kernel_config`, as far as it decides the loss."""

    model_config = ConfigDict(extra="ignore")

    fused_linear_cross_entropy: bool | None = None


class TaskFields(Border):
    """What is trained for, with the fields of `DPOConfig`, `GRPOConfig` and of a classification head that decide memory."""

    kind: Literal["sft", "dpo", "reward", "classification", "grpo"] = "sft"
    precompute_ref_log_probs: bool = False
    ref_model: bool = False
    """Whether a model is given to the trainer as `ref_model`."""
    max_prompt_length: Annotated[int, Field(ge=1, le=MAX_LENGTH)] | None = None
    max_completion_length: Length | None = None
    beta: Annotated[float, Field(ge=0, le=1e6)] | None = None
    num_iterations: Annotated[int, Field(ge=1, le=1024)] = 1
    steps_per_generation: Accumulation | None = None
    num_labels: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class TrainingFields(Border):
    """`TrainingArguments` and `SFTConfig`."""

    per_device_train_batch_size: Batch | None = None
    gradient_accumulation_steps: Accumulation | None = None
    max_length: Length | None = None
    optim: Name | None = None
    optim_args: Annotated[str, Field(max_length=1024)] | dict[Name, str | int | float | bool] | None = None
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    bf16: bool | None = None
    fp16: bool | None = None
    gradient_checkpointing: bool | None = None
    gradient_checkpointing_kwargs: CheckpointingFields | None = None
    use_liger_kernel: bool = False
    liger_kernel_config: LigerFields | None = None
    loss_type: Name | None = None
    label_smoothing_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    packing: bool = False
    packing_strategy: Name | None = None
    padding_free: bool = False
    per_device_eval_batch_size: Batch | None = None
    router_aux_loss_coef: Annotated[float, Field(ge=0, le=1e6)] | None = None
    pad_to_multiple_of: Annotated[int, Field(ge=1, le=MAX_LENGTH)] | Literal["auto"] | None = None


class InferenceFields(Border):
    """The arguments of `generate`."""

    batch_size: Batch = 1
    prompt_length: Length = 1024
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_LENGTH)] = 256
    cache_implementation: Literal["dynamic", "static"] = "dynamic"


class DdpFields(Border):
    """accelerate's `DistributedDataParallelKwargs`."""

    bucket_cap_mb: Annotated[int, Field(ge=1, le=65_536)] | None = None
    find_unused_parameters: bool | None = None
    gradient_as_bucket_view: bool = False
    static_graph: bool = False


Elements = Annotated[int, Field(ge=0, le=2**40)] | Literal["auto"]


class OffloadFields(Border):
    """`offload_optimizer`, `offload_param`."""

    model_config = ConfigDict(extra="ignore")

    device: Literal["none", "cpu"] = "none"


class ZeroFields(Border):
    """`zero_optimization`; what has no bearing on memory is passed over."""

    model_config = ConfigDict(extra="ignore")

    stage: Literal[1, 2, 3] | None = None
    offload_optimizer: OffloadFields = OffloadFields()
    offload_param: OffloadFields = OffloadFields()
    reduce_bucket_size: Elements = 500_000_000
    stage3_prefetch_bucket_size: Elements = 50_000_000
    stage3_max_live_parameters: Elements = 1_000_000_000
    stage3_param_persistence_threshold: Elements = 100_000
    overlap_comm: bool | None = None
    contiguous_gradients: bool = True


class DeepSpeedFields(Border):
    """A DeepSpeed JSON."""

    model_config = ConfigDict(extra="ignore")

    zero_optimization: ZeroFields = ZeroFields()


class FsdpFields(Border):
    """`fsdp_config`; what has no bearing on memory is passed over."""

    model_config = ConfigDict(extra="ignore")

    version: Literal[1, 2] = 2
    """1 = FullyShardedDataParallel, 2 = fully_shard."""
    reshard_after_forward: bool = True
    """In version 1 FULL_SHARD; SHARD_GRAD_OP if false."""
    cpu_offload: bool = False
    use_orig_params: bool = True
    """Of version 1."""
    backward_prefetch: Literal["BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"] = "NO_PREFETCH"
    """Of version 1."""


class HardwareFields(Border):
    """The card, how many of it, and how the run is spread over them."""

    gpu: Annotated[str, Field(max_length=512)] | None = None
    capacity_gib: Annotated[float, Field(gt=0, le=MAX_GIB)] | None = None
    filter: Annotated[str, Field(max_length=200)] | None = None
    """Which cards a plan looks at, instead of one: `24GB..80GB 1..8 bf16`."""
    headroom: Annotated[int, Field(ge=0, le=2**50)] | Annotated[str, Field(max_length=32)] | None = None
    """What is kept free on purpose: bytes, `512MiB`, or `5%` of the card."""
    nvidia_smi: Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)] | None = None
    """What `nvidia-smi` prints on the machine: its cards, and what is in use on them."""
    num_gpus: Annotated[int, Field(ge=1, le=1024)] = 1
    strategy: Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp", "device_map", "tensor_parallel"] = "single"
    ddp: DdpFields = DdpFields()
    """Arguments of DistributedDataParallel."""
    deepspeed: DeepSpeedFields = DeepSpeedFields()
    """DeepSpeed's JSON."""
    fsdp_config: FsdpFields = FsdpFields()
    """As in TrainingArguments."""


class SetAside(Border):
    """What files held that is no part of the request made of them, each key by its file and name."""

    ignored: Names = []
    """Keys without a bearing on memory."""
    not_modelled: dict[Name, Annotated[str, Field(max_length=1024)]] = {}
    """Keys that change memory by no formula, and what each does."""
    assumed: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=64)] = []
    """Sentences on what the files leave open."""
    trainer: Literal["axolotl", "llamafactory", "trl", "transformers"] | None = None
    """Whose training file there was: changes stay within it."""


class StackFields(Border):
    """Versions to answer for."""

    torch: Name | None = None
    transformers: Name | None = None
    peft: Name | None = None
    bitsandbytes: Name | None = None
    trl: Name | None = None


class Request(Border):
    """A question to `POST /v1/estimate`."""

    model: Annotated[str, Field(min_length=1, max_length=200)] | InlineModel
    """A bundled id or one of the Hub, or the content of a config.json."""
    revision: Name | None = None
    dtype: Name | None = None
    attn_implementation: Name | None = None
    quantization: QuantizationFields | None = None
    peft: PeftFields | None = None
    prepare_model_for_kbit_training: bool | None = None
    trainer: Literal["transformers", "trl"] = "transformers"
    task: TaskFields = TaskFields()
    training: TrainingFields | None = None
    padded: bool = False
    inference: InferenceFields | None = None
    hardware: HardwareFields | None = None
    pytorch_cuda_alloc_conf: Annotated[str, Field(max_length=1024)] = ""
    """The environment variable of the run."""
    stack: StackFields = StackFields()
    engine: Literal["auto", "analytic", "trace"] = "auto"
    set_aside: SetAside = SetAside()


class PlanRequest(Request):
    """A question to `POST /v1/plan`."""

    global_batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH * 16)] | None = None
    objective: Literal["largest_micro_batch", "longest_sequence", "most_margin"] = "largest_micro_batch"
    policy: Literal["cache_kept", "cache_given_back"] = "cache_kept"
    """Whether a plan for one card leaves room for all that the allocator caches, or lets it give its cache back to make room."""
    sort: Literal["price", "margin", "batch", "length", "memory", "speed", "cost"] = "price"
    """Of the cards, where none is named: `cost` is that of a token."""
    epoch_tokens: Annotated[int, Field(ge=1, le=2**50)] | None = None
    """Tokens of an epoch, for what one costs."""
    confirm: bool = True
    """Whether the allocator is replayed for the first cards of a list, as it is in a plan for one; else what it caches is modelled."""


Axis = (
    Annotated[int, Field(ge=1)]
    | Annotated[str, Field(max_length=200)]
    | Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=10_000)]
)


class SweepFields(Border):
    """The axes: numbers, or `first..last:step`."""

    per_device_train_batch_size: Axis | None = None
    max_length: Axis | None = None
    r: Axis | None = None
    """Ranks of the adapter, one grid for each."""


class SweepRequest(Request):
    """A question to `POST /v1/sweep`."""

    sweep: SweepFields = SweepFields()
    confirm: bool = True
    """Whether the allocator is replayed where the largest batch that fits is looked for; else what it caches is modelled."""
