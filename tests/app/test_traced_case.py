"""The dry-run worker in a campaign: its own processes, a budget that ends it, and a second run that goes on."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app import calibrate as cli
from app.prediction import predict
from calibration.record import Kind, Outcome, RecordFile
from estimator.allocator import UNSPLIT_REMAINDER_BYTES
from estimator.phases import Phase

CAMPAIGN = """
name: tiny
about: two cases of two layers
budget_minutes: 5
grids:
  - name: lora
    layers: [2]
    request:
      model: EleutherAI/pythia-14m
      dtype: bfloat16
      peft: {r: 4, target_modules: all-linear}
      training: {bf16: true, per_device_train_batch_size: 1, gradient_checkpointing: true}
    vary:
      training.max_length: [32, 64]
"""


def invoke(*arguments: object) -> Any:
    found = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], list[list[int]]]:
    """The records, what three runs printed, and the lengths on file after each; the first has time for one case only."""
    folder = tmp_path_factory.mktemp("campaign")
    file, records = folder / "tiny.yaml", RecordFile(folder / "records.jsonl")
    file.write_text(CAMPAIGN)
    printed, lengths = [], []
    for budget in (("--minutes", 0.01), (), ()):
        printed.append(invoke("run", "--campaign", file, "--out", records.path, "--device", "trace", *budget))
        lengths.append([one.case.sequence_length for one in records])
    return records.path, printed, lengths


def test_a_campaign_goes_on_where_its_budget_ended_it(runs: tuple[Path, list[Any], list[list[int]]]) -> None:
    _, printed, lengths = runs
    assert lengths == [[32], [32, 64], [32, 64]]
    assert [one.exit_code for one in printed] == [0, 0, 0]
    assert "1 cases are left" in printed[0].stdout
    assert "2 of 2 cases are answered" in printed[2].stdout


def test_traced_records_say_so_and_no_fit_takes_them(runs: tuple[Path, list[Any], list[list[int]]]) -> None:
    path, *_ = runs
    found = list(RecordFile(path))
    assert [(one.kind, one.outcome, one.is_measurement) for one in found] == [(Kind.TRACED, Outcome.OK, False)] * 2
    refused = invoke("fit", path)
    assert refused.exit_code == 1
    assert "none of 2 records is a measurement" in refused.stderr


def test_a_traced_record_shows_what_the_closed_forms_say(runs: tuple[Path, list[Any], list[list[int]]]) -> None:
    """Two ways to one figure. Of a large block the allocator may leave up to 1 MiB unsplit, which the sum over tensors does not count."""
    path, *_ = runs
    for one in RecordFile(path):
        predicted = predict(one.case, None, engine="analytic")
        figures = one.figures
        assert figures is not None
        assert figures.loaded_bytes == predicted.loaded_bytes
        assert figures.peak_reserved_bytes == predicted.estimate.reserved_bytes
        assert figures.device_bytes == predicted.estimate.device_bytes
        for phase in (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, Phase.OPTIMIZER_STEP):
            expected = predicted.phase(phase)
            assert expected is not None
            assert 0 <= figures.phases[phase].allocated_bytes - expected.allocated_bytes < UNSPLIT_REMAINDER_BYTES, phase
