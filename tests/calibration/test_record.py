from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from calibration.case import Case
from calibration.record import Figures, Kind, Outcome, Provenance, Record, RecordFile
from tests.calibration.cases import case


def record(of: Case | None = None, **changes: Any) -> Record:
    of = of or case()
    provenance = Provenance(vramplan="0", started_at="2026-01-01T00:00:00+00:00", duration_seconds=1.0)
    fields: dict[str, Any] = {"kind": Kind.MEASURED, "outcome": Outcome.OK, "provenance": provenance, "figures": Figures()}
    return Record(case_hash=of.hash, case=of, **{**fields, **changes})


def test_records_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "sub" / "records.jsonl")
    written = [record(), record(figures=Figures(context_bytes=1, peak_allocated_bytes=2))]
    for each in written:
        file.append(each)
    assert list(file) == written


def test_a_torn_last_line_is_skipped_when_reading_and_cut_off_when_writing(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.append(record())
    with file.path.open("ab") as torn:
        torn.write(b'{"schema_version":1,"case_ha' + b"x" * 100_000)
    assert list(file) == [record()]
    file.append(record())
    assert list(file) == [record(), record()]


def test_a_file_of_nothing_but_a_torn_line_starts_over(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.path.write_bytes(b'{"schema')
    file.append(record())
    assert list(file) == [record()]


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    cases = [case().at(batch_size=size) for size in range(1, 41)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: file.append(record(one)), cases))
    assert {each.case_hash for each in file} == {one.hash for one in cases}


def test_a_whole_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.append(record())
    with file.path.open("ab") as foreign:
        foreign.write(b'{"schema_version":2}\n')
    with pytest.raises(ValueError, match="line 2"):
        list(file)


def test_answered_cases_are_not_run_again_but_failed_ones_are(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    assert not file.has(case(), Kind.MEASURED)
    file.append(record(outcome=Outcome.FAILED))
    file.append(record(outcome=Outcome.TIMEOUT))
    assert not file.has(case(), Kind.MEASURED)
    file.append(record(outcome=Outcome.OOM))
    assert file.has(case(), Kind.MEASURED)
    assert not file.has(case().at(batch_size=7), Kind.MEASURED)


def test_a_dry_run_answers_no_measurement(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.append(record(kind=Kind.DRY_RUN, figures=None))
    assert file.has(case(), Kind.DRY_RUN)
    assert not file.has(case(), Kind.MEASURED)


def test_a_dry_run_has_no_figures() -> None:
    with pytest.raises(ValidationError, match="dry run"):
        record(kind=Kind.DRY_RUN)


def test_a_record_whose_hash_is_not_its_case_is_refused() -> None:
    other = case().at(batch_size=9)
    with pytest.raises(ValidationError, match="case_hash"):
        Record(case_hash=other.hash, case=case(), kind=Kind.MEASURED, outcome=Outcome.OK, provenance=record().provenance)


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, True),
        ({"outcome": Outcome.OOM}, True),
        ({"outcome": Outcome.FAILED}, False),
        ({"kind": Kind.TRACED}, False),
        ({"kind": Kind.DRY_RUN, "figures": None}, False),
        ({"provenance": record().provenance.model_copy(update={"foreign_before_bytes": 16 * 2**20})}, True),
        ({"provenance": record().provenance.model_copy(update={"foreign_before_bytes": 16 * 2**20 + 1})}, False),
        ({"provenance": record().provenance.model_copy(update={"foreign_after_bytes": 2**30})}, False),
    ],
)
def test_only_what_was_seen_on_a_card_of_ones_own_counts_as_measured(changes: dict[str, Any], counts: bool) -> None:
    assert record(**changes).is_measurement is counts
