"""What the planner recommends under a cap, tried on the simulated allocator; and the command."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app import calibrate as cli
from app import caps, traced_case
from calibration.case import Case
from calibration.models import config_of
from calibration.record import Outcome, Record, RecordFile, environment_here
from calibration.runner import Device, NoDeviceError, Runner
from estimator.errors import RequestError
from estimator.gpus import find_gpu
from estimator.planner import Policy
from tests.benchmarks import tightness
from tests.calibration.test_record import record

A100 = find_gpu("a100-80")
REQUEST: dict[str, Any] = {
    "model": "EleutherAI/pythia-14m",
    "dtype": "bfloat16",
    "peft": {"r": 4, "target_modules": "all-linear"},
    "training": {"bf16": True, "per_device_train_batch_size": 1, "max_length": 512, "gradient_checkpointing": True},
}
CAMPAIGN = """
name: tiny
about: one case
budget_minutes: 5
cards: [rtx3070, h100-sxm, rtx3080-10]
grids: [{name: lora, request: {model: EleutherAI/pythia-14m, dtype: bfloat16, peft: {r: 4, target_modules: all-linear},
         training: {bf16: true, per_device_train_batch_size: 1, max_length: 512, gradient_checkpointing: true}}}]
"""


def pythia() -> Case:
    return Case.from_request(REQUEST, config_of(REQUEST))


def test_what_is_recommended_for_a_smaller_card_runs_under_its_cap_and_twice_as_much_does_not() -> None:
    cap = find_gpu("rtx3070").capacity_bytes
    kept, given_back, without_headroom = caps.recommendations(pythia(), A100, cap).values()
    assert 1 < kept <= min(given_back, without_headroom)
    under = pythia().at(cap_bytes=cap)
    reports = [traced_case.run(under.at(batch_size=size)) for size in (kept, given_back, 2 * given_back)]
    assert [report.outcome for report in reports] == ["ok", "ok", "oom"]
    assert reports[0].figures is not None
    assert reports[0].figures.num_allocation_retries == 0
    assert traced_case.run(pythia().at(batch_size=2 * given_back)).outcome == "ok"


def test_a_larger_cap_is_recommended_no_smaller_batch() -> None:
    sizes = [caps.recommended(pythia(), A100, find_gpu(name).capacity_bytes) for name in ("rtx3070", "rtx3080-10", "rtx4090", "a100-40")]
    assert sizes == sorted(sizes)
    assert caps.recommended(pythia(), A100, 2**29) == 0


def test_only_cards_smaller_than_the_one_at_hand_are_imitated() -> None:
    found = caps.smaller_cards(["rtx4090", "t4", "h200-sxm"], A100)
    assert [gpu.id for gpu in found] == ["t4", "rtx4090"]
    with pytest.raises(RequestError, match="less memory"):
        caps.smaller_cards(["h200-sxm"], A100)


def test_without_a_card_there_is_nothing_to_cap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoDeviceError, match="NVIDIA"):
        caps.card_at_hand(Runner(device=Device.CUDA))
    assert caps.card_at_hand(Runner(device=Device.TRACE)).id == "a100-80"


def test_the_command_proves_every_recommendation_and_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card on which 20 sequences of the smaller cap run, and 30 of the larger one."""
    small = find_gpu("rtx3070").capacity_bytes
    runs: list[tuple[int | None, int]] = []

    def run(runner: Runner, one: Case) -> Record:
        runs.append((one.cap_bytes, one.batch_size))
        fits = one.batch_size <= (20 if one.cap_bytes == small else 30)
        return record(one, kind=runner.kind, outcome=Outcome.OK if fits else Outcome.OOM, environment=environment_here())

    monkeypatch.setattr(Runner, "run", run)
    monkeypatch.setattr(caps, "recommendations", lambda _case, _gpu, cap: {"cache_kept": 20 if cap == small else 28})
    campaign, out = tmp_path / "tiny.yaml", tmp_path / "records.jsonl"
    campaign.write_text(CAMPAIGN)
    arguments = ["caps", "--campaign", str(campaign), "--out", str(out), "--device", "trace", "--cards", "rtx3080-10,rtx3070"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert [size for cap, size in runs if cap == small] == [20, 21]
    assert "2 recommendations on 2 card sizes, 0 ran out" in " ".join(done.stdout.split())
    assert {one.provenance.cap_card for one in RecordFile(out)} == {"rtx3070", "rtx3080-10"}
    told, before = done.stdout.splitlines()[-1], len(runs)
    again = CliRunner().invoke(cli.app, arguments)
    assert len(runs) == before
    assert again.stdout.splitlines()[-1] == told


def test_a_budget_counts_runs_and_not_planning_and_ends_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans take 100 s each here and runs 40 s: a budget of 60 s is two runs, and the third trial is not planned."""
    now = [0.0]
    planned: list[int] = []

    def recommend(_case: Case, _gpu: object, cap: int) -> dict[str, int]:
        now[0] += 100
        planned.append(cap)
        return {"cache_kept": 1}

    def run(runner: Runner, one: Case) -> Record:
        now[0] += 40
        return record(one, kind=runner.kind, outcome=Outcome.OK if one.batch_size < 3 else Outcome.OOM, environment=environment_here())

    monkeypatch.setattr(Runner, "run", run)
    monkeypatch.setattr(caps, "recommendations", recommend)
    cards = caps.smaller_cards(["rtx3070", "rtx3080-10", "t4"], A100)
    found = caps.trials([pythia()], cards, A100)
    steps = list(caps.run(found, Runner(device=Device.TRACE), RecordFile(tmp_path / "r"), budget_seconds=60, clock=lambda: now[0]))
    assert [step.record.case.batch_size for step in steps] == [1, 2]
    assert planned == [cards[0].capacity_bytes]


def test_the_table_of_tightness_shows_a_gap_where_nothing_was_planned(capsys: pytest.CaptureFixture[str]) -> None:
    tightness.main([])
    _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(tightness.GLOBAL_BATCHES) * len(Policy)
    assert all(row.split()[-4:] == ["0", "0", "–", "–"] for row in rows)


def test_a_case_is_tried_on_every_card_before_the_next_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caps, "recommendations", lambda *_: {})
    cards = caps.smaller_cards(["rtx3070", "t4"], A100)
    longer = pythia().at(sequence_length=1024)
    found = [(trial.case.sequence_length, trial.card) for trial in caps.trials([pythia(), longer], cards, A100)]
    assert found == [(512, "rtx3070"), (512, "t4"), (1024, "rtx3070"), (1024, "t4")]
