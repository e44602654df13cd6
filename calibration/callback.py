"""A callback for one's own training run: what it was predicted to take beside what it takes, phase by phase.

    trainer = Trainer(..., callbacks=[MemoryCallback(record="memory.jsonl")])

Before the first step it warns where the run does not fit what is free on the card. It watches some steps, prints both figures, and appends
a record in the form of `vramplan calibrate run`. Peaks of phases are read by resetting torch's own peak counters between them.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from calibration.card import driver_version, is_slice, processes
from calibration.case import Case, JsonObject
from calibration.record import Environment, Figures, Kind, Outcome, Provenance, Record, RecordFile, package_version
from calibration.trainer_request import longest_row, name_of, request_of
from calibration.worker.meter import CudaMeter, Meter, SilentMeter
from calibration.worker.surroundings import environment
from calibration.worker.training import Borders, watch_decoder
from estimator.errors import RequestError, VramplanError
from estimator.gpus import find_gpu
from estimator.nvidia_smi import SmiProcess
from estimator.units import GIB, gib

_ROOT = Path(__file__).resolve().parents[1]
_ANSWERED = (0, 3)  # fits or not
_LONGEST_ANSWER_SECONDS = 180
_MOST_STEPS = 16  # that a case may have

Ask = Callable[[JsonObject], JsonObject]
"""Answers a request of `vramplan estimate`.

Raises:
    VramplanError: if it cannot be answered.
"""


def ask_vramplan(request: JsonObject) -> JsonObject:
    """`vramplan estimate` in a process of its own: the training process is left as it is."""
    command = [sys.executable, "-m", "app", "estimate", "--request", "-", "--json"]
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    surroundings = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_LONGEST_ANSWER_SECONDS,
            env=surroundings,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise RequestError(f"the estimate could not be asked for: {error}") from error
    if done.returncode not in _ANSWERED:
        raise RequestError(done.stderr.strip().removeprefix("error: ")[-500:] or f"exit code {done.returncode}")
    answer: JsonObject = json.loads(done.stdout)
    return answer


class Card(Protocol):
    """What is read of the card that a run is on."""

    @property
    def kind(self) -> Kind:
        """What figures of it rest on."""

    @property
    def meter(self) -> Meter:
        """Reads the allocator."""

    @property
    def others(self) -> Sequence[SmiProcess] | None:
        """Other processes on it when the run began; None where the driver does not tell."""

    def free_bytes(self) -> int | None:
        """What the driver can still give, beside what this process holds [bytes]."""

    def reserved_bytes(self) -> int:
        """What this process's allocator holds already [bytes]."""

    def environment(self) -> Environment:
        """Card and libraries."""


def uuid_of(device: torch.device) -> str:
    """What the driver knows the card by, whatever order this process counts cards in.

    In MIG mode it is the slice's own, which has a prefix of its own. By the whole card's the processes of all its slices would be told, and
    those of neighbours be taken for users of this slice.

    That in MIG mode torch has the slice's own was not seen on a card. The runtime's documentation does not say whose it is there; the
    driver's does, of a call of its own.

    Source: torch 2.13, _C/__init__.pyi, _CudaDeviceProperties.uuid, which csrc/cuda/Module.cpp, registerCudaDeviceProperties, binds to
    `cudaDeviceProp.uuid` of CUDA's runtime; without the prefix. CUDA Driver API, cuDeviceGetUuid_v2, since CUDA 13 cuDeviceGetUuid: in MIG
    mode the UUID of the slice. NVML API, nvmlDeviceGetComputeRunningProcesses: of a slice by its handle, of all slices by the card's.
    """
    card = torch.cuda.get_device_properties(device)
    found = str(card.uuid)
    if found.startswith(("GPU-", "MIG-")):
        return found
    return f"{'MIG' if is_slice(card.name) else 'GPU'}-{found}"


