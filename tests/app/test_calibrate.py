import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from app import calibrate as cli
from app import caps as capped
from calibration import campaign as campaigns
from calibration import schedule
from calibration.case import Case
from calibration.record import Kind, Outcome, Record, RecordFile, environment_here
from calibration.runner import NoDeviceError, Runner
from estimator.errors import RequestError
from tests.calibration.cases import LLAMA, QLORA, case
from tests.calibration.test_record import record

REQUEST = {"model": {"config": LLAMA}, **QLORA}


@pytest.fixture
def request_file(tmp_path: Path) -> Path:
    path = tmp_path / "request.json"
    path.write_bytes(orjson.dumps(REQUEST))
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["run", *map(str, arguments)])


def test_without_cuda_it_says_what_is_missing_and_leaves_no_record(request_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_runner: Runner, _case: object) -> Record:
        raise NoDeviceError("measuring needs a CUDA build of torch")

    monkeypatch.setattr(Runner, "run", refuse)
    out = request_file.with_name("records.jsonl")
    result = invoke("--request", request_file, "--out", out)
    assert result.exit_code == 1
    assert "measuring needs a CUDA build of torch" in result.stderr
    assert not out.exists()


def test_this_machine_refuses_or_has_a_card(request_file: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    result = invoke("--request", request_file, "--out", request_file.with_name("records.jsonl"))
    assert result.exit_code == 1
    assert "CUDA" in result.stderr


def test_a_case_that_has_an_answer_is_not_run_again(request_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def run(runner: Runner, one: Any) -> Record:
        runs.append(one.hash)
        return record(one, kind=runner.kind, figures=None)

    monkeypatch.setattr(Runner, "run", run)
    out = request_file.with_name("records.jsonl")
    arguments = ("--request", request_file, "--out", out, "--device", "cpu")
    assert [invoke(*arguments).exit_code for _ in range(2)] == [0, 0]
    assert runs == [case().hash]
    assert invoke(*arguments, "--again").exit_code == 0
    assert invoke(*arguments, "--max-length", 32).exit_code == 0
    assert runs[2] == case().at(sequence_length=32).hash
    assert [each.kind for each in RecordFile(out)] == [Kind.DRY_RUN] * 3


def test_a_failed_case_is_recorded_and_exits_with_1(request_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "run", lambda _, one: record(one, outcome=Outcome.FAILED, figures=None, error="[no] such layer"))
    out = request_file.with_name("records.jsonl")
    result = invoke("--request", request_file, "--out", out)
    assert result.exit_code == 1
    assert "[no] such layer" in result.stderr
    assert [each.outcome for each in RecordFile(out)] == [Outcome.FAILED]


def test_a_good_run_whose_history_could_not_be_kept_says_so(request_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "run", lambda _, one: record(one, error="the allocator's history could not be written: [disk] full"))
    result = invoke("--request", request_file, "--out", request_file.with_name("records.jsonl"))
    assert result.exit_code == 0
    assert "could not be written: [disk] full" in " ".join(result.stdout.split())


@pytest.mark.parametrize("content", ["[1]", "{", '{"training": {}}', "model: {config: 3}"])
def test_a_file_that_is_no_request_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / ("request.yaml" if content.startswith("model") else "request.json")
    path.write_text(content)
    result = invoke("--request", path, "--out", tmp_path / "records.jsonl", "--device", "cpu")
    assert result.exit_code == 1
    assert result.stderr.startswith("error:")


def test_records_of_several_machines_are_put_together_once(tmp_path: Path) -> None:
    first, second, out = (RecordFile(tmp_path / name) for name in ("1.jsonl", "2.jsonl", "all.jsonl"))
    for size in (1, 2):
        first.append(record(case().at(batch_size=size)))
    second.append(record(case().at(batch_size=2)))
    second.append(record(case().at(batch_size=3)))
    for new, told in (([first], "2 records, 2 of them new"), ([first, second], "3 records, 1 of them new"), ([second], "3 records, 0")):
        done = CliRunner().invoke(cli.app, ["merge", *(str(one.path) for one in new), "--out", str(out.path)])
        assert done.exit_code == 0, done.output
        assert told in " ".join(done.stdout.split())
    assert sorted(one.case.batch_size for one in out) == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--campaign", "smoke", "--snapshot", "s.pickle"), "are for a --request"),
        (("--campaign", "smoke", "--weights", "hub"), "are for a --request"),
        (("--request", "REQUEST", "--snapshot", "s.pickle", "--device", "trace"), "--snapshot needs --device cuda"),
        (("--request", "REQUEST", "--weights", "hub", "--device", "trace"), "--weights hub needs --device cuda or cpu"),
        (("--request", "REQUEST", "--weights", "hub", "--device", "cpu"), "need the model's id"),
    ],
)
def test_what_a_run_has_no_use_for_is_refused(arguments: tuple[str, ...], told: str, request_file: Path) -> None:
    given = [str(request_file) if one == "REQUEST" else one for one in arguments]
    result = invoke(*given, "--out", request_file.with_name("records.jsonl"))
    assert result.exit_code == 1
    assert told in " ".join(result.stderr.split())


