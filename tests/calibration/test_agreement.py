"""Closed forms beside the trace: a fixed sample of bundled models, each under another method."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from calibration.agreement import METHODS, append, cells, main, read, small, versions
from calibration.agreement_table import LIMIT, SIZES, Cell, Difference, markdown
from estimator.sources import catalogue
from estimator.sources.process import Inspector
from estimator.sources.tracing import Tracer

SAMPLE = {
    "google/gemma-2-2b": "full",
    "meta-llama/Llama-3.2-1B": "lora",
    "openai-community/gpt2": "qlora",
    "Qwen/Qwen3-0.6B": "qlora_prepared",
    "EleutherAI/pythia-14m": "int8",
}
WITHOUT_CLOSED_FORMS = "bigscience/bloom-560m"


@pytest.fixture(scope="module")
def found() -> list[Cell]:
    inspector = Inspector(keep_spare=False)
    tracer = Tracer(inspector=inspector)
    compared = [cell for name, method in SAMPLE.items() for cell in cells([name], tracer, inspector, methods=[method])]
    inspector.close()
    return compared


def test_every_method_is_compared_at_every_size(found: list[Cell]) -> None:
    assert {cell.method for cell in found} == set(METHODS)
    assert [(cell.reason, len(cell.differences)) for cell in found] == [("", len(SIZES))] * len(SAMPLE) * 2


def test_closed_forms_agree_with_the_trace_above_the_steady_state(found: list[Cell]) -> None:
    """The vocabulary is small, so that layers decide."""
    differences = [abs(one.above_steady) for cell in found for one in cell.differences]
    assert median(differences) <= 0.003
    assert max(differences) <= LIMIT


def test_vocabularies_are_made_small_wherever_a_config_names_one() -> None:
    expected = {"vocab_size": 4096, "pad_token_id": 0}
    assert small({"vocab_size": 9, "text_config": {"vocab_size": 9, "pad_token_id": 8}}) == {**expected, "text_config": expected}


@pytest.fixture
def unstarted() -> Inspector:
    """Stands for no process: nothing here may need one."""
    inspector = Inspector(keep_spare=False)
    inspector.close()
    return inspector


def test_a_model_without_closed_forms_is_named_with_the_reason_and_not_traced(unstarted: Inspector) -> None:
    compared = list(cells([WITHOUT_CLOSED_FORMS], Tracer(inspector=unstarted), unstarted))
    assert len(compared) == 2 * len(METHODS)
    assert all(cell.differences == () and "BloomForCausalLM" in cell.reason for cell in compared)


def test_what_cannot_be_traced_is_named_with_the_reason(unstarted: Inspector) -> None:
    (one, _) = cells(["openai-community/gpt2"], Tracer(inspector=unstarted), unstarted, methods=["lora"])
    assert (one.differences, one.reason) == ((), "the inspector is closed")


def _cell(*, method: str = "lora", above: float = 0.001, model_type: str = "llama") -> Cell:
    differences = tuple(
        Difference(batch=b, length=s, total=above / 10, above_steady=a) for (b, s), a in zip(SIZES, (above, 0, 0), strict=True)
    )
    return Cell(model="a/b", model_type=model_type, method=method, checkpointing=True, date="2026-01-02", differences=differences)


def test_a_stopped_run_goes_on_with_the_cells_that_are_missing(tmp_path: Path, unstarted: Inspector) -> None:
    kept = tmp_path / "new" / "cells.jsonl"
    for cell in list(cells([WITHOUT_CLOSED_FORMS], Tracer(inspector=unstarted), unstarted))[:3]:
        append(kept, cell)
    rest = list(cells([WITHOUT_CLOSED_FORMS], Tracer(inspector=unstarted), unstarted, known=read(kept)))
    assert len(rest) == 2 * len(METHODS) - 3
    assert not {cell.key for cell in rest} & set(read(kept))


def test_of_a_cell_compared_twice_the_later_counts(tmp_path: Path) -> None:
    kept = tmp_path / "cells.jsonl"
    for above in (0.5, 0.001):
        append(kept, _cell(above=above))
    assert read(kept) == {("a/b", "lora", True): _cell(above=0.001)}


def test_cells_of_other_library_versions_are_not_taken(tmp_path: Path) -> None:
    kept = tmp_path / "cells.jsonl"
    append(kept, _cell())
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"versions": versions() | {"torch": "1.0"}}))
    assert read(kept) == {}


def test_the_table_gives_each_architecture_and_names_every_cell_beyond_the_limit() -> None:
    refused = Cell(
        model="c/d", model_type="bloom", method="full", checkpointing=True, date="2026-01-01", differences=(), reason="not modelled"
    )
    text = markdown(
        [_cell(), _cell(method="full", above=-0.03), refused], num_wanted=4, versions={"torch": "2.9"}, command="make agreement"
    )
    assert "| llama | 1 | 2 | 0.0000% | -3.000% | 0.300% | a/b, full, checkpointing |" in text
    assert "- cells run: 3 of 4; compared 2, of 1 models and 1 architectures; without an answer of one engine 1\n" in text
    assert "- above the steady state: median 0.0000%, worst 3.000%" in text
    assert "- cells beyond 2% above the steady state: 1\n  - a/b, full, checkpointing: -3.00%" in text
    assert "- bloom, 1 cells of c/d: not modelled" in text
    assert "Written by `make agreement`, 2026-01-01 to 2026-01-02, with torch 2.9." in text


def test_what_is_kept_is_printed_without_starting_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "cells.jsonl"
    cell = replace(_cell(), model="openai-community/gpt2")
    append(kept, cell)
    main(["--all", "--methods", "lora", "--out", str(kept), "--seconds", "0"])
    assert f"- cells run: 1 of {2 * len(catalogue.entries())}; compared 1" in capsys.readouterr().out
    assert read(kept) == {cell.key: cell}
