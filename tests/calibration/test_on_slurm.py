"""Jobs of a Slurm cluster: what each runs, and the task file for rented machines."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from app.calibrate import app
from calibration import on_slurm
from calibration.record import Kind, Outcome, RecordFile
from calibration.schedule import merged
from calibration.shards import Shard
from estimator.errors import RequestError

SKY = Path(__file__).parents[2] / "docs" / "calibrate.sky.yaml"


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The options as `vramplan calibrate run` understands them."""
    run: Any = get_command(app).commands["run"]  # type: ignore[attr-defined]
    with run.make_context("run", list(arguments)) as context:
        return dict(context.params)


def test_a_job_runs_its_share_into_a_file_of_its_own() -> None:
    shard = Shard(number=2, of=3)
    command = on_slurm.command("terms", on_slurm.records_of(Path("/shared"), shard), shard, ["--minutes", "5", "--device", "trace"])
    assert command[:5] == [sys.executable, "-m", "app", "calibrate", "run"]
    found = parsed(command[5:])
    assert (found["campaign"], found["shard"], found["minutes"], found["device"]) == ("terms", "2/3", 5.0, "trace")
    assert found["out"] == Path("/shared/records-2-of-3.jsonl")


def test_without_submitit_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(RequestError, match=r"vramplan\[cluster\]"):
        on_slurm.submit("smoke", tmp_path, num_jobs=1, minutes=1)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_jobs_answer_a_campaign_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    grid = {
        "name": "lora",
        "layers": [2],
        "request": {"model": "EleutherAI/pythia-14m", "dtype": "bfloat16", "training": {"bf16": True, "per_device_train_batch_size": 1}},
        "vary": {"training.max_length": [32, 64]},
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({"name": "tiny", "about": "-", "budget_minutes": 5, "grids": [grid]}))
    jobs = on_slurm.submit(str(file), tmp_path / "shared", num_jobs=2, minutes=3, arguments=["--device", "trace"], cluster="local", gpus=0)
    assert [job.result() for job in jobs] == [0, 0]
    files = [RecordFile(path) for path in sorted((tmp_path / "shared").glob("records-*.jsonl"))]
    assert [len(list(one)) for one in files] == [1, 1]
    together = merged(files)
    assert [(one.kind, one.outcome) for one in together] == [(Kind.TRACED, Outcome.OK)] * 2


def test_the_task_file_for_rented_machines_runs_a_command_that_there_is() -> None:
    task = yaml.safe_load(SKY.read_text())
    lines = task["run"].replace("\\\n", " ").splitlines()
    (line,) = (line for line in lines if line.startswith("vramplan calibrate run"))
    filled = line.replace("$((SKYPILOT_NODE_RANK + 1))/$SKYPILOT_NUM_NODES", "2/4")
    for name, value in task["envs"].items():
        filled = filled.replace(f"${name}", str(value))
    found = parsed(shlex.split(filled)[3:])
    assert (found["campaign"], found["shard"], found["minutes"]) == ("terms", "2/4", 60.0)
    assert set(task) == {"name", "resources", "num_nodes", "envs", "file_mounts", "workdir", "setup", "run"}