def test_a_shared_card_is_told_of_before_time_is_spent(request_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in *memory.used*) echo 900;; *compute-apps*) echo "7, 880, python train.py";; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(Runner, "run", lambda _, one: record(one, figures=None))
    told = " ".join(invoke("--request", request_file, "--out", tmp_path / "records.jsonl").stdout.split())
    assert told.startswith("0.88 GiB of the card are in use by others: python train.py (pid 7).")
    assert "in use" not in invoke("--request", request_file, "--out", tmp_path / "dry.jsonl", "--device", "cpu").stdout


def test_cases_that_cannot_be_predicted_come_last_and_stay_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(one: Case, _environment: None) -> Any:
        if one.batch_size == 1:
            raise RequestError("no such family")
        return SimpleNamespace(estimate=SimpleNamespace(peak=SimpleNamespace(allocated_bytes=100 * one.batch_size)))

    monkeypatch.setattr(cli, "predict", predict)
    cases = [case().at(batch_size=size) for size in (1, 2, 3)]
    assert [cli._costs(cases)[one.hash] for one in cases] == [301, 200, 300]
    assert cli._costs(cases[:1]) == {cases[0].hash: 1}


def everything(folder: Path, *arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["all", "--folder", str(folder), *arguments])


def test_one_command_runs_all_campaigns_caps_fit_and_report_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each campaign is one case here, of a length of its own; the dry run has nothing to fit, and says so."""
    begun: list[str] = []
    allowed: set[float] = set()

    def run(runner: Runner, one: Case) -> Record:
        begun.append(one.hash)
        allowed.add(runner.timeout_seconds)
        return record(one, kind=runner.kind, environment=environment_here())

    smoke = campaigns.read("smoke")

    def read(name: str) -> campaigns.Campaign:
        grid = smoke.grids[-1].model_copy(update={"vary": {"training.max_length": [64 * (1 + campaigns.shipped().index(name))]}})
        return smoke.model_copy(update={"name": name, "grids": [grid], "cards": ["rtx3070"]})

    monkeypatch.setattr(campaigns, "read", read)
    monkeypatch.setattr(cli, "compare_all", lambda: ((), ()))
    monkeypatch.setattr(Runner, "run", run)
    monkeypatch.setattr(capped, "recommendations", lambda *_: {"cache_kept": 1})
    done = everything(tmp_path / "all", "--device", "trace", "--minutes", "0.05")
    told = " ".join(done.stdout.split())
    assert done.exit_code == 0, done.output
    for name in ("smoke: ", "terms: ", "models: ", "generate is left out", "nothing can be fitted", "on 1 card sizes", "written: "):
        assert name in told, told
    assert "No measurement of our own" in (tmp_path / "all" / "report.html").read_text()
    assert (tmp_path / "all" / "pictures").is_dir()
    assert allowed == {120}  # under caps too: a case that hangs costs no more than the budget, or what libraries take to load
    before = len(begun)
    assert everything(tmp_path / "all", "--device", "trace", "--minutes", "0.05").exit_code == 0
    assert not set(begun[:before]) & set(begun[before:])


@pytest.mark.parametrize(("arguments", "seconds"), [((), 180), (("--minutes", "0.5"), 120), (("--timeout", "30"), 30)])
def test_a_case_that_hangs_costs_no_more_than_its_campaign_may_take(
    arguments: tuple[str, ...], seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: set[float] = set()

    def run(runner: Runner, one: Case) -> Record:
        allowed.add(runner.timeout_seconds)
        return record(one, kind=runner.kind, environment=environment_here())

    monkeypatch.setattr(Runner, "run", run)
    done = invoke("--campaign", "smoke", "--out", tmp_path / "records.jsonl", "--device", "trace", *arguments)
    assert done.exit_code == 0, done.output
    assert allowed == {seconds}


def test_one_command_stops_where_nothing_works_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def run(runner: Runner, one: Case) -> Record:
        begun.append(one.hash)
        return record(one, kind=runner.kind, outcome=Outcome.FAILED, figures=None, error="no kernel image is available")

    monkeypatch.setattr(Runner, "run", run)
    done = everything(tmp_path / "all", "--device", "trace")
    assert done.exit_code == 1
    assert "no kernel image is available" in done.stderr
    assert len(begun) == len(campaigns.read("smoke").cases())


def of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`all` goes through its parts and finds nothing to run in them but `smoke`, nothing to fit, and writes no page."""
    smoke = campaigns.read("smoke")
    monkeypatch.setattr(cli, "_BEFORE_CAPS", ("smoke",))
    monkeypatch.setattr(campaigns, "read", lambda _: smoke)
    monkeypatch.setattr(cli, "_run_caps", lambda *_, **__: None)
    monkeypatch.setattr(cli, "_report", lambda *_, **__: None)


