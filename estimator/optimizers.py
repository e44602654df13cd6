"""What each optimizer keeps per trained tensor, and what its step allocates and frees."""

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from estimator.dtypes import DType
from estimator.errors import UnknownNameError
from estimator.inventory import ModuleKind
from estimator.optimizer_arguments import Arguments, check_arguments, is_true, number_of
from estimator.patterns import in_order
from estimator.storage import StoredTensor
from estimator.units import allocated, ceil_div

# Smaller tensors get 32-bit states under 8-bit optimizers. Source: bitsandbytes, optim/optimizer.py, Optimizer2State.__init__
# (min_8bit_size); torchao, optim/adam.py, _AdamBase._new_buffer.
MIN_8BIT_ELEMENTS = 4096
# Smaller tensors are not paged by paged optimizers. Source: bitsandbytes, optim/optimizer.py, Optimizer8bit.get_state_buffer.
MIN_PAGED_ELEMENTS = 100_000
# Elements that share one absmax. Source: bitsandbytes, optim/optimizer.py, Optimizer2State.init_state (blocksize).
STATE_BLOCK_SIZE = 256
# Bytes of one 256-entry float32 table. Source: bitsandbytes, functional.py, create_dynamic_map.
QUANTILE_MAP_BYTES = 256 * 4
# What transformers passes to both torchao optimizers. Source: transformers, trainer_optimizer.py, _get_torchao_optimizer.
TORCHAO_BLOCK_SIZE = 256
SCALAR_BYTES = 4

Made = TypeVar("Made")


class Residence(StrEnum):
    """Where a state lies."""

    DEVICE = "device"
    PAGED = "paged"  # managed memory, outside torch's allocator
    HOST = "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerState:
    """One kind of state tensor."""

    pattern: str
    """Name of the parameter and of the state: `model.layers.{}.self_attn.q_proj.lora_A.weight.exp_avg`."""
    num_tensors: int
    raw_bytes: int
    """Storage of one of them [bytes]."""
    dtype: DType
    residence: Residence = Residence.DEVICE

    @property
    def allocated_bytes(self) -> int:
        """What the caching allocator holds for all of them [bytes]."""
        return self.num_tensors * allocated(self.raw_bytes) if self.residence is Residence.DEVICE else 0

    @property
    def paged_bytes(self) -> int:
        """Managed memory of all of them [bytes]."""
        return self.num_tensors * self.raw_bytes if self.residence is Residence.PAGED else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsAndBytes:
    """One class of bitsandbytes' optimizers, as transformers constructs it."""

    copies: tuple[int, ...]
    """Parameter-sized copies in each state buffer: Adam (1, 1), AdEMAMix keeps both fast averages in the first buffer (2, 1)."""
    bits: int
    is_paged: bool = False


_ADAMW, _ADEMAMIX, _ONE_STATE = (1, 1), (2, 1), (1,)

# Source: transformers, trainer_optimizer.py, _get_bitsandbytes_optimizer.
BITSANDBYTES: Mapping[str, BitsAndBytes] = {
    "adamw_bnb_8bit": BitsAndBytes(copies=_ADAMW, bits=8),
    "adamw_8bit": BitsAndBytes(copies=_ADAMW, bits=8),
    "paged_adamw_32bit": BitsAndBytes(copies=_ADAMW, bits=32, is_paged=True),
    "paged_adamw_8bit": BitsAndBytes(copies=_ADAMW, bits=8, is_paged=True),
    "ademamix": BitsAndBytes(copies=_ADEMAMIX, bits=32),
    "ademamix_8bit": BitsAndBytes(copies=_ADEMAMIX, bits=8),
    "paged_ademamix_32bit": BitsAndBytes(copies=_ADEMAMIX, bits=32, is_paged=True),
    "paged_ademamix_8bit": BitsAndBytes(copies=_ADEMAMIX, bits=8, is_paged=True),
    "lion_32bit": BitsAndBytes(copies=_ONE_STATE, bits=32),
    "lion_8bit": BitsAndBytes(copies=_ONE_STATE, bits=8),
    "paged_lion_32bit": BitsAndBytes(copies=_ONE_STATE, bits=32, is_paged=True),
    "paged_lion_8bit": BitsAndBytes(copies=_ONE_STATE, bits=8, is_paged=True),
    "rmsprop_bnb": BitsAndBytes(copies=_ONE_STATE, bits=32),
    "rmsprop_bnb_8bit": BitsAndBytes(copies=_ONE_STATE, bits=8),
    "rmsprop_bnb_32bit": BitsAndBytes(copies=_ONE_STATE, bits=32),
}

