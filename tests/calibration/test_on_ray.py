"""A campaign on a Ray cluster of this machine, with workers that answer without a GPU."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from app import calibrate as cli
from calibration import on_ray, schedule
from calibration.case import Case
from calibration.record import Kind, Outcome, Record, RecordFile
from calibration.runner import Device, Runner
from estimator.errors import RequestError
from tests.calibration.test_schedule import CASES, HERE, WORKER, content, cost

# Ray 2.60 leaves sockets and files of its subprocesses to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

RUNNER = Runner(device=Device.TRACE, timeout_seconds=60, worker=(sys.executable, "-S", "-c", WORKER))


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"vramplan\[cluster\]"):
        next(campaign(RecordFile(tmp_path / "records.jsonl")))


def campaign(records: RecordFile, measure: Any = RUNNER.run, lost: list[str] | None = None, **options: Any) -> Iterator[schedule.Progress]:
    waiting = schedule.pending(CASES, schedule.answered(records, Kind.TRACED, None), cost)
    told = lost if lost is not None else []
    given = {"budget_seconds": 600, "num_gpus": 1, **options}
    return on_ray.run(waiting, measure=measure, records=records, cost=cost, lost=lambda _, reason: told.append(reason), **given)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two cards by declaration only: Ray hands them out, nobody looks at them."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    broken = tmp_path_factory.mktemp("broken")
    for size in (1, 2, 3, 4):
        (broken / str(size)).touch()
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "VRAMPLAN_TEST_BROKEN": str(broken), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield broken
    ray.shutdown()
    os.environ.clear()
    os.environ |= before


@pytest.mark.usefixtures("cluster")
def test_a_cluster_answers_what_one_machine_does(tmp_path: Path) -> None:
    records, alone = RecordFile(tmp_path / "records.jsonl"), RecordFile(tmp_path / "alone.jsonl")
    steps = list(campaign(records))
    assert sorted(step.num_done for step in steps) == [1, 2, 3, 4]
    waiting = schedule.pending(CASES, frozenset(), cost)
    list(schedule.run(waiting, measure=RUNNER.run, records=alone, cost=cost, budget_seconds=600))
    assert content(records) == content(alone)
    assert list(campaign(records)) == []


def seen_by_a_task(one: Case) -> Record:
    """A record that tells its process and its card instead of an error."""
    record = Runner(device=Device.CPU, worker=RUNNER.worker).run(one)
    return record.model_copy(update={"kind": Kind.TRACED, "error": f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}"})


@pytest.mark.usefixtures("cluster")
def test_every_case_has_a_process_and_a_card_of_its_own(tmp_path: Path) -> None:
    seen = [(step.record.error or "").split() for step in campaign(RecordFile(tmp_path / "records.jsonl"), seen_by_a_task)]
    assert len({process for process, _ in seen}) == 4
    assert {card for _, card in seen} <= {"0", "1"}


def dies(one: Case) -> Record:
    if one.batch_size == 2:
        os._exit(9)
    return RUNNER.run(one)


@pytest.mark.usefixtures("cluster")
def test_a_task_that_dies_costs_its_case_only_and_the_next_call_runs_it(tmp_path: Path) -> None:
    records, lost = RecordFile(tmp_path / "records.jsonl"), list[str]()
    assert sorted(step.record.case.batch_size for step in campaign(records, dies, lost)) == [1, 3, 4]
    assert len(lost) == 1
    assert [step.record.case.batch_size for step in campaign(records)] == [2]
    assert all(one.outcome is Outcome.OK for one in records)
    assert all(one.environment == HERE for one in records)


@pytest.mark.usefixtures("cluster")
def test_a_case_that_no_node_has_a_card_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="2 GPUs, and a case takes 3"):
        next(campaign(RecordFile(tmp_path / "records.jsonl"), num_gpus=3))


@pytest.mark.usefixtures("cluster")
def test_no_case_is_begun_after_the_budget(tmp_path: Path) -> None:
    clock = iter([0.0, 1.0, 2.0, *[99.0] * 100])
    steps = list(campaign(RecordFile(tmp_path / "records.jsonl"), budget_seconds=10, clock=lambda: next(clock)))
    assert len(steps) == 2


@pytest.mark.usefixtures("cluster")
def test_the_dry_run_worker_goes_over_a_cluster_from_the_command_line(tmp_path: Path) -> None:
    grid = {
        "name": "lora",
        "layers": [2],
        "request": {
            "model": "EleutherAI/pythia-14m",
            "dtype": "bfloat16",
            "training": {"bf16": True, "per_device_train_batch_size": 1},
        },
        "vary": {"training.max_length": [32, 64]},
    }
    file, out = tmp_path / "tiny.yaml", tmp_path / "records.jsonl"
    file.write_text(yaml.safe_dump({"name": "tiny", "about": "-", "budget_minutes": 5, "grids": [grid]}))
    done = CliRunner().invoke(cli.app, ["run", "--campaign", str(file), "--out", str(out), "--device", "trace", "--ray", "local"])
    assert done.exit_code == 0, done.output
    assert [(one.kind, one.outcome) for one in RecordFile(out)] == [(Kind.TRACED, Outcome.OK)] * 2
