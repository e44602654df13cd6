"""Runs a training step as transformers' Trainer does and reports what was alive."""

import gc as garbage
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from estimator.introspect.cuda_paths import KERNELS, cuda_paths
from estimator.introspect.trace.update import made_by_trainer
from tests.oracle.live import Event, LiveStorages, Peak, Storage
from tests.oracle.models import MODES, VOCABULARY, Mode, build, stored_tensors
from tests.oracle.optimizers import as_on_cuda

Multiset = Counter[tuple[tuple[int, ...], torch.dtype]]


def mode_of(mode: str | Mode) -> Mode:
    """A mode by name or as it is."""
    return MODES[mode] if isinstance(mode, str) else mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Inputs as a data collator makes them."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    num_items: torch.Tensor
    position_ids: torch.Tensor | None = None
    """Given where samples lie end to end in one row: each begins at 0."""

    @classmethod
    def of(cls, num_sequences: int, length: int, *, padded: bool = False, flattened: bool = False, vocabulary: int = VOCABULARY) -> "Batch":
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1, vocabulary, (num_sequences, length), generator=generator)
        if flattened:
            row = ids.reshape(1, -1)
            positions = torch.arange(length).repeat(num_sequences)[None]
            return cls(input_ids=row, attention_mask=None, labels=row.clone(), num_items=torch.tensor(ids.numel()), position_ids=positions)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, : max(1, length // 5)] = 0  # on the left, as generation needs it
        return cls(input_ids=ids, attention_mask=mask, labels=ids.clone(), num_items=torch.tensor(ids.numel()))

    def tensors(self) -> list[torch.Tensor]:
        given = (self.input_ids, self.attention_mask, self.labels, self.num_items, self.position_ids)
        return [tensor for tensor in given if tensor is not None]

    def arguments(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of the model's forward.

        Source: transformers 5.23, trainer.py, compute_loss: `num_items_in_batch` goes to models that accept loss keyword arguments.
        """
        layout = {"attention_mask": self.attention_mask, "position_ids": self.position_ids}
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "num_items_in_batch": self.num_items,
            **{name: tensor for name, tensor in layout.items() if tensor is not None},
        }


def _like_accelerate(model: nn.Module, mode: Mode) -> Any:
    """The forward that accelerate installs.

    Source: accelerate 1.15, accelerator.py, prepare_model: autocast inside, conversion of the outputs to float32 outside.
    """
    if not mode.autocast:
        return model
    return convert_outputs_to_fp32(torch.autocast("cpu", dtype=mode.autocast_dtype)(model.__call__))


def _loss(forward: Any, batch: Batch) -> torch.Tensor:
    # the outputs die with this frame, before the backward pass, as in Trainer.compute_loss
    outputs = forward(**batch.arguments())
    loss: torch.Tensor = outputs["loss"]
    return loss


def warm_up(model: nn.Module, mode: Mode, batch: Batch) -> None:
    """One short forward pass, so that what happens once is over: biases cast in place, int8 states moved, kernels chosen."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # reentrant checkpoints without gradients
        _like_accelerate(model, mode)(input_ids=batch.input_ids[:1, :4])
    garbage.collect()


@contextmanager
def watched(model: nn.Module, batch: Batch, *, granularity_bytes: int, log: bool = False) -> Iterator[LiveStorages]:
    live = LiveStorages(granularity_bytes=granularity_bytes, kernels=KERNELS, log=log)
    live.know(stored_tensors(model), "static")
    live.know(batch.tensors(), "inputs")
    with live:
        yield live


def _multiset(storages: tuple[Storage, ...]) -> Multiset:
    return Counter((s.shape, s.dtype) for s in storages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is alive between forward and backward pass."""

    num_bytes: int
    storages: tuple[Storage, ...]


def _kernels(*, written_out: bool) -> AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.MATH) if written_out else nullcontext()


def kept(
    family: str,
    mode: str | Mode,
    B: int,
    S: int,
    layers: int,
    *,
    padded: bool = False,
    flattened: bool = False,
    fused_4bit: str = "never",
    written_out: bool = False,
    **options: Any,
) -> Kept:
    """What a model of that many layers keeps for its backward pass, head and loss included [bytes, not rounded].

    Args:
        padded: whether the batch carries padding.
        flattened: whether samples lie end to end in one row, as in a padding-free batch.
        fused_4bit: when the fused 4-bit kernel is taken, a key of `cuda_paths.FUSED_4BIT`.
        written_out: whether sdpa runs in plain operators, as on a card without a kernel for it.
        options: see `models.build`.
    """
    mode = mode_of(mode)
    with cuda_paths(fused_4bit=fused_4bit), _kernels(written_out=written_out):
        model, batch = build(family, mode, layers, **options), Batch.of(B, S, padded=padded, flattened=flattened)
        warm_up(model, mode, batch)
        with watched(model, batch, granularity_bytes=1) as live:
            live.begin("forward")
            loss = _loss(_like_accelerate(model, mode), batch)
            garbage.collect()
            result = Kept(num_bytes=live.live_bytes, storages=live.snapshot())
        del loss
    return result


def kept_per_layer(
    family: str, mode: str | Mode, B: int, S: int, *, depths: tuple[int, int] = (2, 4), **options: Any
) -> tuple[int, Mapping[tuple[tuple[int, ...], torch.dtype], int]]:
    """What one more layer adds to what is kept: bytes, and the storages by shape and type.

    A storage's shape is that of the first tensor seen on it: compare the bytes, and explain them with the shapes.
    """
    few, many = (kept(family, mode, B, S, layers, **options) for layers in depths)
    step = depths[1] - depths[0]
    num_bytes, rest = divmod(many.num_bytes - few.num_bytes, step)
    if rest:
        raise ValueError(f"{family}, {mode}: layers differ from each other")
    counts, fewer = _multiset(many.storages), _multiset(few.storages)
    difference = {key: (counts[key] - fewer[key]) // step for key in sorted(counts.keys() | fewer.keys(), key=str)}
    return num_bytes, {key: count for key, count in difference.items() if count}


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePeak:
    """The worst instant of one phase of one optimizer step."""

    phase: str
    """`forward`: up to the head; `loss`: head and loss; `backward`; `clipping` of gradients, one scalar
    for each of them; `optimizer_step`."""
    live_bytes: int
    """Above weights, quantization state, buffers and inputs [bytes]."""
    allocated_bytes: int
    """With them [bytes]."""
    op: str
    """The operation whose result made the peak."""
    storages: tuple[Storage, ...] = field(repr=False)
    """What was alive then, above `static`: labels tell gradients and optimizer states."""

    def items(self) -> dict[str, int]:
        """Bytes by label."""
        sums: Counter[str] = Counter()
        for storage in self.storages:
            sums[storage.label] += storage.num_bytes
        return dict(sums)

    def table(self) -> str:
        """The snapshot for people: oldest first."""
        return "\n".join(map(str, self.storages))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Two optimizer steps of one run."""

    static_bytes: int
    """Weights, quantization state, buffers [bytes]."""
    input_bytes: int
    kept_bytes: int
    """Alive after the loss of the first step, before its backward pass [bytes]."""
    first: Mapping[str, PhasePeak]
    second: Mapping[str, PhasePeak]
    gradient_bytes: int
    optimizer_state_bytes: int
    steady_state_bytes: int
    """Allocated after the second step, gradients gone, inputs not counted [bytes]."""
    events: tuple[Event, ...] = field(repr=False, default=())

    @property
    def peak(self) -> PhasePeak:
        """The largest of all."""
        return max((*self.first.values(), *self.second.values()), key=lambda p: p.allocated_bytes)


def step(
    family: str,
    mode: str | Mode,
    B: int,
    S: int,
    layers: int,
    *,
    gc: bool | None = None,
    loss: str = "stock",
    accumulation: int = 1,
    optimizer: str = "adamw_torch_fused",
    weight_decay: float = 0.0,
    padded: bool = False,
    flattened: bool = False,
    granularity_bytes: int = 512,
    fused_4bit: str = "never",
    written_out: bool = False,
    log: bool = False,
    **options: Any,
) -> StepReport:
    """Two whole optimizer steps: forward, loss, backward, clipping, update, gradients dropped.

    Args:
        gc: None without gradient checkpointing, False with it, True with the reentrant kind.
        loss: only transformers' own, `stock`.
        accumulation: number of micro-batches per step.
        granularity_bytes: every storage is rounded up to it: 512 as CUDA's allocator counts [bytes].
        optimizer: a value of transformers' OptimizerNames.
        weight_decay: of TrainingArguments.
        written_out: as for `kept`.
        options: see `models.build`.

    Source: transformers 5.23, trainer.py, training_step, _clip_grad_norm, _run_epoch.
    """
    if loss != "stock":
        raise ValueError(f"loss {loss!r}: only 'stock' can be run without Triton")
    mode = mode_of(mode)
    with cuda_paths(fused_4bit=fused_4bit), _kernels(written_out=written_out):
        model, batch = build(family, mode, layers, gc=gc, **options), Batch.of(B, S, padded=padded, flattened=flattened)
        warm_up(model, mode, batch)
        trained = [p for p in model.parameters() if p.requires_grad]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        with watched(model, batch, granularity_bytes=granularity_bytes, log=log) as live:
            enter_head = base.get_output_embeddings().register_forward_pre_hook(lambda *_: live.begin("loss") and None)
            forward = _like_accelerate(model, mode)
            update = as_on_cuda(made_by_trainer(model, optimizer, weight_decay=weight_decay))
            kept_bytes, runs = 0, []
            for number in range(2):
                live.peaks.clear()
                for _ in range(accumulation):
                    live.begin("forward")
                    value = _loss(forward, batch) / accumulation
                    if number == 0 and not kept_bytes:
                        kept_bytes = live.live_bytes
                    live.begin("backward")
                    value.backward()
                    del value
                live.label((p.grad for p in trained if p.grad is not None), "gradient")
                gradient_bytes = sum(s.num_bytes for s in live.snapshot() if s.label == "gradient")
                live.begin("clipping")
                torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
                live.begin("optimizer_step")
                update.step()
                states = [t for s in update.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
                live.label(states, "optimizer_state")
                del states
                runs.append(worst(live))
                for p in trained:
                    p.grad = None
            state_bytes = sum(s.num_bytes for s in live.snapshot() if s.label == "optimizer_state")
            steady = live.known_bytes["static"] + live.live_bytes
            enter_head.remove()
            return StepReport(
                static_bytes=live.known_bytes["static"],
                input_bytes=live.known_bytes["inputs"],
                kept_bytes=kept_bytes,
                first=runs[0],
                second=runs[1],
                gradient_bytes=gradient_bytes,
                optimizer_state_bytes=state_bytes,
                steady_state_bytes=steady,
                events=tuple(live.log or ()),
            )


def backward_changes(family: str, mode: str | Mode, B: int, S: int, layers: int, *, gc: bool | None) -> list[int]:
    """What a backward pass makes, and with a minus what it releases, storage by storage [bytes, not rounded].

    Args:
        gc: see `step`.
    """
    mode = mode_of(mode)
    with cuda_paths():
        model, batch = build(family, mode, layers, gc=gc), Batch.of(B, S)
        warm_up(model, mode, batch)
        with watched(model, batch, granularity_bytes=1, log=True) as live:
            value = _loss(_like_accelerate(model, mode), batch)
            assert live.changes is not None
            before = len(live.changes)
            value.backward()
            return live.changes[before:]


def worst(live: LiveStorages) -> Mapping[str, PhasePeak]:
    known = live.known_bytes.total()
    largest: dict[str, Peak] = {}
    for peak in live.peaks:
        if peak.phase not in largest or peak.num_bytes > largest[peak.phase].num_bytes:
            largest[peak.phase] = peak
    return {
        name: PhasePeak(phase=name, live_bytes=p.num_bytes, allocated_bytes=known + p.num_bytes, op=p.op, storages=p.storages)
        for name, p in largest.items()
    }
