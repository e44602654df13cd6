"""What the user chose, every default resolved: the frozen value all arithmetic reads."""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from estimator.dtypes import DType
from estimator.gpus import Vendor
from estimator.parallelism.options import Parallel
from estimator.stack import Stack


class QuantizationKind(StrEnum):
    """Storage schemes of bitsandbytes."""

    NF4 = "nf4"
    FP4 = "fp4"
    INT8 = "int8"

    @property
    def is_4bit(self) -> bool:
        return self is not QuantizationKind.INT8


class Attention(StrEnum):
    """`attn_implementation` values with a memory model."""

    EAGER = "eager"
    SDPA = "sdpa"
    FLASH_ATTENTION_2 = "flash_attention_2"
    FLASH_ATTENTION_3 = "flash_attention_3"
    FLEX_ATTENTION = "flex_attention"


class Loss(StrEnum):
    """How logits become a loss."""

    STOCK = "stock"  # transformers' ForCausalLMLoss over full logits
    TRL_CHUNKED = "trl_chunked"  # TRL 1.4–1.15 `chunked_nll`
    TRL_TILED = "trl_tiled"  # TRL ≥ 1.16 fused tiles
    LIGER = "liger"  # Liger's fused linear cross-entropy


class Trainer(StrEnum):
    TRANSFORMERS = "transformers"
    TRL = "trl"


class ObjectiveKind(StrEnum):
    """What is trained for, by the trainer that does it."""

    SFT = "sft"  # next tokens: Trainer, SFTTrainer
    DPO = "dpo"  # DPOTrainer
    REWARD = "reward"  # RewardTrainer
    CLASSIFICATION = "classification"  # Trainer on a model for sequence classification
    GRPO = "grpo"  # GRPOTrainer, its training step without the generation before it

    @property
    def is_classification(self) -> bool:
        """Whether the model ends in a score and not in a vocabulary."""
        return self in (ObjectiveKind.REWARD, ObjectiveKind.CLASSIFICATION)


class Reference(StrEnum):
    """Where a trainer takes the reference's log-probabilities from."""

    NONE = "none"  # the objective needs none, or they were computed before the training
    ADAPTER_OFF = "adapter_off"  # the same weights with the adapter switched off
    MODEL = "model"  # a second model beside the trained one


class CacheKind(StrEnum):
    """`cache_implementation` values with a memory model."""

    DYNAMIC = "dynamic"
    STATIC = "static"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """The fields of `BitsAndBytesConfig` that have a bearing on memory."""

    kind: QuantizationKind
    double_quant: bool = False
    compute_dtype: DType = DType.FLOAT32
    storage_dtype: DType = DType.UINT8
    skip_modules: tuple[str, ...] | None = None
    """`llm_int8_skip_modules`; None = transformers' defaults, a tuple replaces them."""
    threshold: float = 6.0
    """`llm_int8_threshold`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The fields of `LoraConfig` that have a bearing on memory."""

    r: int
    target_modules: tuple[str, ...] | str | None = None
    """Suffixes, one regular expression, `all-linear`, or None for PEFT's default of the model type."""
    exclude_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] = ()
    dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False
    bias: str = "none"
    """`none | all | lora_only`."""
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    trainable_token_indices: tuple[tuple[str, int], ...] = ()
    """(module name, number of tokens)."""
    autocast_adapter_dtype: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The fields of `DPOConfig`, `RewardConfig`, `GRPOConfig` and of a classification head that have a bearing on memory."""

    kind: ObjectiveKind = ObjectiveKind.SFT
    reference: Reference = Reference.NONE
    prompt_length: int = 0
    """Tokens at the beginning of each sequence that are not scored: the prompt of DPO and GRPO."""
    num_labels: int = 1
    """Of the classification head."""
    old_log_probs: bool = False
    """GRPO's log-probabilities of the policy that generated, computed where one generation serves several updates."""

    @property
    def sequences_per_example(self) -> int:
        """A preference is a chosen and a rejected sequence."""
        return 2 if self.kind in (ObjectiveKind.DPO, ObjectiveKind.REWARD) else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The fields of `TrainingArguments` / `SFTConfig` that have a bearing on memory."""

    micro_batch_size: int
    sequence_length: int
    gradient_accumulation_steps: int = 1
    optimizer: str = "adamw_torch_fused"
    """A value of transformers' `OptimizerNames`."""
    optimizer_arguments: tuple[tuple[str, str], ...] = ()
    """`optim_args`, parsed."""
    weight_decay: float = 0.0
    autocast_dtype: DType | None = None
    """bfloat16 with `bf16=True`, float16 with `fp16=True`, None otherwise."""
    gradient_checkpointing: bool = False
    use_reentrant: bool = False
    checkpoint_every_n_layers: int = 1
    loss: Loss = Loss.STOCK
    objective: Objective = Objective()
    padded: bool = False
    """Whether batches carry padding: an attention mask is then materialised."""
    flattened: bool = False
    """Whether the samples of a micro-batch are laid end to end in one row (`padding_free`)."""

    @property
    def decays(self) -> bool:
        """Whether there is any weight decay: how much has no bearing on memory."""
        return self.weight_decay != 0

    def at(self, micro_batch_size: int, sequence_length: int) -> "Training":
        """The same for all whose step is the same program: at some size, with more than one micro-batch or not, decayed or not."""
        return replace(
            self,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            gradient_accumulation_steps=min(2, self.gradient_accumulation_steps),
            weight_decay=float(self.decays),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and length of a micro-batch as the model gets it [samples, tokens]."""
        if self.flattened:
            return 1, self.micro_batch_size * self.sequence_length
        return self.micro_batch_size, self.sequence_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """The arguments of `generate` that have a bearing on memory."""

    batch_size: int
    prompt_length: int
    max_new_tokens: int
    cache: CacheKind = CacheKind.DYNAMIC
    padded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides memory, beside the model itself. Exactly one of `training` and `inference` is set, or neither (load only)."""

    dtype: DType
    """What the weights are loaded as."""
    attention: Attention
    quantization: Quantization | None = None
    adapter: Adapter | None = None
    prepare_for_kbit_training: bool = False
    """Whether PEFT's `prepare_model_for_kbit_training` is called."""
    trainer: Trainer = Trainer.TRANSFORMERS
    training: Training | None = None
    inference: Inference | None = None
    compute_capability: tuple[int, int] = (8, 0)
    """Of the card: kernels are chosen by it."""
    vendor: Vendor = Vendor.NVIDIA
    """Of the card: what was measured under CUDA says nothing of other drivers and libraries."""
    num_multiprocessors: int = 108
    """Of the card: the CUDA context grows with them. An A100 when no card is named."""
    parallel: Parallel = field(default_factory=Parallel)
    """How the run is spread over cards; batches are those of one rank."""
    stack: Stack

    @property
    def of_reference(self) -> "Recipe | None":
        """The objective's second model, where it has one: loaded like the first, with no adapter, not prepared and not trained.

        Source: trl 1.16, trainer/dpo_trainer.py, DPOTrainer.__init__ (create_model_from_path with the policy's type).
        """
        if self.training is None or self.training.objective.reference is not Reference.MODEL:
            return None
        return replace(self, adapter=None, prepare_for_kbit_training=False, training=None)

    def without_sizes(self) -> "Recipe":
        """With batch and lengths struck out: what is kept for all of them is kept under this."""
        training, inference = self.training, self.inference
        return replace(
            self,
            training=None if training is None else training.at(1, 1),
            inference=None if inference is None else replace(inference, batch_size=1, prompt_length=1, max_new_tokens=1),
        )
