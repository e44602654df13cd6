"""How long a training step takes: a first estimate, from FLOPs, bytes moved, and what cards reach of their peaks.

Every matrix product takes the longer of its arithmetic and its memory traffic; what lies between products is traffic alone; one thing runs
after the other. Nothing is known of the input pipeline, of the processor in front of the card, or of links between cards.

Legend: T tokens of a micro-batch, h hidden size, V vocabulary, M × K × N a product.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from estimator.dtypes import DType
from estimator.errors import RequestError
from estimator.flops import AttentionCore, Pass, Product, StepFlops, head_positions, on_any_card, step_flops, step_program
from estimator.gpus import Gpu
from estimator.inventory import Inventory
from estimator.recipe import Recipe
from estimator.static_memory import static_memory

BASIS = "modelled"

# What is reached of a card's dense peak by products and by attention kernels, and of its bandwidth by kernels that do little else: round
# assumptions, set before they were held against any run, and not moved since.
PRODUCT_EFFICIENCY = 0.75
ATTENTION_EFFICIENCY = 0.5
BANDWIDTH_EFFICIENCY = 0.8
# The efficiency of products is an A100's, whose best product reaches 85.9 %; cards whose best one is published are scaled by it.
_A100_MATMUL_SHARE = 0.859

# Measured time over estimated time, smallest and largest of 42 published runs on one A100 (tests/calibration/test_throughput.py prints
# them): full, LoRA and QLoRA of Mistral-7B and santacoder, flash attention, reentrant checkpointing.
JUDGED_GPUS = frozenset({"a100-80"})
JUDGED_RANGE = (0.86, 1.23)
# No published run judges other cards: a factor of two, a plain choice, since some are held below their peaks by their power limits.
UNJUDGED_RANGE = (0.6, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """One optimizer step on so many cards."""

    work: "StepWork"
    gpu: Gpu
    num_gpus: int
    seconds: float
    parts: Mapping[str, float]
    """`products`, `attention`, `dequantization`, `elementwise`, `loss`, `optimizer` [s]."""
    basis: str = BASIS

    @property
    def seconds_range(self) -> tuple[float, float]:
        """By the errors seen on published runs, where the card is that of such runs; else by a plain factor [s]."""
        low, high = JUDGED_RANGE if self.gpu.id in JUDGED_GPUS and self.num_gpus == 1 else UNJUDGED_RANGE
        return self.seconds * low, self.seconds * high

    @property
    def tokens(self) -> int:
        """Of the whole step, on all cards."""
        return self.work.tokens * self.num_gpus

    @property
    def flops(self) -> int:
        """Executed by one card in the step, by torch's count [FLOP]."""
        return self.work.flops.total * self.work.accumulation

    @property
    def model_flops(self) -> int:
        """Of them without recomputation [FLOP]."""
        return self.work.flops.model * self.work.accumulation

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the time rests on, in words."""
        return _assumptions(self.work, _Card.of(self.gpu), self.gpu, self.num_gpus)

    @property
    def tokens_per_second(self) -> float:
        """On all cards together [tokens/s]."""
        return self.tokens / self.seconds

    def usd_per_million_tokens(self, usd_per_hour: float) -> float:
        """What a million tokens cost at a price for all cards together [USD]."""
        return usd_per_hour / 3600 * 1e6 / self.tokens_per_second

    def epoch_hours(self, num_tokens: int) -> float:
        """How long so many tokens take [h]."""
        return num_tokens / self.tokens_per_second / 3600

    def usd_per_epoch(self, num_tokens: int, usd_per_hour: float) -> float:
        """What so many tokens cost [USD]."""
        return self.epoch_hours(num_tokens) * usd_per_hour


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What one optimizer step has to do, whatever the card."""

    products: tuple[tuple[float, float, DType], ...]
    """Of products of one shape together, in all their runs: arithmetic [FLOP], traffic [bytes], type of the factors."""
    kernels: tuple[tuple[float, DType], ...]
    """Attention in one kernel: arithmetic that is left of it under the causal mask [FLOP]."""
    written_out: tuple[tuple[float, float, DType], ...]
    """Attention in single steps: arithmetic [FLOP], traffic [bytes]."""
    unpacked_bytes: float
    elementwise_bytes: float
    loss_bytes: float
    optimizer_bytes: float
    accumulation: int
    tokens: int
    """Of all micro-batches on one card."""
    flops: StepFlops
    dtype: DType
    """Of most products."""
    has_other_mixers: bool
    """Whether layers mix positions by something else than attention."""


