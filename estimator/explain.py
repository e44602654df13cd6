"""Every item of an answer in words and numbers, with the place where its rule is written."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from estimator.engine import Instant, largest, weights_growth_bytes, why_not_modelled, worst_instants
from estimator.extent import Extent, Polynomial, Size
from estimator.inventory import Inventory
from estimator.loading import unsplit_bytes
from estimator.optimizers import Residence
from estimator.parallelism import tensor
from estimator.parallelism.options import Parallel, Strategy
from estimator.phases import Item, Phase
from estimator.recipe import Recipe
from estimator.static_memory import StaticMemory, static_memory
from estimator.step import Program
from estimator.storage import StoredTensor
from estimator.units import gib

_LARGEST_SHOWN = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """How an item comes about."""

    formula: str
    source: str


Explanations = Mapping[tuple[Phase, Item], Explanation]

_SOURCES = {
    Item.WEIGHTS: "parameters as transformers builds them; bitsandbytes functional.quantize_4bit and nn.modules; "
    "peft prepare_model_for_kbit_training",
    Item.QUANTIZATION_STATE: "bitsandbytes, functional.py, quantize_4bit and QuantState",
    Item.BUFFERS: "buffers that the model registers",
    Item.ADAPTER_WEIGHTS: "peft, tuners/lora/layer.py, update_layer; Hu et al. 2021, section 4.1",
    Item.OPTIMIZER_STATES: "torch.optim and bitsandbytes.optim, state made in the first step; transformers, trainer_optimizer.py",
    Item.GRADIENTS: "torch, autograd: a gradient has the type and shape of its parameter",
    Item.ACTIVATIONS: "torch, tools/autograd/derivatives.yaml: what each operator saves; the layer as in transformers' modeling code",
    Item.CHECKPOINTS: "torch, utils/checkpoint.py: the input of every checkpointed layer",
    Item.LOGITS: "transformers, loss/loss_utils.py; torch, log_softmax and nll_loss; TRL and Liger for their fused losses",
    Item.TEMPORARY: "tensors alive inside the operator that makes the phase's largest instant",
    Item.KV_CACHE: "transformers, cache_utils.py",
    Item.COMMUNICATION: "torch, csrc/distributed/c10d/reducer.cpp; distributed/fsdp/_fully_shard/_fsdp_collectives.py; "
    "distributed/fsdp/_flat_param.py; deepspeed, runtime/zero/stage_1_and_2.py and stage3.py; accelerate, hooks.py",
    Item.WORKSPACE: "torch, ATen/cuda/CublasHandlePool.cpp: one workspace per handle and thread; "
    "c10/cuda/CUDACachingAllocator.cpp, should_split",
}


_TRACE = "seen in a trace of the installed libraries' own step on tensors without content; kernels of CUDA as their sources have them"
_TRACED_SOURCES = dict.fromkeys((Item.ACTIVATIONS, Item.LOGITS, Item.TEMPORARY), _TRACE)


def explain(inventory: Inventory, recipe: Recipe, traced: Program | None = None) -> Explanations:
    """Formula and source of every item of every phase.

    Args:
        traced: the step as a trace saw it, if that was the answer.
    """
    if traced is None:
        return _of_closed_forms(inventory, recipe)
    assert recipe.training is not None
    instants = {phase: largest(snapshots, *recipe.training.shape) for phase, snapshots in traced.peaks.items()}
    return _explained(_texts(inventory, recipe, _phases(recipe, True), instants), _SOURCES | _TRACED_SOURCES)


@lru_cache(maxsize=64)
def _of_closed_forms(inventory: Inventory, recipe: Recipe) -> Explanations:
    modelled = why_not_modelled(inventory, recipe) is None
    # On each card of a device map the step is that of the whole model with fewer layers; a rank of tensor parallelism has a narrower one.
    alone = recipe.parallel.strategy in (Strategy.DEVICE_MAP, Strategy.TENSOR_PARALLEL)
    run = replace(recipe, parallel=Parallel()) if alone else recipe
    if recipe.parallel.is_spread and recipe.parallel.strategy is Strategy.TENSOR_PARALLEL:
        inventory = tensor.rank(inventory, recipe.parallel.num_gpus)
    instants: Mapping[Phase, Instant] = {}
    if modelled:
        try:
            instants = worst_instants(inventory, run)
        except NotImplementedError:  # a block met something that it has no rule for: the estimate ends with the load, and says so
            modelled = False
    phases = _phases(recipe, modelled)
    texts = _texts(inventory, run, phases, instants)
    if modelled:
        _add_what_stays(texts, inventory, run)
    if recipe.parallel.is_spread:
        _add_ranks(texts, phases, recipe.parallel)
    return _explained(texts, _SOURCES)


# What strategies other than DDP divide between ranks.
_DIVIDED = (
    Item.WEIGHTS,
    Item.QUANTIZATION_STATE,
    Item.BUFFERS,
    Item.ADAPTER_WEIGHTS,
    Item.OPTIMIZER_STATES,
    Item.GRADIENTS,
    Item.TEMPORARY,
)
_COMMUNICATION: Mapping[Strategy, str] = {
    Strategy.DDP: "buckets in which gradients travel; after loading, copies in which parameters and buffers do",
    Strategy.ZERO1: "buckets of reduce_bucket_size elements in which gradients are reduced",
    Strategy.ZERO2: "buckets of reduce_bucket_size elements in which gradients are reduced",
    Strategy.ZERO3: "gathered parameters, at most stage3_max_live_parameters of them; a bucket of reduce_bucket_size elements",
    Strategy.FSDP: "the gathered unit, the flat tensors in which units arrive and gradients leave, whole gradients of one unit",
    Strategy.TENSOR_PARALLEL: "logits of the last position from all ranks: as they arrive, and put together",
    Strategy.DEVICE_MAP: "logits that return to the card of the inputs, and their float32 copy",
}


def _add_ranks(texts: dict[tuple[Phase, Item], str], phases: Iterable[Phase], parallel: Parallel) -> None:
    for phase in phases:
        texts[phase, Item.COMMUNICATION] = _COMMUNICATION[parallel.strategy]
    if parallel.strategy is Strategy.DDP:
        return
    for (phase, item), text in texts.items():
        if item in _DIVIDED and text:
            texts[phase, item] = f"one rank's part ({parallel.strategy.value} on {parallel.num_gpus} GPUs) of: {text}"


def _explained(texts: Mapping[tuple[Phase, Item], str], sources: Mapping[Item, str]) -> Explanations:
    return {key: Explanation(formula=text, source=sources.get(key[1], "")) for key, text in texts.items() if text}


def _texts(
    inventory: Inventory, recipe: Recipe, phases: Iterable[Phase], instants: Mapping[Phase, Instant]
) -> dict[tuple[Phase, Item], str]:
    static = static_memory(inventory, recipe)
    texts: dict[tuple[Phase, Item], str] = {}
    for phase in phases:
        for item, formula in _stored(static).items():
            texts[phase, item] = formula
        texts |= {(phase, item): text for item, text in _step(static, recipe, phase).items()}
        if phase in instants:
            _add(texts, phase, instants[phase])
    return texts


def _add_what_stays(texts: dict[tuple[Phase, Item], str], inventory: Inventory, recipe: Recipe) -> None:
    """What the sizes of the loaded tensors do not tell: biases in another type, and blocks larger than their tensors."""
    grown, unsplit = weights_growth_bytes(inventory, recipe), unsplit_bytes(inventory, recipe)
    for phase, item in texts:
        if phase is not Phase.LOAD and item is Item.WEIGHTS and grown:
            texts[phase, item] += f"; {grown:+,} B: the first forward pass casts the biases of quantized layers for good"
        if item is Item.WORKSPACE and unsplit:
            texts[phase, item] += f" + {unsplit:,} B: blocks larger than the weights in them, from which the allocator splits nothing off"


def _phases(recipe: Recipe, modelled: bool) -> tuple[Phase, ...]:
    if not modelled:
        return (Phase.LOAD,)
    if recipe.training is not None:
        return (Phase.LOAD, Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, Phase.OPTIMIZER_STEP)
    return (Phase.LOAD, Phase.PREFILL, Phase.DECODE) if recipe.inference is not None else (Phase.LOAD,)


# -- what is stored ---------------------------------------------------------------------------------------------------------------------


def _stored(static: StaticMemory) -> dict[Item, str]:
    return {
        item: _by_width([t for t in static.tensors if t.item is item])
        for item in (Item.WEIGHTS, Item.QUANTIZATION_STATE, Item.BUFFERS, Item.ADAPTER_WEIGHTS)
    }


def _by_width(tensors: Iterable[StoredTensor]) -> str:
    """Tensors of a kind together: how many, how many scalars, at how many bytes."""
    groups: dict[str, tuple[int, int, int]] = {}
    for t in tensors:
        name = f"{t.quantization.value} packed" if t.quantization is not None else t.dtype.value
        number, scalars, raw = groups.get(name, (0, 0, 0))
        groups[name] = number + t.num_copies, scalars + t.num_copies * t.num_elements, raw + t.num_copies * t.raw_bytes
    parts = [f"{number:,} {name} tensors: {scalars:,} scalars in {raw:,} B" for name, (number, scalars, raw) in groups.items()]
    return " + ".join(parts) + "; each tensor rounded up to 512 B" if parts else ""


def _step(static: StaticMemory, recipe: Recipe, phase: Phase) -> dict[Item, str]:
    """What a step adds that no tape is needed for."""
    if phase is Phase.LOAD:
        passing = "a quantized one in the type it is loaded in, or experts while they are merged"
        prepared = recipe.prepare_for_kbit_training and recipe.quantization is not None
        twice = "; or one that prepare_model_for_kbit_training has in 16 and in 32 bit for a moment" if prepared else ""
        later = "; less the adapters, which are made later" if static.adapter_weights_bytes else ""
        if recipe.of_reference is not None:
            later = "; of the second model, or of the first less all that is made later: its adapters and the second model"
        return {Item.TEMPORARY: f"the largest weight that passes through: {passing}{twice}{later}"}
    training = recipe.training
    if training is None:
        return {Item.WORKSPACE: "1 cuBLAS workspace"} | {
            Item.ACTIVATIONS: "inputs: 3 × 8·B·P B (ids, mask and positions of the prompt's P tokens)"
        }
    texts = {Item.WORKSPACE: "2 cuBLAS workspaces (forward and backward run in threads of their own)"}
    states = [s for s in static.optimizer if s.residence is Residence.DEVICE]
    raw = sum(s.num_tensors * s.raw_bytes for s in states)
    number = sum(s.num_tensors for s in states)
    texts[Item.OPTIMIZER_STATES] = f"{training.optimizer}: {number:,} state tensors, {raw:,} B" + (
        f"; {gib(static.paged_bytes)} more in paged memory" if static.paged_bytes else ""
    )
    trained = [t for t in static.tensors if t.trainable]
    texts[Item.GRADIENTS] = _by_width(trained).replace(" tensors", " gradients")
    inputs = f"inputs: 3 × {training.gradient_accumulation_steps} × 8·B·S B (ids, labels, mask or positions)"
    texts[Item.ACTIVATIONS] = inputs
    if phase is Phase.OPTIMIZER_STEP:
        decay = f" with weight_decay {training.weight_decay:g}" if training.decays else ""
        texts[Item.TEMPORARY] = f"what {training.optimizer} allocates inside step(){decay}"
    return texts


# -- what the tape saw ------------------------------------------------------------------------------------------------------------------


def _add(texts: dict[tuple[Phase, Item], str], phase: Phase, instant: Instant) -> None:
    by_item: dict[Item, Counter[Size]] = {}
    for (item, extent), number in instant.snapshot.held:
        by_item.setdefault(item, Counter())[extent] += number
    for item, extents in by_item.items():
        name = "input of a checkpointed layer" if item is Item.CHECKPOINTS else "keys or values of a layer" if item is Item.KV_CACHE else ""
        text = _largest(extents, lambda e: e.at(instant.batch, instant.sequence, instant.keys), name)
        before = texts.get((phase, item)) if item is Item.ACTIVATIONS else None
        keys = f", K={instant.keys} keys" if any(isinstance(extent, Extent) and extent.keys for extent in extents) else ""
        texts[phase, item] = f"B={instant.batch}, S={instant.sequence}{keys}: {text}" + (f"; {before}" if before else "")


def _largest(extents: Counter[Size], size: Callable[[Size], int], name: str = "") -> str:
    """The largest contributions by name, the rest in one sum."""
    groups: dict[tuple[str, str], tuple[int, int]] = {}
    for extent, number in extents.items():
        key = name or extent.label, _term(extent)
        count, total = groups.get(key, (0, 0))
        groups[key] = count + number, total + number * size(extent)
    ranked = sorted(groups.items(), key=lambda entry: -entry[1][1])
    shown = [f"{count} × {term} B ({_words(label)})" for (label, term), (count, _) in ranked[:_LARGEST_SHOWN]]
    rest = ranked[_LARGEST_SHOWN:]
    if rest:
        shown.append(f"{sum(count for _, (count, _) in rest)} smaller tensors, {gib(sum(total for _, (_, total) in rest))}")
    return " + ".join(shown)


def _term(extent: Size) -> str:
    if isinstance(extent, Polynomial):
        return " + ".join(map(_term, extent.terms)) if len(extent.terms) == 1 else f"({' + '.join(map(_term, extent.terms))})"
    factors = [f"{extent.coefficient:,}"] + ["B"] * extent.batch
    if extent.sequence:
        factors.append(_shifted("S", extent.shift) if extent.sequence == 1 else "S²")
    if extent.keys:
        factors.append(_shifted("K", extent.offset))
    return "·".join(factors)


def _shifted(variable: str, number: int) -> str:
    return f"({variable} {'+' if number > 0 else '-'} {abs(number)})" if number else variable


_WORDS = {
    "cast": "in another type",
    "linear": "output",
    "linear_4bit": "4-bit product or unpacked weight",
    "linear_8bit": "8-bit product",
    "clone": "copy",
    "add": "sum",
    "multiply": "product",
    "activation": "activation function",
    "backward": "gradient",
    "custom": "product",
    "log_softmax_backward": "gradient of the logits",
    "nll_backward": "gradient of the log-softmax",
    "cross_entropy": "log-softmax",
    "concatenate": "rotated halves",
    "square": "square",
    "saving_output": "result of a function",
    "embedding": "embeddings",
    "negate": "negated half",
    "scale": "scaled",
    "rotary": "cos or sin",
    "flash": "attention output",
    "softmax": "softmax",
    "dropout": "dropped input or mask",
    "remember": "cache of keys or values",
    "cached_before": "cache of the tokens before",
    "held_by_generate": "held by generate: ids, positions, mask, the logits before",
    "mask": "attention mask",
    "memory_efficient": "attention output, or mask in another type",
    "contiguous_copy": "keys or values for all heads",
    "head_logits": "logits of the last position",
    "sampled_from": "float32 copy of the logits, ids",
}


def _words(label: str) -> str:
    scope, _, operator = label.rpartition(" ")
    if operator not in _WORDS and scope.count(" "):
        return label
    return f"{scope} {_WORDS.get(operator, operator.strip('_').replace('_', ' '))}".strip()
