"""The report: every figure under what it rests on, and no word that claims more than the records hold."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from app import calibrate as cli
from app.calibration_page import MEASURE_ALL, Report, report
from calibration.accuracy import compare_all
from calibration.comparison import compare
from calibration.evidence import Figure, Origin, coverage_of, points_of, points_of_published
from calibration.fit import Row
from calibration.published import rows as published_rows
from calibration.record import Kind, Outcome, RecordFile
from tests.calibration.test_caps import all_records
from tests.calibration.test_fit import MODELS, PLANTED, row
from tests.calibration.test_record import record


@cache
def measured() -> tuple[Row, ...]:
    """Simulated measurements: enough models and sizes for a fit."""
    return tuple(row(name, batch, length, PLANTED) for name in MODELS for batch in (1, 2) for length in (256, 512, 1024))


@cache
def published() -> Any:
    """A few of the published rows."""
    wanted = {f"fms-accel-{number}" for number in ("0001", "0003", "0009", "0125")}
    return compare_all([one for one in published_rows() if one.id in wanted])


def made(rows: Sequence[Row], *, with_published: bool = True, records: Sequence[Any] = ()) -> Report:
    others, left_out = published() if with_published else ((), ())
    return report(compare(rows, date="2026-01-01"), [*(one.record for one in rows), *records], others, left_out, date="2026-01-01")


def text_of(page: Report) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<(svg|style).*?</\1>", "", page.html, flags=re.DOTALL)).split())


def test_where_nothing_was_measured_the_page_says_so_first() -> None:
    told = text_of(made([]))
    assert "No measurement of our own" in told
    assert "4 rows published by others" in told
    assert "Terms by themselves: no record shows any" in told
    assert "no recommendation was run under a cap yet" in told


def test_where_nothing_was_measured_the_page_and_the_guide_say_how_all_of_it_is() -> None:
    guide = Path(__file__).parents[2] / "docs" / "calibration.md"
    assert MEASURE_ALL in guide.read_text(encoding="utf-8")
    assert f"<pre>{MEASURE_ALL}</pre>" in made([], with_published=False).html
    assert "<pre>" not in made(measured(), with_published=False).html


def test_dry_runs_are_never_called_measurements() -> None:
    traced = [row(one.model, 1, one.length, PLANTED, kind=Kind.TRACED) for one in measured()[:3]]
    page = made(traced, with_published=False)
    assert "No measurement of our own" in text_of(page)
    assert "3 dry runs, which measure nothing" in text_of(page)
    assert "<td>measured</td>" not in page.html
    assert not re.search("measured: ", page.pictures["scatter-allocated"])
    assert "What a fit makes" not in page.html


def test_own_measurements_are_counted_with_their_card() -> None:
    page = made(measured())
    assert "24 own measurements on NVIDIA A100-SXM4-80GB; 4 rows published by others." in text_of(page)
    assert "What a fit makes of the own measurements" in page.html
    assert set(page.pictures) == {"scatter-allocated", "scatter-device", "terms", "coverage"}


def test_what_others_on_the_card_spoiled_is_left_out_with_the_reason() -> None:
    spoiled = measured()[0].record.provenance.model_copy(update={"foreign_before_bytes": 2**30})
    told = text_of(made([row(MODELS[0], 1, 256, PLANTED, provenance=spoiled)], with_published=False))
    assert "No measurement of our own" in told
    assert "1 measured others used the card" in told


def test_the_page_needs_nothing_but_itself() -> None:
    html = made(measured()).html
    assert not re.search(r"(src|href)=|@import|url\(", html)
    assert "<script" not in html


def test_every_picture_is_a_document_of_its_own_and_names_each_point() -> None:
    page = made(measured())
    for name, svg in page.pictures.items():
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg", name
    titles = [
        one.text or "" for one in ElementTree.fromstring(page.pictures["scatter-allocated"]).iter("{http://www.w3.org/2000/svg}title")
    ]
    assert sum(title.startswith("measured: ") for title in titles) == 24
    assert sum(title.startswith("published: ") for title in titles) == 4


def test_what_records_say_is_escaped() -> None:
    evil = measured()[0]
    case = evil.record.case.model_copy(update={"model": "<script>alert(1)</script>"})
    page = made([Row(record=record(case, figures=evil.record.figures, environment=evil.record.environment), prediction=evil.prediction)])
    assert "<script" not in page.html
    assert "&lt;script&gt;" in page.html


def test_proofs_under_a_cap_stand_under_what_they_rest_on() -> None:
    page = made([], with_published=False, records=[*all_records(4, 5), *all_records(4, 2, kind=Kind.TRACED)])
    told = text_of(page)
    assert "measured: 1 recommendations on 1 card sizes, 0 ran out of memory" in told
    assert "simulated (traced, nothing was measured): 1 recommendations on 1 card sizes, 1 ran out of memory" in told


def test_bugs_and_contradictions_are_told() -> None:
    honest = measured()[0]
    figures = honest.record.figures
    assert figures is not None
    wrong = figures.model_copy(update={"loaded_bytes": 1})
    rows = [
        Row(record=record(honest.record.case, figures=wrong, environment=honest.record.environment), prediction=honest.prediction),
        row(MODELS[0], 2, 256, PLANTED, outcome=Outcome.OOM),
    ]
    told = text_of(made(rows, with_published=False))
    assert "loaded is exact, but 1 bytes were measured" in told
    assert "ran out of memory where the prediction fits" in told


def test_published_points_carry_their_citation() -> None:
    points = list(points_of_published(published()[0]))
    assert {point.figure for point in points} == set(Figure)
    assert all(point.origin is Origin.PUBLISHED and "fms-acceleration" in point.source for point in points)


def test_each_model_is_judged_by_intervals_that_others_make() -> None:
    points = list(points_of(measured()))
    levels = {level.nominal: level for level in coverage_of(points)}
    assert levels[0.9].judged == 24
    assert coverage_of([point for point in points if point.model == MODELS[0]]) == ()


def test_the_command_writes_page_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "compare_all", published)
    records = RecordFile(tmp_path / "records.jsonl")
    records.append(record(kind=Kind.DRY_RUN, figures=None))
    arguments = ["report", str(records.path), "--out", str(tmp_path / "report.html"), "--svg", str(tmp_path / "svg")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "dry_run has no figures" in (tmp_path / "report.html").read_text()
    assert {path.name for path in (tmp_path / "svg").iterdir()} == {"coverage.svg", "scatter-allocated.svg", "scatter-device.svg"}