def step_time(inventory: Inventory, recipe: Recipe, gpu: Gpu, num_gpus: int = 1) -> StepTime:
    """Time of one optimizer step: all its micro-batches and the update.

    Args:
        inventory: the model.
        recipe: what is trained, with its micro-batch and length.
        gpu: the card.
        num_gpus: cards that each run the same on batches of their own; what they send each other is not counted.

    Raises:
        RequestError: if the recipe trains nothing or for something else than next tokens, or the card's speed is not known.
    """
    return time_of(step_work(inventory, recipe), gpu, num_gpus)


def step_work(inventory: Inventory, recipe: Recipe) -> StepWork:
    """The work of a step: the same for all cards from compute capability 8.0 on, and for all before.

    Raises:
        RequestError: if the recipe trains nothing or for something else than next tokens.
    """
    return _step_work(inventory, on_any_card(recipe))


@lru_cache(maxsize=1024)
def _step_work(inventory: Inventory, recipe: Recipe) -> StepWork:
    training = recipe.training
    flops = step_flops(inventory, recipe)
    assert training is not None
    program = step_program(inventory, recipe)
    rows, length = training.shape
    tokens, positions = rows * length, head_positions(recipe)
    dtype = training.autocast_dtype or recipe.dtype
    batch, span = (training.micro_batch_size, training.sequence_length) if training.flattened else (rows, length)
    runs = 4 if training.gradient_checkpointing else 3
    vocabulary = program.head[0].outer if program.head else 0
    return StepWork(
        products=_together((*(_all_runs(p, tokens) for p in program.products), *(_all_runs(p, positions) for p in program.head))),
        kernels=tuple((_kernel_flops(core, batch, span), core.dtype) for core in program.attention if core.flash),
        written_out=tuple((*_written_out(core, batch, span), core.dtype) for core in program.attention if not core.flash),
        unpacked_bytes=sum(map(_unpacked_bytes, (*program.products, *program.head))),
        elementwise_bytes=_layer_bytes(inventory, recipe) * tokens * inventory.num_layers * runs + _adapter_bytes(program.products, tokens),
        loss_bytes=positions * vocabulary * _LOSS_BYTES,
        optimizer_bytes=_optimizer_bytes(inventory, recipe),
        accumulation=training.gradient_accumulation_steps,
        tokens=tokens * training.gradient_accumulation_steps,
        flops=flops,
        dtype=dtype,
        has_other_mixers=program.unmodelled_mixers > 0,
    )


