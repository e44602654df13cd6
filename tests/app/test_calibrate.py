import shlex
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from app import calibrate as cli
from calibration.record import Kind, Outcome, Record, RecordFile
from calibration.runner import NoDeviceError, Runner
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


def test_a_share_of_a_single_case_is_refused(request_file: Path) -> None:
    result = invoke("--request", request_file, "--out", request_file.with_name("records.jsonl"), "--shard", "1/2")
    assert result.exit_code == 1
    assert "campaigns" in result.stderr


def test_every_command_of_the_guide_exists_with_its_options() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text()
    lines = [shlex.split(line, comments=True)[2:] for line in guide.splitlines() if line.startswith("vramplan calibrate ")]
    commands: Any = get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {line[0] for line in lines} == {"run", "caps", "compare", "report", "fit", "submit", "merge"}
    for name, *arguments in lines:
        options = {spelling for parameter in commands[name].params for spelling in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("--")} <= options, name