TORCH = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")
MODELLED = (*TORCH, *TORCHAO, "adafactor", *BITSANDBYTES)

# Names of transformers' OptimizerNames that stand on other packages. Source: transformers, trainer_optimizer.py.
UNMODELLED: Mapping[str, str] = {
    "adamw_torch_xla": "torch_xla (TPU)",
    "adamw_torch_npu_fused": "torch_npu (Ascend)",
    "adamw_anyprecision": "torchdistx",
    **dict.fromkeys(("galore_adamw", "galore_adamw_8bit", "galore_adafactor"), "galore_torch"),
    **dict.fromkeys(("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"), "galore_torch"),
    **dict.fromkeys(("lomo", "adalomo"), "lomo_optim"),
    "grokadamw": "grokadamw",
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), "schedulefree"),
    **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), "apollo_torch"),
    "stable_adamw": "torch-optimi",
}

# Source: transformers, trainer.py, Trainer.get_decay_parameter_names.
_WITHOUT_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def check_optimizer(name: str) -> None:
    """Refuses an optimizer without a memory model.

    Raises:
        UnknownNameError: naming the package it would need, or the accepted names.
    """
    if name in MODELLED:
        return
    if name in UNMODELLED:
        raise UnknownNameError(
            f"training.optim: {name!r} is not modelled, because {UNMODELLED[name]} is no dependency; "
            f"accepted: {', '.join(sorted(MODELLED))}",
            field="training.optim",
        )
    raise UnknownNameError.of("training.optim", name, MODELLED)


def states_exist_before_first_step(name: str) -> bool:
    """Whether the optimizer allocates its states when it is made, not in its first step.

    Source: torch, optim/adagrad.py, Adagrad.__init__; the others initialise lazily.
    """
    return name == "adagrad"


def optimizer_states(name: str, arguments: Arguments, trained: Iterable[StoredTensor]) -> tuple[OptimizerState, ...]:
    """Everything an optimizer keeps from its first step on.

    Args:
        name: a value of transformers' OptimizerNames.
        arguments: `optim_args`, parsed.
        trained: the trainable tensors.

    Returns:
        one row per kind of state tensor.

    Raises:
        UnknownNameError: if the optimizer has no memory model.
        RequestError: if an argument is one the library fails on.
    """
    check_optimizer(name)
    check_arguments(name, arguments)
    tensors = tuple(trained)
    if name in BITSANDBYTES:
        return tuple(_bitsandbytes(BITSANDBYTES[name], tensors))
    return tuple(state for tensor in tensors for state in _per_tensor(name, arguments)(tensor))


def _per_tensor(name: str, arguments: Arguments) -> Callable[[StoredTensor], Iterator[OptimizerState]]:
    match name:
        case "adamw_torch_fused":
            return lambda t: _torch_adamw(t, Residence.DEVICE)
        case "adamw_torch":
            return lambda t: _torch_adamw(t, Residence.HOST)
        case "sgd":
            buffers = ("momentum_buffer",) if number_of(arguments, "momentum") else ()
            return lambda t: _like_parameter(t, buffers)
        case "adagrad":
            return lambda t: _like_parameter(t, ("sum",), has_step=True)
        case "rmsprop":
            momentum = ("momentum_buffer",) if number_of(arguments, "momentum") > 0 else ()
            centered = ("grad_avg",) if is_true(arguments, "centered") else ()
            return lambda t: _like_parameter(t, ("square_avg", *momentum, *centered), has_step=True)
        case "adafactor":
            return _adafactor
        case _:
            return lambda t: _torchao(t, 8 if name == "adamw_torch_8bit" else 4)


def _torch_adamw(tensor: StoredTensor, step_residence: Residence) -> Iterator[OptimizerState]:
    """Two averages in the parameter's type; the step counter lies on the device when fused.

    Source: torch, optim/adam.py, Adam._init_group.
    """
    yield from _like_parameter(tensor, ("exp_avg", "exp_avg_sq"))
    yield _state(tensor, "step", SCALAR_BYTES, DType.FLOAT32, step_residence)


