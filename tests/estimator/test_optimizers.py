"""States of every modelled optimizer, made by transformers' own choice of class and one real step: equality, tensor by tensor.

Steps run on the CPU. What needs CUDA is taken from the library's own code instead: torchao's step runs uncompiled, and whether a state is
paged is asked of bitsandbytes' `init_state` on the meta device, with its allocation of managed memory replaced by a marker.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.training_args import OptimizerNames

from estimator.dtypes import DType
from estimator.errors import RequestError, UnknownNameError
from estimator.introspect.trace.update import made_by_trainer
from estimator.inventory import ModuleKind
from estimator.optimizers import (
    BITSANDBYTES,
    MODELLED,
    TORCH,
    TORCHAO,
    UNMODELLED,
    OptimizerState,
    Residence,
    optimizer_states,
    states_exist_before_first_step,
    step_temporary_bytes,
)
from estimator.phases import Item
from estimator.storage import StoredTensor
from tests.oracle.live import LiveStorages
from tests.oracle.optimizers import as_on_cuda

pytestmark = pytest.mark.filterwarnings("ignore")


class Small(nn.Module):
    """Tensors on both sides of every threshold: 4,096 elements, 100,000, whole blocks of 256, one to three dimensions."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(500, 256, dtype=dtype)
        self.small_embedding = nn.Embedding(10, 16, dtype=dtype)
        self.below = nn.Linear(63, 65, bias=False, dtype=dtype)  # 4,095
        self.exact = nn.Linear(64, 64, dtype=dtype)  # 4,096 and a bias of 64
        self.uneven = nn.Linear(77, 131, bias=False, dtype=dtype)  # 10,087
        self.unpaged = nn.Linear(333, 300, bias=False, dtype=dtype)  # 99,900
        self.paged = nn.Linear(250, 400, bias=False, dtype=dtype)  # 100,000
        self.experts = nn.Parameter(torch.randn(4, 40, 64, dtype=dtype))
        self.ln_f = nn.LayerNorm(5000, dtype=dtype)

    def forward(self) -> None:
        raise NotImplementedError


def stored(model: nn.Module) -> tuple[StoredTensor, ...]:
    """The model's parameters as the estimator would list them."""
    modules = dict(model.named_modules())
    return tuple(
        _stored(name, tuple(p.shape), DType(str(p.dtype).removeprefix("torch.")), modules[name.rpartition(".")[0]])
        for name, p in model.named_parameters()
    )


def _stored(name: str, shape: tuple[int, ...], dtype: DType, module: nn.Module) -> StoredTensor:
    return StoredTensor(
        pattern=name,
        indices=(),
        item=Item.WEIGHTS,
        shape=shape,
        dtype=dtype,
        raw_bytes=torch.Size(shape).numel() * dtype.itemsize,
        module_kind=ModuleKind.EMBEDDING if isinstance(module, nn.Embedding) else ModuleKind.OTHER,
        module_class=type(module).__name__,
        trainable=True,
    )


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[nn.Module, torch.optim.Optimizer]]:
    """A model and the optimizer transformers' Trainer makes for it."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def _make(
        name: str, dtype: torch.dtype, arguments: str | None = None, device: str = "cpu", weight_decay: float = 0.0, mixed: bool = False
    ) -> tuple[nn.Module, Any]:
        with torch.device(device):
            model = Small(dtype)
            if mixed:
                model.paged.to(torch.bfloat16 if dtype is torch.float32 else torch.float32)
                model.experts.data = model.experts.data.float()
                model.ln_f.bias.data = model.ln_f.bias.data.float()
        return model, made_by_trainer(model, name, arguments, weight_decay=weight_decay)

    return _make


def backward(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def real_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> Counter[tuple[str, int, str]]:
    """(parameter, bytes, type) of every state tensor; one that parameters share is listed once, without a parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    uses: Counter[int] = Counter()
    found: list[tuple[str, torch.Tensor]] = []
    for parameter, states in optimizer.state.items():
        for key, value in states.items():
            for part in _plain(value):
                uses[part.untyped_storage()._cdata] += 1
                found.append(("" if key.startswith("qmap") else names[parameter], part))
    seen: set[int] = set()
    result: Counter[tuple[str, int, str]] = Counter()
    for name, tensor in found:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            result[name, storage.nbytes(), str(tensor.dtype).removeprefix("torch.")] += 1
        seen.add(storage._cdata)
    return result


