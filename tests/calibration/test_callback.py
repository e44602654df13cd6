"""The callback in transformers' own Trainer on the CPU, with a card whose counters the test sets."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from app.service import answer
from calibration.callback import CudaCard, MemoryCallback, NoCard, _Run, ask_vramplan, uuid_of
from calibration.case import JsonObject
from calibration.record import Environment, Figures, Kind, PhasePeak, RecordFile, environment_here
from calibration.worker.model import adapted, build
from estimator.errors import RequestError
from estimator.nvidia_smi import SmiProcess
from estimator.units import GIB, MIB
from tests.calibration.cases import LLAMA, case
from tests.calibration.test_worker import Listener

VOCABULARY = LLAMA["vocab_size"]


class Counters(Listener):
    """A meter that notes what it is told, and a card with so much free."""

    kind = Kind.MEASURED

    def __init__(self, *, free: int = 8 * GIB, others: Sequence[SmiProcess] | None = ()) -> None:
        super().__init__()
        self.others = others
        self._free = free

    @property
    def meter(self) -> "Counters":
        return self

    def free_bytes(self) -> int | None:
        return self._free

    def reserved_bytes(self) -> int:
        return 0

    def environment(self) -> Environment:
        card = {"gpu": "NVIDIA A100-SXM4-80GB", "compute_capability": "8.0", "num_multiprocessors": 108, "total_bytes": 80 * GIB}
        return environment_here(**card)

    def figures(self) -> Figures:
        number = self.told.count("step")
        peak = PhasePeak(allocated_bytes=number * MIB, reserved_bytes=2 * number * MIB)
        return Figures(
            loaded_bytes=MIB,
            steady_state_bytes=number * MIB,
            phases={"forward": peak, "backward": peak},
            peak_allocated_bytes=number * MIB,
            peak_reserved_bytes=2 * number * MIB,
            device_bytes=512 * MIB,
        )


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pads to the longest row."""
    longest = max(len(row["input_ids"]) for row in rows)
    padded = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    ids = torch.tensor(padded)
    return {"input_ids": ids, "attention_mask": torch.tensor(mask), "labels": ids.clone()}


def train(folder: Path, lengths: Sequence[int], callback: MemoryCallback, **fields: Any) -> None:
    """A run over rows of these lengths, in order, two to a micro-batch."""
    one = case()
    rows = [{"input_ids": [index % VOCABULARY for index in range(length)]} for length in lengths]
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": True,
        "bf16": True,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "num_train_epochs": 1,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
        **fields,
    }
    Trainer(
        model=adapted(one, build(one, torch.device("cpu"))),
        args=TrainingArguments(**options),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[callback],
    ).train()


def watched(folder: Path, lengths: Sequence[int], card: Any = None, *, callback: Any = None, **fields: Any) -> tuple[Any, list[str]]:
    """The card afterwards, and the lines told."""
    lines: list[str] = []
    card = card or Counters()
    options: dict[str, Any] = {"card": card, "ask": ask, "write": lines.append, **(callback or {})}
    train(folder, lengths, MemoryCallback(**options), **fields)
    return card, lines


def ask(request: JsonObject) -> JsonObject:
    return answer(request)


def test_every_phase_of_every_step_is_closed_in_order(tmp_path: Path) -> None:
    card, _ = watched(tmp_path, [16] * 8, gradient_accumulation_steps=2)
    micro_batch = ["forward", "loss", "backward_head", "backward_layers"]
    assert card.told == ["loaded", *(["step", *micro_batch, *micro_batch, "optimizer_step"] * 2)]


def test_predicted_and_observed_are_printed_phase_by_phase(tmp_path: Path) -> None:
    _, lines = watched(tmp_path, [16] * 6)
    expected = answer({"model": {"config": LLAMA}, **case().request, "hardware": {"gpu": "a100-80"}})
    table = {line[:18].strip(): line[18:].split() for line in lines[2:]}
    assert "2 × 16 tokens, after 3 steps" in lines[0]
    phases = [phase["phase"] for phase in expected["phases"]]
    assert list(table) == [*phases, "steady state", "peak allocated", "peak reserved", "device"]
    assert table["load"][2:] == ["-"]  # these counters show no load
    assert table["peak allocated"][2:4] == ["3.0", "MiB"]