@pytest.mark.parametrize(("before", "kind", "code"), [("another", Kind.TRACED, 1), ("this", Kind.MEASURED, 1), ("this", Kind.TRACED, 0)])
def test_what_worked_elsewhere_does_not_say_that_this_machine_works(
    before: str, kind: Kind, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_nothing(monkeypatch)
    here = environment_here(gpu=None if before == "this" else "Tesla T4")
    folder = tmp_path / "all"
    RecordFile(folder / "records.jsonl").append(record(campaigns.read("smoke").cases()[0], kind=kind, environment=here))
    monkeypatch.setattr(Runner, "run", lambda runner, one: record(one, kind=runner.kind, outcome=Outcome.FAILED, figures=None, error="no"))
    assert everything(folder, "--device", "trace").exit_code == code


def test_one_command_tells_once_of_others_on_the_card_and_fails_where_nothing_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in *memory.used*) echo 900;; *compute-apps*) echo "7, 880, python train.py";; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    of_nothing(monkeypatch)
    monkeypatch.setattr(cli, "_BEFORE_CAPS", ("smoke", "smoke"))
    monkeypatch.setattr(Runner, "run", lambda runner, one: record(one, kind=runner.kind, figures=None, environment=environment_here()))
    done = everything(tmp_path / "all")
    assert done.exit_code == 1
    assert " ".join(done.stdout.split()).count("in use by others") == 1
    assert "no corrections were written: nothing can be fitted: none of" in " ".join(done.stderr.split())
    assert everything(tmp_path / "dry", "--device", "trace").exit_code == 0  # a dry run never fits


def test_what_smoke_had_no_time_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_nothing(monkeypatch)
    monkeypatch.setattr(Runner, "run", lambda runner, one: record(one, kind=runner.kind, environment=environment_here()))
    cases = campaigns.read("smoke").cases()
    monkeypatch.setattr(cli, "_costs", lambda whole: {one.hash: float(number) for number, one in enumerate(whole)})
    monkeypatch.setattr(schedule.Pace, "seconds", lambda pace, _costs: 60.0 * len(pace._seen))
    told = " ".join(everything(tmp_path / "all", "--device", "trace").stdout.split())
    assert f"{len(cases) - 3} cases are left" in told  # three minutes at a minute more for each
    named = told.partition("budget was over before it tried: ")[2]
    assert named.startswith("4 bit, transformers; 8 bit, transformers, gradient checkpointing; 8 bit, transformers"), told


def test_a_share_of_a_single_case_is_refused(request_file: Path) -> None:
    result = invoke("--request", request_file, "--out", request_file.with_name("records.jsonl"), "--shard", "1/2")
    assert result.exit_code == 1
    assert "campaigns" in result.stderr


def test_every_command_of_the_guide_exists_with_its_options() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text()
    lines = [shlex.split(line, comments=True)[2:] for line in guide.splitlines() if line.startswith("vramplan calibrate ")]
    commands: Any = get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {line[0] for line in lines} == {"all", "run", "caps", "compare", "report", "fit", "submit", "merge"}
    for name, *arguments in lines:
        options = {spelling for parameter in commands[name].params for spelling in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("--")} <= options, name