def _plain(value: Any) -> Iterator[torch.Tensor]:
    """A tensor, or the tensors a torchao state is made of."""
    if hasattr(value, "tensor_attrs"):
        yield from (getattr(value, attribute) for attribute in value.tensor_attrs)
    elif isinstance(value, torch.Tensor):
        yield value


def our_states(states: tuple[OptimizerState, ...], model: nn.Module) -> Counter[tuple[str, int, str]]:
    names = [name for name, _ in model.named_parameters()]
    result: Counter[tuple[str, int, str]] = Counter()
    for state in states:
        owner = max((n for n in names if state.pattern.startswith(f"{n}.")), key=len, default="")
        result[owner, state.raw_bytes, state.dtype.value] += state.num_tensors
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELLED)
def test_states_after_one_real_step_are_ours(name: str, dtype: torch.dtype, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # AdEMAMix asks for managed memory on the CPU too: only its initialisation can run here.
    device = "meta" if "paged_ademamix" in name else "cpu"
    if device == "meta":
        monkeypatch.setattr(bnb.functional, "get_paged", torch.empty)
        monkeypatch.setattr(bnb.functional, "fill", lambda tensor, value: None)
    model, optimizer = make(name, dtype, device=device)
    if device == "meta":
        initialise(optimizer)
    else:
        backward(model)
        optimizer.step()
    assert our_states(optimizer_states(name, {}, stored(model)), model) == real_states(model, optimizer)


def initialise(optimizer: Any) -> None:
    """What the first step of a bitsandbytes optimizer does before it computes anything."""
    optimizer.check_overrides()
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, number, position)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sgd", "momentum=0.9"),
        ("sgd", "momentum=0.9,nesterov=true"),
        ("sgd", "momentum=0.0"),
        ("rmsprop", "momentum=0.5"),
        ("rmsprop", "momentum=0.5,centered=True"),
        ("adagrad", "lr_decay=0.1"),
    ],
)
def test_arguments_of_the_optimizer_add_the_states_they_add_in_torch(name: str, arguments: str, make: Any) -> None:
    model, optimizer = make(name, torch.bfloat16, arguments)
    backward(model)
    optimizer.step()
    parsed = dict(part.split("=") for part in arguments.split(","))
    assert our_states(optimizer_states(name, parsed, stored(model)), model) == real_states(model, optimizer)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_states_are_paged_where_bitsandbytes_asks_for_managed_memory(name: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paged: list[int] = []

    def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        paged.append(tensor.numel() * tensor.element_size())
        return tensor

    monkeypatch.setattr(bnb.functional, "get_paged", get_paged)
    monkeypatch.setattr(bnb.functional, "fill", lambda tensor, value: None)
    model, optimizer = make(name, torch.bfloat16, device="meta")
    initialise(optimizer)
    ours = optimizer_states(name, {}, stored(model))
    assert sorted(s.raw_bytes for s in ours if s.residence is Residence.PAGED) == sorted(paged)
    assert bool(paged) == ("paged" in name)


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "rmsprop", "adagrad"])
def test_step_counters_lie_on_the_host_unless_fused(name: str, make: Any) -> None:
    model, optimizer = make(name, torch.float32, device="meta")
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    host = sum(v.device.type == "cpu" for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    ours = optimizer_states(name, {}, stored(model))
    assert sum(s.num_tensors for s in ours if s.residence is Residence.HOST) == host


def test_fused_adamw_keeps_its_counters_on_the_device() -> None:
    states = optimizer_states("adamw_torch_fused", {}, stored(Small(torch.float32)))
    assert all(s.residence is Residence.DEVICE for s in states)
    # A counter of 4 bytes takes 512 on the device.
    assert {s.allocated_bytes for s in states if s.pattern.endswith(".step")} == {512}


def test_only_adagrad_has_states_before_its_first_step(make: Any) -> None:
    for name in TORCH:
        _, optimizer = make(name, torch.float32)
        assert states_exist_before_first_step(name) == bool(optimizer.state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *((name, None) for name in ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")),
        *(("sgd", "momentum=0.9"), ("rmsprop", "momentum=0.5,centered=true")),
        *((name, None) for name in ("adamw_8bit", "paged_adamw_32bit", "lion_8bit", "ademamix")),
    ],
)
def test_what_a_step_allocates_peaks_where_we_say(name: str, arguments: str | None, dtype: torch.dtype, make: Any) -> None:
    model, optimizer = make(name, dtype, arguments)
    assert real_step_bytes(model, optimizer) == step_temporary_bytes(name, stored(model))


# What runs on the CPU; torchao's step is compiled on CUDA, and paged AdEMAMix asks for managed memory.
STEPPED = [name for name in MODELLED if name not in TORCHAO and "paged_ademamix" not in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *((name, None) for name in STEPPED),
        *(("sgd", "momentum=0.9"), ("sgd", "momentum=0.9,nesterov=true"), ("rmsprop", "momentum=0.5,centered=true")),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_weight_decay_adds_to_a_step_what_we_say(name: str, arguments: str | None, dtype: torch.dtype, mixed: bool, make: Any) -> None:
    model, optimizer = make(name, dtype, arguments, weight_decay=0.1, mixed=mixed)
    real = real_step_bytes(model, optimizer)
    assert real == step_temporary_bytes(name, stored(model), decays=True)
    if name in ("sgd", "rmsprop"):
        assert real > step_temporary_bytes(name, stored(model))


@pytest.mark.parametrize("name", ["adamw_torch", "rmsprop", "adagrad", "adafactor"])
def test_two_types_follow_each_other_as_in_the_real_step(name: str, make: Any) -> None:
    model, optimizer = make(name, torch.bfloat16, mixed=True)
    assert real_step_bytes(model, optimizer) == step_temporary_bytes(name, stored(model))


def test_the_former_update_that_adafactor_holds_is_that_of_the_module_before() -> None:
    """Not that of a layer's like: between two large tensors of layers that repeat lies a small one."""
    layers = [nn.ModuleDict({"wide": nn.Linear(64, 512, bias=False), "narrow": nn.Linear(64, 16, bias=False)}) for _ in range(3)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
    rows = {row.pattern: row for row in stored(model)}
    names = ("wide", "narrow")
    repeated = [replace(rows[f"layers.0.{name}.weight"], pattern=f"layers.{{}}.{name}.weight", indices=((0, 1, 2),)) for name in names]
    said = step_temporary_bytes("adafactor", repeated)
    assert said == real_step_bytes(model, made_by_trainer(model, "adafactor")) == step_temporary_bytes("adafactor", stored(model))


def test_weight_decay_among_the_arguments_has_no_effect(make: Any) -> None:
    model, optimizer = make("sgd", torch.bfloat16, "weight_decay=0.1")
    assert real_step_bytes(model, optimizer) == 0


def real_step_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Peak of the second step above parameters, gradients and states [bytes], without scalars (counters on the host, Adafactor's norms)."""
    as_on_cuda(optimizer)
    backward(model)
    optimizer.step()
    live = LiveStorages(granularity_bytes=512)
    states = [part for s in optimizer.state.values() for value in s.values() for part in _plain(value)]
    live.know([*(p.detach() for p in model.parameters()), *(p.grad for p in model.parameters()), *states], "known")
    with live:
        peak = live.begin("optimizer_step")
        optimizer.step()
    return peak.num_bytes - sum(s.num_bytes for s in peak.storages if s.shape == ())


def test_every_name_of_transformers_is_modelled_or_refused_with_its_package() -> None:
    assert {name.value for name in OptimizerNames} == {*MODELLED, *UNMODELLED}
    for name, package in UNMODELLED.items():
        with pytest.raises(UnknownNameError, match=rf"^training\.optim: '{name}' .*{package.split()[0]}.*; accepted: adafactor, "):
            optimizer_states(name, {}, ())


def test_an_unknown_name_is_refused_with_the_accepted_ones() -> None:
    with pytest.raises(UnknownNameError, match="adamw_torch_fused"):
        optimizer_states("adamw", {}, ())


REFUSED = [
    *(("sgd", argument) for argument in ("momentum=x", "momentum=", "momentum=-1", "weight_decay=-0.1", "dampening=much")),
    *(("sgd", argument) for argument in ("nesterov=true", "momentum=0.9,dampening=0.1,nesterov=1")),
    *(("rmsprop", argument) for argument in ("momentum=x", "momentum=-0.5", "alpha=-1", "eps=no", "weight_decay=nan")),
    *(("adagrad", argument) for argument in ("lr_decay=-1", "eps=tiny")),
    *(("ademamix", argument) for argument in ("beta1=1.0", "beta3=x", "eps=-1", "alpha=x", "t_alpha=0.5", "t_beta3=x")),
    *(("adamw_torch_8bit", argument) for argument in ("block_size=128", "bf16_stochastic_round=maybe")),
    *((name, argument) for name in ("rmsprop_bnb", "rmsprop_bnb_8bit") for argument in ("momentum=0.9", "alpha=0.9", "centered=1", "x=1")),
]
TAKEN = [
    *(("sgd", argument) for argument in ("momentum=0", "momentum=0.9,nesterov=yes", "nesterov=on", "mometum=x", "dampening=-1")),
    *(("rmsprop", argument) for argument in ("centered=maybe", "alpha=2")),
    *(("adamw_torch", argument) for argument in ("betas=x", "block_size=128")),
    *(("ademamix", argument) for argument in ("beta1=0.5,t_alpha=10", "alpha=-1")),
    *(("adafactor", "beta1=x"), ("lion_8bit", "momentum=x"), ("adamw_torch_8bit", "bf16_stochastic_round=on")),
]


def parsed(arguments: str) -> dict[str, str]:
    return {key: value for key, _, value in (part.partition("=") for part in arguments.split(","))}


@pytest.mark.parametrize(("name", "arguments"), REFUSED)
def test_arguments_on_which_the_library_fails_are_refused(name: str, arguments: str, make: Any) -> None:
    def stepped() -> None:
        model, optimizer = make(name, torch.bfloat16, arguments)
        backward(model)
        optimizer.step()

    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        stepped()
    with pytest.raises(RequestError, match=r"^training\.optim_args: \w+='.*' is not accepted; ") as caught:
        optimizer_states(name, parsed(arguments), ())
    assert [error.field for error in caught.value.errors] == ["training.optim_args"]


@pytest.mark.parametrize(("name", "arguments"), TAKEN)
def test_arguments_that_the_library_takes_or_passes_over_are_taken(name: str, arguments: str, make: Any) -> None:
    model, optimizer = make(name, torch.bfloat16, arguments)
    backward(model)
    optimizer.step()
    assert our_states(optimizer_states(name, parsed(arguments), stored(model)), model) == real_states(model, optimizer)


def lora(rank: int, in_features: int, out_features: int, dtype: DType) -> tuple[StoredTensor, ...]:
    linear = nn.Identity()
    return _stored("q.lora_A.weight", (rank, in_features), dtype, linear), _stored("q.lora_B.weight", (out_features, rank), dtype, linear)


def total(name: str, tensors: tuple[StoredTensor, ...]) -> int:
    return sum(s.allocated_bytes for s in optimizer_states(name, {}, tensors)) + step_temporary_bytes(name, tensors)


@settings(max_examples=200, deadline=None)
@given(
    rank=st.integers(1, 300),
    more=st.integers(1, 100),
    sizes=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    dtype=st.sampled_from([DType.FLOAT32, DType.BFLOAT16]),
    name=st.sampled_from([*TORCH, "adafactor"]),
)
def test_a_higher_rank_never_takes_less_with_torch_optimizers(
    rank: int, more: int, sizes: tuple[int, int], dtype: DType, name: str
) -> None:
    assert total(name, lora(rank, *sizes, dtype)) <= total(name, lora(rank + more, *sizes, dtype))


def test_a_tensor_of_4096_elements_takes_less_than_one_of_4095_under_8_bits() -> None:
    below, at = (_stored("w.weight", (n,), DType.FLOAT32, nn.Identity()) for n in (4095, 4096))
    assert total("adamw_8bit", (below,)) == 2 * 16384
    # A byte each, sixteen absmax values each, and the two tables.
    assert total("adamw_8bit", (at,)) == 2 * (4096 + 512) + 2 * 1024


def test_a_tensor_of_100000_elements_takes_less_of_the_device_than_one_of_99999_when_paged() -> None:
    below, at = (_stored("w.weight", (n,), DType.FLOAT32, nn.Identity()) for n in (99_999, 100_000))
    states = [optimizer_states("paged_adamw_32bit", {}, (t,)) for t in (below, at)]
    assert [sum(s.paged_bytes for s in each) for each in states] == [0, 800_000]
    assert [sum(s.allocated_bytes for s in each) for each in states] == [2 * 400_384, 0]