def test_a_record_is_kept_that_calibrate_reads(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    others = (SmiProcess(pid=7, name="python", used_bytes=0),)
    watched(tmp_path, [16] * 6, Counters(others=others), callback={"record": file})
    (record,) = RecordFile(file)
    assert (record.kind, record.case.batch_size, record.case.sequence_length, record.case.num_steps) == (Kind.MEASURED, 2, 16, 3)
    assert isinstance(quantization := record.case.request["quantization"], dict)
    assert (quantization["load_in_4bit"], quantization["bnb_4bit_quant_type"]) == (True, "nf4")
    assert record.figures is not None
    assert record.figures.device_bytes == 512 * MIB
    assert record.is_measurement


def test_device_bytes_are_left_out_where_others_cannot_be_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    watched(tmp_path, [16] * 4, Counters(others=None), callback={"record": file})
    (record,) = RecordFile(file)
    assert record.figures is not None
    assert (record.figures.device_bytes, record.figures.peak_allocated_bytes) == (None, 2 * MIB)


def test_the_largest_step_is_kept_and_predicted_at_its_own_size(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    _, lines = watched(tmp_path, [16, 16, 8, 8, 24, 20, 12, 12], callback={"record": file})
    (record,) = RecordFile(file)
    assert (record.case.sequence_length, record.case.request["padded"]) == (24, True)
    assert record.figures is not None
    assert record.figures.peak_allocated_bytes == 3 * MIB
    assert "2 × 24 tokens, padded, after 4 steps" in lines[0]


def test_the_first_step_counts_only_where_it_is_the_only_one(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    watched(tmp_path, [32, 32, 8, 8], callback={"record": file})
    watched(tmp_path, [32, 32], callback={"record": file})
    assert [one.case.sequence_length for one in RecordFile(file)] == [8, 32]


def test_it_watches_as_many_steps_as_asked_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    card, lines = watched(tmp_path, [16] * 10, callback={"steps": 2})
    assert card.told.count("step") == 2
    assert "after 2 steps" in lines[0]


def test_a_run_beyond_what_is_free_is_warned_of_before_its_first_step(tmp_path: Path) -> None:
    stale = (SmiProcess(pid=4242, name="python", used_bytes=70 * GIB), SmiProcess(pid=77, name="jupyter", used_bytes=None))
    _, lines = watched(tmp_path, [16] * 4, Counters(free=8 * MIB, others=stale))
    assert "WARNING" in lines[0]
    assert "8.0 MiB of the card are free" in lines[0]
    assert lines[0].endswith("In use by others: python (pid 4242, 70.00 GiB), jupyter (pid 77).")
    _, fitting = watched(tmp_path, [16] * 4, Counters(free=GIB))
    assert not any("WARNING" in line for line in fitting)


def test_the_warning_looks_at_the_longest_row_to_come(tmp_path: Path) -> None:
    asked: list[JsonObject] = []

    def listening(request: JsonObject) -> JsonObject:
        asked.append(request)
        return ask(request)

    watched(tmp_path, [16, 16, 48, 16], callback={"ask": listening, "steps": 1})
    first = asked[0]["training"]
    assert isinstance(first, dict)
    assert first["max_length"] == 48


def test_what_cannot_be_predicted_is_said_and_the_run_goes_on(tmp_path: Path) -> None:
    def refusing(_request: JsonObject) -> JsonObject:
        raise RequestError("no such kernel")

    file = tmp_path / "records.jsonl"
    _, lines = watched(tmp_path, [16] * 4, callback={"ask": refusing, "record": file})
    assert lines[0] == "vramplan: no prediction: no such kernel"
    assert len(list(RecordFile(file))) == 1


def test_on_the_cpu_predictions_are_printed_and_nothing_counts_as_measured(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    _, lines = watched(tmp_path, [16] * 4, NoCard(), callback={"record": file})
    assert lines[-2] == "nothing was measured: the run is not on a CUDA card"
    (record,) = RecordFile(file)
    assert (record.kind, record.figures, record.is_measurement) == (Kind.DRY_RUN, None, False)


def test_runs_over_several_cards_are_left_alone() -> None:
    lines: list[str] = []
    callback = MemoryCallback(write=lines.append)
    callback.on_train_begin(SimpleNamespace(world_size=2, n_gpu=1), SimpleNamespace(is_local_process_zero=True), None, model=object())
    callback.on_step_begin()
    callback.on_step_end()
    callback.on_train_end()
    assert lines == ["vramplan: runs over several cards are not compared"]


def test_the_estimate_is_asked_of_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: JsonObject = {
        "model": "EleutherAI/pythia-14m",
        "dtype": "bfloat16",
        "training": {"per_device_train_batch_size": 1, "max_length": 8},
    }
    assert ask_vramplan(asked)["peak"] == json.loads(json.dumps(answer(asked)["peak"]))
    with pytest.raises(RequestError, match="dtype: 'float3'"):
        ask_vramplan({**asked, "dtype": "float3"})
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RequestError, match="could not be asked for"):
        ask_vramplan(asked)


def test_a_process_that_does_not_find_itself_on_the_card_tells_nobody_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from calibration import callback

    mine = SmiProcess(pid=os.getpid(), name="python", used_bytes=GIB)
    other = SmiProcess(pid=1, name="python", used_bytes=2 * GIB)
    monkeypatch.setattr(callback, "CudaMeter", lambda _foreign: object())
    monkeypatch.setattr(callback, "uuid_of", lambda device: f"GPU-{device.index}")
    for seen, expected in (((mine, other), 2 * GIB), ((mine,), 0), ((other,), None), (None, None)):
        monkeypatch.setattr(callback, "processes", lambda _card, seen=seen: seen)
        assert CudaCard(torch.device("cuda", 0)).foreign_bytes == expected


@pytest.mark.parametrize("slices_are_known", [True, False])
def test_on_a_slice_of_a_card_its_neighbours_are_nobody_and_its_size_is_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slices_are_known: bool
) -> None:
    """By the whole card's name the driver tells of all slices; nvidia-smi may not know a slice by its own at all."""
    from calibration import callback

    uuid, process = "a65afc88-50b5-5ccf-b0a8-f93b3247ae9e", f"{os.getpid()}, 300, python"
    slice_ = SimpleNamespace(
        name="NVIDIA A100-SXM4-40GB MIG 3g.20gb", uuid=uuid, major=8, minor=0, multi_processor_count=42, total_memory=20 * GIB
    )
    own = f'echo "{process}"' if slices_are_known else "exit 6"
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *--id=MIG-{uuid}*compute-apps*) {own};;\n'
        f'*compute-apps*) echo "{process}"; echo "77, 9000, neighbour";;\n'
        "*--id=MIG*) echo No devices were found; exit 6;; *driver_version*) echo 580.95.05; echo 580.95.05;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: slice_)
    monkeypatch.setattr(callback, "CudaMeter", lambda _foreign: Counters())
    card = CudaCard(torch.device("cuda", 0))
    assert (card.others, card.foreign_bytes) == (((), 0) if slices_are_known else (None, None))
    here = card.environment()
    assert (here.gpu, here.num_multiprocessors, here.total_bytes, here.driver) == (slice_.name, 42, 20 * GIB, "580.95.05")
    assert _Run(None, None, card, ask, print)._hardware()["hardware"] == {"capacity_gib": 20.0}
    slice_.name = "NVIDIA A100-SXM4-40GB"
    assert uuid_of(torch.device("cuda", 0)) == f"GPU-{uuid}"


@pytest.mark.slow
def test_trls_trainer_is_watched_too(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from calibration.worker.training import _tokenizer

    card, lines = Counters(), list[str]()
    one = case(peft=None, quantization=None, trainer="trl")
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "max_steps": 2}
    SFTTrainer(
        model=build(one, torch.device("cpu")),
        args=SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, max_length=16, dataloader_pin_memory=False, **options),
        train_dataset=Dataset.from_list([{"input_ids": list(range(16))}] * 4),
        processing_class=_tokenizer(),
        callbacks=[MemoryCallback(card=card, ask=ask, write=lines.append)],
    ).train()
    assert [told for told in card.told if told != "loaded"][:5] == ["step", "forward", "loss", "backward_head", "backward_layers"]
    assert "2 × 16 tokens" in lines[0]
