"""Order, budget and resumption of a campaign, with workers that break and parents that are killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from calibration import schedule
from calibration.case import Case
from calibration.record import Environment, Kind, Outcome, Record, RecordFile
from calibration.runner import Device, Runner
from tests.calibration.cases import case
from tests.calibration.test_record import record

CASES = tuple(case().at(batch_size=size) for size in (4, 1, 3, 2))
HERE = Environment(torch="2", transformers="5", python="3", system="here")
ELSEWHERE = Environment(gpu="NVIDIA L4", torch="2", transformers="5", python="3", system="there")


def cost(one: Case) -> float:
    return float(one.batch_size)


def run(records: RecordFile, cases: tuple[Case, ...] = CASES, *, seconds_each: float = 10, budget: float = 1e9) -> list[schedule.Progress]:
    """A campaign on a clock that only cases move."""
    now = [0.0]

    def measure(one: Case) -> Record:
        now[0] += seconds_each * cost(one)
        return record(one, environment=HERE)

    done = schedule.answered(records, Kind.MEASURED, HERE.key)
    waiting = schedule.pending(cases, done, cost)
    return list(schedule.run(waiting, measure=measure, records=records, cost=cost, budget_seconds=budget, clock=lambda: now[0]))


def test_cheap_cases_come_first(tmp_path: Path) -> None:
    records = RecordFile(tmp_path / "records.jsonl")
    run(records)
    assert [one.case.batch_size for one in records] == [1, 2, 3, 4]


def test_no_case_is_begun_that_would_end_beyond_the_budget(tmp_path: Path) -> None:
    records = RecordFile(tmp_path / "records.jsonl")
    run(records, budget=61)
    assert [one.case.batch_size for one in records] == [1, 2, 3]


def test_the_remaining_time_follows_the_cost_of_what_is_left(tmp_path: Path) -> None:
    """10 s a sequence: of one case alone nobody can tell what of its time the next one takes too."""
    steps = run(RecordFile(tmp_path / "records.jsonl"))
    assert [(step.num_done, step.remaining_seconds) for step in steps] == [(1, 30), (2, 70), (3, 40), (4, 0)]


def test_what_every_case_takes_is_told_from_what_grows_with_its_cost() -> None:
    """Start and import of 12 s and 2 s for each unit of cost: 100 units are 212 s, not a hundred times what one took."""
    pace = schedule.Pace()
    assert pace.seconds([1.0]) == 0
    for cost_, seconds in ((1.0, 14.0), (2.0, 16.0), (4.0, 20.0)):
        pace.note(cost_, seconds)
    assert pace.seconds([100.0]) == pytest.approx(212)
    assert pace.seconds([1.0, 10.0]) == pytest.approx(14 + 32)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [([(1.0, 60.0), (2.0, 12.0), (3.0, 12.0)], 28.0), ([(1.0, 1.0), (2.0, 20.0)], 70.0)],
    ids=["the first one is cold", "steeper than through nothing"],
)
def test_dearer_cases_are_never_expected_to_be_quicker_nor_any_to_take_less_than_nothing(
    seen: list[tuple[float, float]], expected: float
) -> None:
    pace = schedule.Pace()
    for cost_, seconds in seen:
        pace.note(cost_, seconds)
    assert pace.seconds([10.0]) == pytest.approx(expected)
    assert pace.seconds([0.0]) >= 0


def test_a_second_run_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    records = RecordFile(tmp_path / "records.jsonl")
    run(records, budget=31)
    assert [step.record.case.batch_size for step in run(records)] == [3, 4]
    assert run(records) == []


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.TIMEOUT])
def test_failures_are_tried_again(outcome: Outcome, tmp_path: Path) -> None:
    records = RecordFile(tmp_path / "records.jsonl")
    records.append(record(CASES[0], outcome=outcome, environment=HERE))
    assert len(run(records)) == 4


def test_an_answer_of_another_card_is_no_answer_here(tmp_path: Path) -> None:
    records = RecordFile(tmp_path / "records.jsonl")
    records.append(record(CASES[0], environment=ELSEWHERE))
    assert len(run(records)) == 4


def test_merging_twice_changes_nothing(tmp_path: Path) -> None:
    first, second = RecordFile(tmp_path / "1.jsonl"), RecordFile(tmp_path / "2.jsonl")
    for one in CASES:
        first.append(record(one))
    second.append(record(CASES[1]))
    second.append(record(CASES[1], environment=ELSEWHERE))
    once = schedule.merged([first, second])
    assert len(once) == 5
    assert schedule.merged([once, first, second, once]) == once


# -- faults -----------------------------------------------------------------------------------------------------------------------------

WORKER = """
import json, os, pathlib, signal, sys, time
case = json.loads(pathlib.Path(sys.argv[1]).read_text())
size = case["request"]["training"]["per_device_train_batch_size"]
broken = pathlib.Path(os.environ["VRAMPLAN_TEST_BROKEN"])
first = not (broken / str(size)).exists()
(broken / str(size)).touch()
if first and size == 1: raise ValueError("no such layer")
if first and size == 2: os.kill(os.getpid(), signal.SIGKILL)
if first and size == 3: time.sleep(600)
if first and size == 4: print("{" * 100000); sys.exit(0)
environment = {"torch": "2", "transformers": "5", "python": "3", "system": "here"}
figures = {"peak_allocated_bytes": 1000 * size}
pathlib.Path(sys.argv[2]).write_text(json.dumps({"outcome": "ok", "figures": figures, "environment": environment}))
"""


def campaign_of(runner: Runner, records: RecordFile) -> Iterator[schedule.Progress]:
    waiting = schedule.pending(CASES, schedule.answered(records, Kind.TRACED, HERE.key), cost)
    return schedule.run(waiting, measure=runner.run, records=records, cost=cost, budget_seconds=600)


def content(records: RecordFile) -> set[str]:
    """What was answered, whenever that was."""
    return {f"{one.case_hash} {one.figures}" for one in records if one.outcome is Outcome.OK}


def test_every_fault_costs_its_own_case_and_a_second_run_makes_up_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_TEST_BROKEN", str(tmp_path))
    runner = Runner(device=Device.TRACE, timeout_seconds=3, worker=(sys.executable, "-S", "-c", WORKER))
    records, undisturbed = RecordFile(tmp_path / "records.jsonl"), RecordFile(tmp_path / "undisturbed.jsonl")
    first = [step.record for step in campaign_of(runner, records)]
    assert [one.outcome for one in first] == [Outcome.FAILED, Outcome.FAILED, Outcome.TIMEOUT, Outcome.FAILED]
    assert all(told in (one.error or "") for told, one in zip(("no such layer", "SIGKILL", "3 s", "{{{"), first, strict=True))
    assert [step.record.outcome for step in campaign_of(runner, records)] == [Outcome.OK] * 4
    list(campaign_of(runner, undisturbed))
    assert content(records) == content(undisturbed)
    assert len(content(records)) == 4


PARENT = """
import sys
from pathlib import Path
from tests.calibration.test_schedule import WORKER, campaign_of
from calibration.record import RecordFile
from calibration.runner import Device, Runner
runner = Runner(device=Device.TRACE, timeout_seconds=60, worker=(sys.executable, "-S", "-c", WORKER))
for step in campaign_of(runner, RecordFile(Path(sys.argv[1]))):
    print(step.record.case_hash, flush=True)