class CudaCard:
    """The CUDA card of this process."""

    kind = Kind.MEASURED

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device
        self._card = uuid_of(self._device)
        seen = processes(self._card)
        # in a container of its own this process may not find itself: then nobody can be told apart
        rest = tuple(process for process in seen or () if process.pid != os.getpid())
        self.others = None if seen is None or len(rest) == len(seen) else rest
        self.meter: Meter = CudaMeter(self.foreign_bytes or 0)

    @property
    def foreign_bytes(self) -> int | None:
        """What others hold [bytes]; None where the driver does not tell."""
        if self.others is None or any(process.used_bytes is None for process in self.others):
            return None
        return sum(process.used_bytes or 0 for process in self.others)

    def free_bytes(self) -> int | None:
        return int(torch.cuda.mem_get_info(self._device)[0])

    def reserved_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def environment(self) -> Environment:
        return environment(self._device).model_copy(update={"driver": driver_version(self._card)})


class NoCard:
    """A run on the CPU: predictions are printed, nothing is measured."""

    kind = Kind.DRY_RUN
    others: Sequence[SmiProcess] | None = None

    def __init__(self) -> None:
        self.meter: Meter = SilentMeter()

    def free_bytes(self) -> int | None:
        return None

    def reserved_bytes(self) -> int:
        return 0

    def environment(self) -> Environment:
        return environment(torch.device("cpu"))


class MemoryCallback(TrainerCallback):  # type: ignore[misc]  # the framework's base class is untyped
    """Predicted beside observed memory of the first steps of a training run."""

    def __init__(
        self,
        *,
        record: str | Path | None = None,
        steps: int = 8,
        max_length: int | None = None,
        ask: Ask = ask_vramplan,
        card: Card | None = None,
        write: Callable[[str], None] = print,
    ) -> None:
        """What to watch.

        Args:
            record: JSONL file that a record is appended to; none where absent.
            steps: optimizer steps that are watched, from the second on where there is one: the first has no optimizer states yet.
            max_length: longest sequence to come, for the warning before the first step; asked of the dataset where absent [tokens].
            ask: answers requests.
            card: where the run is; found out where absent.
            write: takes what is told, line by line.
        """
        self._record = Path(record) if record is not None else None
        self._steps = steps
        self._max_length = max_length
        self._ask = ask
        self._given_card = card
        self._write = write
        self._run: _Run | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **_: Any) -> None:
        if not state.is_local_process_zero or model is None:
            return
        if args.world_size > 1 or args.n_gpu > 1:
            self._write("vramplan: runs over several cards are not compared")
            return
        card = self._given_card or (CudaCard(args.device) if args.device.type == "cuda" else NoCard())
        self._run = _Run(args, model, card, self._ask, self._write)
        self._run.warn(self._max_length or longest_row(train_dataloader) or getattr(args, "max_length", None))
        self._run.attach()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self._run is not None:
            self._run.borders.is_watching = True
            self._run.borders.on_step_begin()

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        if self._run is not None:
            self._run.borders.on_substep_end()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self._run is not None:
            self._run.borders.on_pre_optimizer_step()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self._run is not None:
            self._run.borders.on_optimizer_step()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._run is not None:
            self._run.end_step()
            if self._run.num_steps >= self._steps:
                self._finish()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        run.detach()
        run.tell()
        if self._record is not None and (record := run.record()) is not None:
            RecordFile(self._record).append(record)
            self._write(f"vramplan: record appended to {self._record}; `vramplan calibrate compare {self._record}` reads it")