def _like_parameter(tensor: StoredTensor, names: Iterable[str], *, has_step: bool = False) -> Iterator[OptimizerState]:
    """States of the parameter's shape and type; counters of steps lie on the host.

    Source: torch, optim/sgd.py, optim/adagrad.py, optim/rmsprop.py.
    """
    for name in names:
        yield _state(tensor, name, tensor.num_elements * tensor.dtype.itemsize, tensor.dtype)
    if has_step:
        yield _state(tensor, "step", SCALAR_BYTES, DType.FLOAT32, Residence.HOST)


def _adafactor(tensor: StoredTensor) -> Iterator[OptimizerState]:
    """Row and column averages in float32 for two dimensions and more, a full one below; transformers sets no first moment.

    Source: transformers, optimization.py, Adafactor.step; trainer_optimizer.py, _get_adafactor.
    """
    if len(tensor.shape) >= 2:
        rows, columns = _factors(tensor.shape)
        yield _state(tensor, "exp_avg_sq_row", rows * 4, DType.FLOAT32)
        yield _state(tensor, "exp_avg_sq_col", columns * 4, DType.FLOAT32)
    else:
        yield _state(tensor, "exp_avg_sq", tensor.num_elements * 4, DType.FLOAT32)
    yield _state(tensor, "RMS", SCALAR_BYTES, DType.FLOAT32)


def _factors(shape: tuple[int, ...]) -> tuple[int, int]:
    """Elements of the row and of the column average."""
    return math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1]