"""


def test_a_parent_killed_at_any_stage_loses_nothing_that_it_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 2, 3, 4):  # nothing breaks but the parent
        (tmp_path / str(size)).touch()
    monkeypatch.setenv("VRAMPLAN_TEST_BROKEN", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    records, told = RecordFile(tmp_path / "records.jsonl"), set()
    command = [sys.executable, "-W", "ignore", "-c", PARENT, str(records.path)]
    kills = 0
    while len(content(records)) < len(CASES):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if line := process.stdout.readline():
            told.add(line.strip())
        time.sleep(0.02 * (kills % 5))  # while a worker starts, runs, or its record is written
        process.send_signal(signal.SIGKILL)
        told |= {line.strip() for line in process.stdout if line.endswith("\n")}
        process.stdout.close()
        process.wait()
        kills += 1
        assert kills < 20
        assert told <= {one.case_hash for one in records}
    list(campaign_of(Runner(device=Device.TRACE, worker=(sys.executable, "-S", "-c", WORKER)), undisturbed := RecordFile(tmp_path / "u")))
    assert content(records) == content(undisturbed)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tests.calibration.test_schedule import CASES, HERE, run
from calibration.record import RecordFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    run(RecordFile(Path(sys.argv[1])))
except OSError as error:
    sys.exit(7)
"""


def test_a_full_disk_ends_the_campaign_and_keeps_what_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    records = RecordFile(tmp_path / "records.jsonl")
    run(records, budget=11)
    limit = round(2.5 * records.path.stat().st_size)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FULL_DISK, str(records.path), str(limit)], check=False)
    assert done.returncode == 7
    assert [one.case.batch_size for one in records] == [1, 2]
    run(records)
    assert [one.case.batch_size for one in records] == [1, 2, 3, 4]
