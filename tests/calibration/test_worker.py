"""The worker's model against what transformers loads, and its loop on the CPU."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig

from calibration.case import Case
from calibration.record import Figures, Kind, Outcome, PhasePeak, environment_here
from calibration.runner import Device, Runner
from calibration.worker import model as built
from calibration.worker import surroundings
from calibration.worker.__main__ import run
from calibration.worker.generation import generate
from calibration.worker.meter import CudaMeter, count_parameters
from calibration.worker.model import build
from calibration.worker.training import train
from tests.calibration.cases import GPT2, LLAMA, MIXTRAL, NF4, QLORA, case

CPU = torch.device("cpu")


def tensors(model: Any) -> dict[str, tuple[Any, ...]]:
    """Name, class, shape, type and state of every tensor of a model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, tuple[Any, ...]] = {}
    for name, tensor in {**parameters, **dict(model.named_buffers())}.items():
        state = getattr(tensor, "quant_state", None)
        kept = (state.absmax.dtype, tuple(state.absmax.shape), state.dtype, state.nested) if state is not None else None
        scales = getattr(tensor, "SCB", None)
        found[name] = (type(tensor).__name__, tuple(tensor.shape), tensor.dtype, kept, None if scales is None else tuple(scales.shape))
    return found


@pytest.mark.parametrize("config", [LLAMA, {**LLAMA, "tie_word_embeddings": True}, GPT2, MIXTRAL], ids=["llama", "tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("quantization", [None, NF4, {"load_in_8bit": True}], ids=["16bit", "nf4", "int8"])
def test_the_built_model_has_the_tensors_that_from_pretrained_loads(
    config: dict[str, Any], quantization: dict[str, Any] | None, tmp_path: Path
) -> None:
    source = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)), dtype=torch.bfloat16)
    source.save_pretrained(tmp_path)
    options = {} if quantization is None else {"quantization_config": BitsAndBytesConfig(**quantization)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **options)
    built_here = build(case(config, quantization=quantization), CPU)
    assert tensors(built_here) == tensors(loaded)
    # what PEFT, Trainer and accelerate ask a model for
    for name in ("hf_device_map", "hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        assert hasattr(built_here, name) == hasattr(loaded, name), name


@pytest.mark.parametrize("quantization", [None, NF4], ids=["16bit", "nf4"])
def test_weights_of_a_checkpoint_are_loaded_where_a_case_names_one(quantization: dict[str, Any] | None, tmp_path: Path) -> None:
    source = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"].from_dict(dict(LLAMA)), dtype=torch.bfloat16)
    source.save_pretrained(tmp_path)
    one = case(quantization=quantization)
    found = build(one.model_copy(update={"checkpoint": f"{tmp_path}@main"}), CPU)
    assert tensors(found) == tensors(build(one, CPU))
    assert torch.equal(found.get_input_embeddings().weight, source.get_input_embeddings().weight)


def test_packed_weights_count_unpacked() -> None:
    plain = build(case(quantization=None, peft=None), CPU)
    packed = build(case(), CPU)
    assert count_parameters(packed)[0] == count_parameters(plain)[0] == sum(p.numel() for p in plain.parameters())


def test_preparing_for_kbit_training_makes_the_rest_float32() -> None:
    model = build(case(prepare_model_for_kbit_training=True), CPU)
    rest = {p.dtype for p in model.parameters() if type(p).__name__ != "Params4bit"}
    assert rest == {torch.float32}


class Listener:
    """A meter that only remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def loaded(self, model: torch.nn.Module) -> None:
        self.told.append("loaded")

    def begin_step(self) -> None:
        self.told.append("step")

    def close(self, span: str) -> None:
        self.told.append(span)

    def figures(self) -> Figures | None:
        return None


def test_every_phase_of_the_trainers_loop_is_closed_in_order() -> None:
    training = {**QLORA["training"], "gradient_accumulation_steps": 2, "optim": "adamw_torch"}
    accumulated = case(training=training)
    listener = Listener()
    train(accumulated, build(accumulated, CPU), listener, on_cpu=True)
    micro_batch = ["forward", "loss", "backward_head", "backward_layers"]
    step = ["step", *micro_batch, *micro_batch, "optimizer_step"]
    assert listener.told == ["loaded", *step, *step]


@pytest.mark.parametrize(
    ("changes", "new", "told"),
    [
        ({}, 4, ["step", "prefill", "decode"]),
        ({"peft": None, "quantization": None, "padded": True}, 4, ["step", "prefill", "decode"]),
        ({"prepare_model_for_kbit_training": True}, 1, ["step", "prefill"]),
    ],
    ids=["adapter on nf4", "plain and padded", "one token"],
)
def test_a_generation_is_parted_where_the_prompt_is_read(changes: dict[str, Any], new: int, told: list[str]) -> None:
    one = case(training=None, inference={"batch_size": 2, "prompt_length": 12, "max_new_tokens": new}, **changes)
    listener = Listener()
    assert generate(one, build(one, CPU), listener, CPU) > 0
    assert listener.told == ["loaded", *told, *told]


class _Allocator:
    """Stands in for `torch.cuda`: a test sets what is allocated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.top = self.reserved = 0
        self.outside = 500
        self.fractions: list[float] = []
        for name, answer in {
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "memory_allocated": lambda: self.now,
            "max_memory_allocated": lambda: self.top,
            "memory_reserved": lambda: self.reserved,
            "max_memory_reserved": lambda: self.reserved,
            "reset_peak_memory_stats": self._reset,
            "mem_get_info": lambda: (10_000 - self.outside - self.reserved, 10_000),
            "memory_stats": lambda: {"num_alloc_retries": 0, "segment.all.current": 3},
            "set_per_process_memory_fraction": self.fractions.append,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *shape, **named: None if named.get("device") == "cuda" else zeros(*shape, **named))

    def _reset(self) -> None:
        self.top = self.now

    def use(self, top: int, now: int) -> None:
        self.top, self.now, self.reserved = max(self.top, top), now, max(self.reserved, top + 50)


def test_peaks_are_kept_apart_by_phase_and_come_from_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = _Allocator(monkeypatch)
    meter = CudaMeter(foreign_bytes=100)
    allocator.use(top=1000, now=800)
    meter.loaded(torch.nn.Linear(2, 3))
    for states in (0, 64):
        meter.begin_step()
        for span, top, now in (
            ("forward", 1200, 1100),
            ("loss", 1500, 1300),
            ("backward_head", 1900, 1200),
            ("backward_layers", 1700, 900),
            ("optimizer_step", 1000, 864),
        ):
            allocator.use(top=top + states, now=now if span != "optimizer_step" else 864)
            meter.close(span)
    figures = meter.figures()
    assert figures is not None
    assert (figures.context_bytes, figures.loaded_bytes, figures.steady_state_bytes) == (400, 800, 864)
    assert {phase: peak.allocated_bytes for phase, peak in figures.phases.items()} == {
        "load": 1000,
        "forward": 1264,
        "loss": 1564,
        "backward": 1964,
        "optimizer_step": 1064,
    }
    assert figures.phases["load"] == PhasePeak(allocated_bytes=1000, reserved_bytes=1050)
    assert (figures.backward_head_bytes, figures.backward_layers_bytes) == (1964, 1764)
    assert (figures.peak_allocated_bytes, figures.peak_reserved_bytes, figures.run_allocated_bytes) == (1964, 2014, 1964)
    assert figures.device_bytes == 400 + 2014
    assert (figures.num_parameters, figures.num_trainable) == (9, 9)


def test_a_generation_keeps_what_loading_left_in_the_cache_and_shows_its_own_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = _Allocator(monkeypatch)
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    meter = CudaMeter(foreign_bytes=100, is_training=False)
    meter.loaded(torch.nn.Linear(2, 3))
    meter.begin_step()
    for span, top in (("prefill", 900), ("decode", 700)):
        allocator.use(top=top, now=600)
        meter.close(span)
    figures = meter.figures()
    assert figures is not None
    assert {phase: peak.allocated_bytes for phase, peak in figures.phases.items()} == {"load": 0, "prefill": 900, "decode": 700}
    assert emptied == []


def test_a_cap_leaves_the_allocator_what_context_and_libraries_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 bytes of which others use 100: of a cap of 4,000 the context takes 400, and libraries 200 more in the first step."""
    allocator = _Allocator(monkeypatch)
    meter = CudaMeter(foreign_bytes=100, cap_bytes=4000)
    allocator.use(top=1000, now=800)
    meter.loaded(torch.nn.Linear(2, 3))
    meter.begin_step()
    allocator.outside += 200
    meter.close("forward")
    meter.close("optimizer_step")
    assert allocator.fractions == [0.36, 0.36, 0.34]
    allocator.outside += 1000  # managed memory of a paged optimizer, which a full card would push out
    meter.close("forward")
    assert len(allocator.fractions) == 3


def plain() -> Case:
    """A case whose trainer asks for nothing that only a card has."""
    return case(quantization=None, training={**QLORA["training"], "bf16": False})


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[_Allocator, list[object]]:
    """The measuring path, whole, with the model on the CPU, an allocator whose counters stand still, and a driver that answers."""
    allocator, told = _Allocator(monkeypatch), list[object]()
    monkeypatch.setattr(surroundings, "missing_cuda", lambda: None)
    monkeypatch.setattr(surroundings, "environment", lambda _device: environment_here(gpu="NVIDIA GeForce RTX 4090"))
    monkeypatch.setattr(built, "build", lambda one, _device: build(one, CPU))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **named: told.append(named))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", told.append)
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncase "$*" in *memory.used*) echo 900;; *compute-apps*) echo "{os.getpid()}, 700, python";; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    allocator.use(top=1000, now=800)
    return allocator, told


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # there is no card to pin it for
def test_a_case_on_a_card_ends_in_figures_what_the_driver_says_and_a_snapshot(on_a_card: tuple[_Allocator, list[object]]) -> None:
    report = run(plain(), "cuda", 100, Path("/somewhere/history.pickle"))
    assert report.outcome == "ok", report.error
    assert report.figures is not None
    assert set(report.figures.phases) == {"load", "forward", "loss", "backward", "optimizer_step"}
    assert (report.figures.nvml_process_bytes, report.figures.nvml_device_bytes) == (700 * 2**20, 900 * 2**20)
    assert on_a_card[1] == [{"stacks": "python", "max_entries": 1_000_000}, "/somewhere/history.pickle", {"enabled": None}]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "oom"),
        (torch.AcceleratorError("CUDA error: out of memory"), "oom"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "failed"),
        (ValueError("out of memory"), "failed"),
    ],
)
def test_a_full_card_is_told_from_other_failures(
    error: Exception, outcome: str, on_a_card: tuple[_Allocator, list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(built, "build", fails)
    report = run(plain(), "cuda", 100, Path("history.pickle"))
    assert report.outcome == outcome
    assert str(error)[:40] in (report.error or "")
    assert (report.figures is not None) == (outcome == "oom")
    assert "history.pickle" in on_a_card[1]  # what filled the card is what one wants to see


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
@pytest.mark.parametrize("broken", [False, True])
def test_a_history_that_cannot_be_written_costs_neither_the_run_nor_the_reason_it_failed(
    broken: bool, on_a_card: tuple[_Allocator, list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: str) -> None:
        raise OSError("No space left on device")

    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("no such layer")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    if broken:
        monkeypatch.setattr(built, "build", fails)
    report = run(plain(), "cuda", 100, Path("history.pickle"))
    assert (report.outcome, report.figures is not None) == (("failed", False) if broken else ("ok", True))
    assert "history.pickle: No space left on device" in (report.error or "")
    assert ("no such layer" in (report.error or "")) == broken
    assert on_a_card[1][-1] == {"enabled": None}


def test_a_card_without_a_cap_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = _Allocator(monkeypatch)
    meter = CudaMeter(foreign_bytes=100)
    meter.loaded(torch.nn.Linear(2, 3))
    meter.close("forward")
    assert allocator.fractions == []


def test_a_dry_run_runs_the_step_in_a_process_of_its_own() -> None:
    record = Runner(device=Device.CPU, timeout_seconds=240).run(case())
    assert record.outcome is Outcome.OK, record.error
    assert (record.kind, record.figures, record.is_measurement) == (Kind.DRY_RUN, None, False)
    assert record.environment is not None
    assert record.environment.torch == torch.__version__


@pytest.mark.slow
def test_a_generation_runs_dry_too() -> None:
    one = case(training=None, inference={"batch_size": 2, "prompt_length": 12, "max_new_tokens": 4})
    record = Runner(device=Device.CPU, timeout_seconds=240).run(one)
    assert (record.outcome, record.kind, record.figures) == (Outcome.OK, Kind.DRY_RUN, None), record.error


@pytest.mark.slow
def test_trl_runs_dry_too() -> None:
    record = Runner(device=Device.CPU, timeout_seconds=240).run(case(trainer="trl"))
    assert record.outcome is Outcome.OK, record.error