def _torchao(tensor: StoredTensor, bits: int) -> Iterator[OptimizerState]:
    """Codes, one float32 scale per block, and a code table for each state of each tensor; small or uneven tensors stay as they are.

    Source: torchao, optim/adam.py, _AdamBase._new_buffer; optim/subclass_8bit.py and subclass_4bit.py, zeros.
    """
    n = tensor.num_elements
    for name in ("exp_avg", "exp_avg_sq"):
        if n >= MIN_8BIT_ELEMENTS and n % TORCHAO_BLOCK_SIZE == 0:
            yield _state(tensor, f"{name}.codes", n * bits // 8, DType.UINT8)
            yield _state(tensor, f"{name}.scale", n // TORCHAO_BLOCK_SIZE * 4, DType.FLOAT32)
            yield _state(tensor, f"{name}.qmap", 2**bits * 4, DType.FLOAT32)
        else:
            yield _state(tensor, name, n * tensor.dtype.itemsize, tensor.dtype)
    yield _state(tensor, "step", SCALAR_BYTES, DType.FLOAT32, Residence.HOST)


def _bitsandbytes(kind: BitsAndBytes, tensors: tuple[StoredTensor, ...]) -> Iterator[OptimizerState]:
    """States of bitsandbytes' optimizers, and their tables once.

    32-bit states are float32 whatever the parameter is. Under 8 bits, tensors below 4,096 elements and weights of nn.Embedding keep
    32-bit states; the others get a byte per element and one float32 absmax per 256. Paging covers states of 100,000 elements and more.

    Source: bitsandbytes, optim/optimizer.py, Optimizer1State.init_state and Optimizer2State.init_state; optim/ademamix.py,
    AdEMAMix.init_state; transformers, trainer.py, Trainer.create_optimizer (override of embeddings).
    """
    uses_tables = False
    for tensor in tensors:
        n = tensor.num_elements
        is_8bit = kind.bits == 8 and n >= MIN_8BIT_ELEMENTS and not _is_embedding_weight(tensor)
        uses_tables |= is_8bit
        residence = Residence.PAGED if kind.is_paged and n >= MIN_PAGED_ELEMENTS else Residence.DEVICE
        dtype = DType.UINT8 if is_8bit else DType.FLOAT32
        for number, copies in enumerate(kind.copies, 1):
            yield _state(tensor, f"state{number}", copies * n * dtype.itemsize, dtype, residence)
            if is_8bit:
                yield _state(tensor, f"absmax{number}", copies * ceil_div(n, STATE_BLOCK_SIZE) * 4, DType.FLOAT32)
    if uses_tables:
        yield OptimizerState(pattern="qmap", num_tensors=len(kind.copies), raw_bytes=QUANTILE_MAP_BYTES, dtype=DType.FLOAT32)


def _is_embedding_weight(tensor: StoredTensor) -> bool:
    return tensor.module_kind is ModuleKind.EMBEDDING and tensor.pattern.endswith("weight")


def _state(tensor: StoredTensor, name: str, raw_bytes: int, dtype: DType, residence: Residence = Residence.DEVICE) -> OptimizerState:
    return OptimizerState(
        pattern=f"{tensor.pattern}.{name}", num_tensors=tensor.num_copies, raw_bytes=raw_bytes, dtype=dtype, residence=residence
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepList:
    """A list of tensors that a step makes at once, and how many of the oldest lists that it still holds go before and after that."""

    sizes: tuple[int, ...]
    """Of its tensors [bytes]."""
    freed_before: int = 0
    freed_after: int = 0


def step_temporary_bytes(name: str, trained: Iterable[StoredTensor], *, decays: bool = False) -> int:
    """Peak of what one step allocates beside states and gradients, each tensor rounded up.

    Fused kernels and bitsandbytes' work in place. The multi-tensor paths of torch, chosen on CUDA, compute whole lists at once, see
    `step_lists`. Adafactor works on one float32 tensor at a time, while the former update is still referenced.

    Args:
        name: a value of transformers' OptimizerNames.
        trained: the trainable tensors.
        decays: whether TrainingArguments has a `weight_decay`; one in `optim_args` has no effect, since parameter groups carry their own.

    Returns:
        peak within the step [bytes].

    Raises:
        UnknownNameError: if the optimizer has no memory model.

    Source: torch, optim/adam.py, sgd.py, adagrad.py and rmsprop.py, _multi_tensor_*; transformers, optimization.py, Adafactor.step, and
    trainer.py, Trainer.create_optimizer.
    """
    check_optimizer(name)
    groups = weight_decay_groups(trained)
    if name == "adafactor":
        return max(_adafactor_peak(group) for group in groups)
    return max(_peak_of_lists(name, group, decays=decays and group is groups[0]) for group in groups)


def states_in_order(name: str, arguments: Arguments, trained: Iterable[StoredTensor]) -> Iterator[OptimizerState]:
    """What the first step makes on the device, parameter by parameter; one row for each tensor.

    Raises:
        as `optimizer_states`.
    """
    tables_made = False
    for group in weight_decay_groups(trained):
        states = [optimizer_states(name, arguments, (tensor,)) for tensor in group]
        for position, _ in in_order((t.pattern, t.indices) for t in group):
            for state in states[position]:
                if state.pattern.startswith(f"{group[position].pattern}."):
                    if state.residence is Residence.DEVICE:
                        yield state
                elif not tables_made:
                    tables_made = True
                    yield from [state] * state.num_tensors


def step_lists(name: str, trained: Iterable[StoredTensor], *, decays: bool = False) -> Iterator[StepList]:
    """The lists of tensors that a step makes, one after the other; what is left at its end goes then.

    Of Adafactor's tensors those that are no larger than rows and columns are left out.

    Args:
        as `step_temporary_bytes`.
    """
    held = 0
    groups = weight_decay_groups(trained)
    for group in groups:
        ordered = [group[position] for position, _ in in_order((t.pattern, t.indices) for t in group)]
        made = _adafactor_lists(ordered) if name == "adafactor" else _lists_by_type(name, ordered, decays=decays and group is groups[0])
        for number, each in enumerate(made):
            step = each if number else replace(each, freed_before=held)  # what the former group has left
            yield step
            held += 1 - step.freed_before - step.freed_after


def play(lists: Iterable[StepList], make: Callable[[int], Made], release: Callable[[Made], None]) -> None:
    """Makes the tensors of a step and lets them go, in its order; nothing is left.

    Args:
        lists: as `step_lists` gives them.
        make: a tensor of some size [bytes].
        release: lets one go.
    """
    held: deque[list[Made]] = deque()

    def let_go(number: int) -> None:
        for _ in range(number):
            for made in held.popleft():
                release(made)

    for each in lists:
        let_go(each.freed_before)
        held.append([make(size) for size in each.sizes])
        let_go(each.freed_after)
    let_go(len(held))


def _lists_by_type(name: str, ordered: Iterable[StoredTensor], *, decays: bool) -> Iterator[StepList]:
    """Lists like the parameters of one type, then of the next."""
    by_type: dict[DType, list[int]] = {}
    for tensor in ordered:
        by_type.setdefault(tensor.dtype, []).append(tensor.num_elements * tensor.dtype.itemsize)
    for number, sizes in enumerate(reversed(by_type.values())):
        for before, after in _program(name, decays=decays):
            once_more = number > 0  # the former type's lists are there
            yield StepList(sizes=tuple(sizes), freed_before=before * once_more, freed_after=after * once_more)


def _adafactor_lists(ordered: Iterable[StoredTensor]) -> Iterator[StepList]:
    """Per tensor its copies in float32 where it is not, and the squared gradient; then the update, until which the former one is held."""
    for number, tensor in enumerate(ordered):
        size, is_later = tensor.num_elements * 4, int(number > 0)
        yield StepList(sizes=(size,) * (3 if tensor.dtype.is_half else 1), freed_before=is_later)
        yield StepList(sizes=(size,), freed_after=is_later)


def _program(name: str, *, decays: bool) -> tuple[tuple[int, int], ...]:
    """The lists that a multi-tensor step makes for the parameters of one type: for each, how many of the former type's it lets go
    before it is made and after, the oldest first.

    Python lets a list go where the name that it had is given to another. With weight decay there is a decayed copy of the gradients, but
    for Adam, whose decay is decoupled.

    Source: torch 2.13, optim/adam.py, sgd.py, rmsprop.py and adagrad.py, _multi_tensor_*.
    """
    match name, decays:
        case "adamw_torch", _:
            return ((0, 1),)  # root of the second average
        case "sgd", True:
            return ((1, 0),)  # decayed gradients
        case "rmsprop", False:
            return ((0, 1),)  # root of the average
        case "rmsprop", True:
            return (1, 0), (0, 1)  # decayed gradients, root
        case "adagrad", False:
            return (0, 1), (0, 1)  # root of the sum, scaled gradients
        case "adagrad", True:
            return (0, 0), (0, 2)  # decayed gradients, which are then scaled in place; root
        case _:
            return ()


def weight_decay_groups(trained: Iterable[StoredTensor]) -> tuple[tuple[StoredTensor, ...], ...]:
    """The two parameter groups transformers makes: with weight decay, and without (norms and biases).

    Source: transformers, trainer.py, Trainer.create_optimizer and get_decay_parameter_names.
    """
    decayed: list[StoredTensor] = []
    spared: list[StoredTensor] = []
    for tensor in trained:
        is_spared = tensor.module_class == "LayerNorm" or _WITHOUT_DECAY.search(tensor.pattern.lower()) is not None
        (spared if is_spared else decayed).append(tensor)
    return tuple(decayed), tuple(spared)


def _peak_of_lists(name: str, group: Iterable[StoredTensor], *, decays: bool) -> int:
    """Peak while the lists of one group's step are made; of two types the one that appears last comes first.

    Source: torch, csrc/utils/foreach.h and ATen/native/ForeachUtils.h, _group_tensors_by_first_tensors_device_and_dtype: an unordered
    map, into which libstdc++ puts a new key in front.
    """
    program = _program(name, decays=decays)
    sums: dict[DType, int] = {}
    for tensor in group if program else ():
        raw = tensor.num_elements * tensor.dtype.itemsize
        sums[tensor.dtype] = sums.get(tensor.dtype, 0) + tensor.num_copies * allocated(raw)
    peak = 0
    held: list[int] = []
    for number, size in enumerate(reversed(sums.values())):
        for before, after in program:
            held = [*held[before if number else 0 :], size]
            peak = max(peak, sum(held))
            held = held[after if number else 0 :]
    return peak


def _adafactor_peak(group: Sequence[StoredTensor]) -> int:
    """Peak over the tensors of a group: two float32 updates, two float32 copies of 16-bit tensors, the factors or the former update."""
    peak = former = 0
    for position, _ in in_order((t.pattern, t.indices) for t in group):
        tensor = group[position]
        update = allocated(tensor.num_elements * 4)
        raised = 2 * update if tensor.dtype.is_half else 0
        factors = sum(allocated(n * 4) for n in _factors(tensor.shape)) if len(tensor.shape) >= 2 else 0
        peak = max(peak, raised + 2 * update + max(factors, former))
        former = update
    return peak