class _Run:
    """One training run, from its first step to the last one watched."""

    def __init__(self, arguments: Any, model: Any, card: Card, ask: Ask, write: Callable[[str], None]) -> None:
        self.arguments = arguments
        self.model = model
        self.card = card
        self.borders = Borders(card.meter)
        self.borders.is_watching = False
        self.num_steps = 0
        self._ask = ask
        self._write = write
        self._hooks: list[Any] = []
        self._answers: dict[tuple[int, int, bool], JsonObject] = {}
        self._batch: tuple[int, int, bool] | None = None
        """Of this step: sequences, tokens in each, whether there is padding; the largest of its micro-batches."""
        self._seen: tuple[int, int, bool] | None = None
        """Of the step whose figures are kept."""
        self._figures: Figures | None = None
        self._step_seconds = 0.0
        self._started_at = datetime.now(UTC)
        self._started = time.monotonic()

    # -- before the first step ------------------------------------------------------------------------------------------------------------

    def warn(self, max_length: int | None) -> None:
        """Says so if the run does not fit what is free now."""
        if max_length is None:
            self._write("vramplan: the length of the sequences is not known before they come; give MemoryCallback(max_length=…)")
            return
        answer = self._answer(self.arguments.per_device_train_batch_size, max_length, padded=False)
        peak = answer.get("peak") if answer is not None else None
        free = self.card.free_bytes()
        if not isinstance(peak, dict) or free is None:
            return
        needed, held = _int(peak["reserved_bytes"]), self.card.reserved_bytes()
        if needed - held > free:
            self._write(
                f"vramplan: WARNING: this run is predicted to reserve {gib(needed)}; {gib(held)} are held, {gib(free)} of the card are "
                f"free: {gib(needed - held - free)} are missing.{self._occupants()}"
            )

    def _occupants(self) -> str:
        others = self.card.others
        if others is None:
            return " Who else uses the card is not told; `nvidia-smi` may."
        named = ", ".join(f"{one.name} (pid {one.pid}{'' if one.used_bytes is None else f', {gib(one.used_bytes)}'})" for one in others)
        return f" In use by others: {named}." if named else ""

    def _answer(self, batch_size: int, max_length: int, *, padded: bool) -> JsonObject | None:
        key = (batch_size, max_length, padded)
        if key not in self._answers:
            try:
                request = request_of(self.model, self.arguments, batch_size=batch_size, max_length=max_length, padded=padded)
                self._answers[key] = self._ask({**request, **self._hardware()})
            except VramplanError as error:
                self._write(f"vramplan: no prediction: {error.message}")
                return None
        return self._answers[key]

    def _hardware(self) -> JsonObject:
        """The card as the request names it: by its catalogue id, or by its size where the catalogue has none."""
        here = self.card.environment()
        allocator: JsonObject = {"pytorch_cuda_alloc_conf": here.allocator_config} if here.allocator_config else {}
        if here.gpu is None or here.total_bytes is None:
            return allocator
        try:
            return {**allocator, "hardware": {"gpu": find_gpu(here.gpu, total_bytes=here.total_bytes).id}}
        except VramplanError:
            return {**allocator, "hardware": {"capacity_gib": here.total_bytes / GIB}}

    # -- while it runs --------------------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Puts the borders between phases into the model."""
        self.card.meter.loaded(self.model)
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward),
        ]
        if (hook := watch_decoder(self.model, self.borders)) is not None:
            self._hooks.append(hook)

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before_forward(self, _module: torch.nn.Module, _arguments: Any, named: dict[str, Any]) -> None:
        tokens = named.get("input_ids")
        if not self.borders.is_watching or tokens is None:
            return
        mask = named.get("attention_mask")
        padded = mask is not None and mask.dim() == 2 and not bool(mask.all())
        batch, length = int(tokens.shape[0]), int(tokens.shape[1])
        if getattr(self.arguments, "padding_free", False) and batch == 1:
            # one flattened row stands for the whole micro-batch
            batch = self.arguments.per_device_train_batch_size
            length = -(-length // batch)
        found = (batch, length, padded)
        if self._batch is None or batch * length > self._batch[0] * self._batch[1]:
            self._batch = found

    def _after_forward(self, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        """The loss stands once the first gradient comes back: of the model's own loss, or of what a trainer makes another loss from."""
        if not self.borders.is_watching:
            return
        found: Any = output if isinstance(output, tuple) else [getattr(output, name, None) for name in ("loss", "log_probs", "logits")]
        is_open = [True]

        def close(_gradient: torch.Tensor) -> None:
            if is_open:
                is_open.clear()
                self.borders.meter.close("loss" if self.borders.head_seen else "forward")

        for one in found:
            if isinstance(one, torch.Tensor) and one.requires_grad:
                _on_gradient(one, close)

    def end_step(self) -> None:
        """Keeps the figures of the largest step so far; of the first one only until there is another, since it had no optimizer states."""
        self.borders.on_step_end()
        self.borders.is_watching = False
        self.num_steps += 1
        batch, self._batch = self._batch, None
        if batch is None:
            return
        if self.num_steps <= 2 or self._seen is None or batch[0] * batch[1] >= self._seen[0] * self._seen[1]:
            self._seen, self._figures, self._step_seconds = batch, self.card.meter.figures(), self.borders.step_seconds

    # -- afterwards -----------------------------------------------------------------------------------------------------------------------

    def tell(self) -> None:
        """Prints predicted beside observed figures."""
        if self._seen is None:
            self._write("vramplan: no step was seen")
            return
        batch, length, padded = self._seen
        answer = self._answer(batch, length, padded=padded)
        if answer is None:
            return
        self._write(f"vramplan: {batch} × {length} tokens{', padded' if padded else ''}, after {self.num_steps} steps")
        self._write(f"{'':<18}{'predicted':>14}{'observed':>14}{'observed is':>14}")
        for name, predicted, observed in _lines(answer, self._figures):
            off = f"{observed / predicted - 1:+.1%}" if observed is not None and predicted else ""
            self._write(f"{name:<18}{gib(predicted):>14}{'-' if observed is None else gib(observed):>14}{off:>14}")
        if self._figures is None:
            self._write("nothing was measured: the run is not on a CUDA card")

    def record(self) -> Record | None:
        """What was seen, as `vramplan calibrate` keeps it; None where no step was."""
        if self._seen is None:
            return None
        batch, length, padded = self._seen
        request = request_of(self.model, self.arguments, batch_size=batch, max_length=length, padded=padded)
        content = request.pop("model")
        assert isinstance(content, dict)
        config = content["config"]
        assert isinstance(config, dict)
        of = Case.from_request({**request, "model": name_of(self.model)}, config)
        case = of.model_copy(update={"num_steps": min(_MOST_STEPS, max(of.num_steps, self.num_steps))})
        others = self.card.others
        foreign = None if others is None else sum(one.used_bytes or 0 for one in others)
        figures = self._figures
        if figures is not None and foreign is None:
            # what others hold cannot be told from what is the run's own
            figures = figures.model_copy(update={"device_bytes": None, "context_bytes": None})
        return Record(
            case_hash=case.hash,
            case=case,
            kind=self.card.kind,
            outcome=Outcome.OK,
            figures=figures if self.card.kind is not Kind.DRY_RUN else None,
            environment=self.card.environment(),
            provenance=Provenance(
                vramplan=package_version("vramplan") or "unknown",
                started_at=self._started_at.isoformat(timespec="seconds"),
                duration_seconds=round(time.monotonic() - self._started, 3),
                step_seconds=round(self._step_seconds, 4),
                foreign_before_bytes=foreign,
            ),
        )


def _lines(answer: JsonObject, figures: Figures | None) -> list[tuple[str, int, int | None]]:
    """Name, predicted and observed bytes, for every phase and for the whole."""
    peak, phases = answer["peak"], answer["phases"]
    assert isinstance(phases, list)
    seen = figures.phases if figures is not None else {}
    found: list[tuple[str, int, int | None]] = []
    for phase in phases:
        assert isinstance(phase, dict)
        name = str(phase["phase"])
        found.append((name, _int(phase["allocated_bytes"]), seen[name].allocated_bytes if name in seen else None))
    if isinstance(peak, dict):
        steady = answer.get("steady_state_bytes")
        if isinstance(steady, int):
            found.append(("steady state", steady, figures.steady_state_bytes if figures else None))
        found += [
            ("peak allocated", _int(peak["allocated_bytes"]), figures.peak_allocated_bytes if figures else None),
            ("peak reserved", _int(peak["reserved_bytes"]), figures.peak_reserved_bytes if figures else None),
            ("device", _int(peak["device_bytes"]), figures.device_bytes if figures else None),
        ]
    return found


def _on_gradient(tensor: Any, call: Callable[[torch.Tensor], None]) -> None:
    tensor.register_hook(call)


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value