def time_of(work: StepWork, gpu: Gpu, num_gpus: int = 1) -> StepTime:
    """How long a card takes for a step's work.

    Raises:
        RequestError: if the card's speed is not known.
    """
    card = _Card.of(gpu)
    products = card.roofline(work.products)
    kernels = sum(flops / card.peak(dtype) for flops, dtype in work.kernels) / ATTENTION_EFFICIENCY
    micro_batch = {
        "products": products,
        "attention": kernels + card.roofline(work.written_out),
        "dequantization": work.unpacked_bytes / card.bandwidth,
        "elementwise": work.elementwise_bytes / card.bandwidth,
        "loss": work.loss_bytes / card.bandwidth,
    }
    parts = {name: seconds * work.accumulation for name, seconds in micro_batch.items()}
    parts["optimizer"] = work.optimizer_bytes / card.bandwidth
    return StepTime(work=work, gpu=gpu, num_gpus=num_gpus, seconds=sum(parts.values()), parts=parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """What a card reaches."""

    bandwidth: float
    peaks: Mapping[DType, float]
    scale: float
    """Of what an A100 reaches of its peaks, what this card reaches of its own."""

    @classmethod
    def of(cls, gpu: Gpu) -> "_Card":
        if gpu.memory_bandwidth is None or DType.FLOAT32 not in gpu.dense_flops:
            raise RequestError(f"hardware.gpu: the speed of {gpu.id} is not known", field="hardware.gpu")
        scale = 1.0 if gpu.matmul_share is None else gpu.matmul_share / _A100_MATMUL_SHARE
        return cls(bandwidth=gpu.memory_bandwidth * BANDWIDTH_EFFICIENCY, peaks=gpu.dense_flops, scale=scale)

    def peak(self, dtype: DType) -> float:
        """What an A100 with this card's peaks would have; types without matrix units are computed in float32 [FLOP/s]."""
        return self.peaks.get(dtype, self.peaks[DType.FLOAT32]) * self.scale

    def roofline(self, work: Iterable[tuple[float, float, DType]]) -> float:
        """Arithmetic or traffic of each, whichever is longer [s]."""
        speeds: dict[DType, float] = {}
        total = 0.0
        for flops, moved, dtype in work:
            if dtype not in speeds:
                speeds[dtype] = self.peak(dtype) * PRODUCT_EFFICIENCY
            total += max(flops / speeds[dtype], moved / self.bandwidth)
        return total


def _all_runs(product: Product, tokens: int) -> tuple[float, float, DType]:
    """Arithmetic and traffic of a product in all its runs [FLOP, bytes]."""
    runs, rows = sum(product.runs.values()), float(product.rows(tokens))
    moved = (rows * product.inner + product.num_weights * product.inner * product.outer + rows * product.outer) * product.dtype.itemsize
    return runs * 2 * rows * product.inner * product.outer, runs * moved, product.dtype


def _together(products: Iterable[tuple[float, float, DType]]) -> tuple[tuple[float, float, DType], ...]:
    """Products that are alike added up: on every card they are bound by the same."""
    return tuple((flops * number, moved * number, dtype) for (flops, moved, dtype), number in Counter(products).items())


def _unpacked_bytes(product: Product) -> float:
    """Traffic of unpacking a quantized weight, at every run but for gradients of weights, which it has none of [bytes].

    Source: bitsandbytes, autograd/_functions.py, MatMul4Bit.forward and backward.
    """
    if not product.packed_bytes:
        return 0.0
    return (product.packed_bytes + product.inner * product.outer * DType.BFLOAT16.itemsize) * sum(product.runs.values())


# Bytes for one logit: cast up 2 + 4, log-softmax 4 + 4, loss and its gradient 4 + 4 + 4, cast down 4 + 2.
# Source: transformers, loss/loss_utils.py, ForCausalLMLoss; torch, log_softmax and its backward.
_LOSS_BYTES = 32


def _layer_bytes(inventory: Inventory, recipe: Recipe) -> float:
    """Traffic of what lies between the products of one layer, for one token and one pass [bytes].

    Two norms of 36h (to float32, square, mean, scale, back, weight), two residual sums of 6h, rotations of 20 bytes for each query and key
    element, an activation and a product of 10 bytes for each element of the MLP's width, all in 16 bits; twice that in 32.

    Source: transformers, models/llama/modeling_llama.py: LlamaRMSNorm, apply_rotary_pos_emb, LlamaMLP, LlamaDecoderLayer.
    """
    config = inventory.config
    width, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    head_dim = _number(config, "head_dim") or width // max(heads, 1)
    rotated = (heads + (_number(config, "num_key_value_heads") or heads)) * head_dim
    experts = _number(config, "num_experts_per_tok")
    inner = _number(config, "moe_intermediate_size") * experts if experts else _number(config, "intermediate_size")
    inner = inner or (_number(config, "intermediate_size") * max(experts, 1)) or 4 * width
    in_16_bits = 84 * width + 20 * rotated + 10 * inner
    return in_16_bits * (1 if recipe.dtype.is_half and not recipe.prepare_for_kbit_training else 2)


def _adapter_bytes(products: tuple[Product, ...], tokens: int) -> float:
    """Traffic around adapters: their input cast and dropped out, what they give scaled and added [bytes].

    Source: peft, tuners/lora/layer.py, Linear.forward.
    """
    total = 0.0
    for product in products:
        if "lora_A" in product.name and not product.fixed_rows:
            total += float(product.rows(tokens)) * product.inner * 8 * (product.runs[Pass.FORWARD] + product.runs[Pass.RECOMPUTE] + 1)
        elif "lora_B" in product.name and not product.fixed_rows:
            total += float(product.rows(tokens)) * product.outer * 12 * (product.runs[Pass.FORWARD] + product.runs[Pass.RECOMPUTE] + 1)
    return total


def _kernel_flops(core: AttentionCore, batch: int, length: int) -> float:
    """Arithmetic of one kernel, without the half above the diagonal and what a window hides [FLOP]."""
    if not core.causal:
        return _attention_flops(core, batch, length)
    window = min(core.window or length, length)
    seen = window / length - window * window / (2 * length * length)
    return _attention_flops(core, batch, length) * seen


def _attention_flops(core: AttentionCore, batch: int, length: int) -> int:
    forward = core.forward_flops(batch, length) * (core.runs[Pass.FORWARD] + core.runs[Pass.RECOMPUTE])
    return forward + core.backward_flops(batch, length)


def _written_out(core: AttentionCore, batch: int, length: int) -> tuple[float, float]:
    """Arithmetic and traffic of attention in single steps [FLOP, bytes]: backward twice the traffic of forward."""
    runs = sum(core.runs.values()) + core.runs[Pass.INPUT_GRADIENTS]
    return _attention_flops(core, batch, length), batch * core.num_heads * length * length * _SCORE_BYTES * runs


# Bytes for one score written out: scaled 2 + 2, masked 2 + 2, to float32 and softmax 2 + 4 + 4 + 4, cast down 4 + 2.
# Source: transformers, models/llama/modeling_llama.py, eager_attention_forward.
_SCORE_BYTES = 28


def _optimizer_bytes(inventory: Inventory, recipe: Recipe) -> float:
    """Traffic of one update: gradients read twice and written by clipping, then all read, parameters and states written [bytes]."""
    static = static_memory(inventory, recipe)
    parameters = sum(t.num_elements * t.dtype.itemsize * t.num_copies for t in static.tensors if t.trainable)
    states = static.optimizer_states_bytes + static.paged_bytes
    return 3 * parameters + 3 * parameters + 2 * states


def _assumptions(work: StepWork, card: _Card, gpu: Gpu, num_gpus: int) -> tuple[str, ...]:
    said = [f"products reach {PRODUCT_EFFICIENCY * card.scale:.0%} of the dense peak, traffic {BANDWIDTH_EFFICIENCY:.0%} of the bandwidth"]
    if num_gpus > 1:
        said.append("what cards send each other is not counted")
    if gpu.id not in JUDGED_GPUS:
        said.append("no published run judges the estimate on this card")
    if gpu.spec_certainty != "high":
        said.append(f"the peak of {gpu.id} is of {gpu.spec_certainty} certainty: {gpu.spec_source}")
    if work.dtype not in gpu.dense_flops:
        said.append(f"{gpu.id} has no matrix units for {work.dtype.value}: computed as float32")
    if work.has_other_mixers:
        said.append("of layers without attention only the projections are counted")
    return tuple(said)


def _number(config: Mapping[str, object], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
