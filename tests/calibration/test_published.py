"""Published measurements: read, cited, and translated into recipes or reasons."""

from collections import Counter
from pathlib import Path

import pytest

import calibration.published
from calibration.published import CONSTANTS, NotModelled, Run, rows, translate
from estimator.dtypes import DType
from estimator.recipe import Attention, Loss, QuantizationKind, Trainer

TRANSLATED = {row.id: translated for row in rows() for translated in [translate(row)]}
RUNS = {name: one for name, one in TRANSLATED.items() if isinstance(one, Run)}
TUNING = {name: one for name, one in RUNS.items() if one.row.source == "fms-accel"}


def test_every_row_has_an_id_of_its_own() -> None:
    assert len({row.id for row in rows()}) == len(rows()) == 1517


def test_every_row_is_cited() -> None:
    assert all("/" in row.citation and row.fields["at"] for row in rows())


def test_the_evidence_stays_small() -> None:
    folder = Path(calibration.published.__file__).parent / "measurements" / "published"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_500_000


def test_a_failed_run_has_no_figure() -> None:
    assert all(row.allocated_bytes is None for row in rows() if row.is_bound)


def test_every_row_that_is_not_modelled_has_a_reason() -> None:
    left_out = [one for one in TRANSLATED.values() if isinstance(one, NotModelled)]
    assert len(left_out) + len(RUNS) == len(rows())
    assert all(one.reason for one in left_out)


def test_every_single_gpu_fms_row_of_grade_a_is_modelled_but_for_gptq_and_kernels_of_others() -> None:
    expected = {
        row.id
        for row in rows()
        if row.source == "fms-accel"
        and row.grade == "A"
        and row.fields.get("num_gpus", 1) == 1
        and not str(row.fields.get("quantization")).startswith("gptq")
        and row.fields["loss"] == "stock"
    }
    assert set(TUNING) == expected
    assert Counter(run.method for run in TUNING.values()) == {"full": 12, "lora": 10, "qlora": 20}


def test_every_unquantized_run_of_the_generation_benchmark_is_modelled() -> None:
    expected = {row.id for row in rows() if row.source == "optimum-bench-llama" and "quantization" not in row.fields}
    assert set(RUNS) - set(TUNING) == expected
    assert len(expected) == 78


def test_constants_name_rows_that_exist() -> None:
    ids = {row.id for row in rows()}
    named = [one for constants in CONSTANTS.values() for members in constants.values() for one in members]
    assert ids.issuperset(named)


def test_a_baseline_run_is_prepared_and_cast_by_trl() -> None:
    run = RUNS["fms-accel-0057"]
    assert run.recipe.prepare_for_kbit_training
    assert run.recipe.trainer is Trainer.TRL
    assert run.recipe.quantization is not None
    assert run.recipe.quantization.kind is QuantizationKind.NF4
    assert run.recipe.stack.trl == (0, 13, 0)
    assert run.recipe.stack.transformers == (4, 48, 1)


def test_an_accelerated_run_passes_trl_by() -> None:
    run = RUNS["fms-accel-0077"]
    assert not run.recipe.prepare_for_kbit_training
    assert run.recipe.trainer is Trainer.TRANSFORMERS
    assert run.recipe.training is not None
    assert run.recipe.training.autocast_dtype is DType.BFLOAT16
    assert run.recipe.training.use_reentrant
    assert run.recipe.training.loss is Loss.STOCK
    assert run.recipe.attention is Attention.FLASH_ATTENTION_2
    assert run.tokens == 4 * 4096


@pytest.mark.parametrize(("row", "autocast"), [("fms-accel-0302", False), ("fms-accel-0317", True), ("fms-accel-0250", True)])
def test_adapters_follow_the_base_before_peft_0_12_unless_it_is_packed(row: str, autocast: bool) -> None:
    adapter = RUNS[row].recipe.adapter
    assert adapter is not None
    assert adapter.autocast_adapter_dtype is autocast
