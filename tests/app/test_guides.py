"""The guides' promises about cards and batches, held to plans: their function for the batch, and the cards they name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from app.plan import plan
from tests.app.test_published_fits import LLAMA_7B, LLAMA_13B, LLAMA_33B, LLAMA_70B, qlora, verdict

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT: dict[str, Any] = json.loads((DOCS / "examples" / "qlora.json").read_text())

# -- suggest_batch_size(24, 8) ------------------------------------------------------------------------------------------------------------

# The columns of the page's table.
RECIPES: tuple[dict[str, Any], ...] = (
    {},
    {"prepare_model_for_kbit_training": False},
    {"trainer": "trl"},
    {"trainer": "trl", "prepare_model_for_kbit_training": False},
)


def suggested(page: str) -> list[tuple[int, tuple[int, int], dict[str, Any]]]:
    """Every cell of the page's table: length, micro-batch × accumulation steps, and its recipe."""
    table = page[page.index("| tokens | the script |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return [
        (int(row[0].replace(",", "")), (int(cell.split(" × ")[0]), int(cell.split(" × ")[1])), recipe)
        for row in rows
        for cell, recipe in zip(row[1:], RECIPES, strict=True)
    ]


def planned(length: int, recipe: dict[str, Any]) -> tuple[int, int]:
    """For a global batch of 8 of Llama-3.1-8B on 24 GB."""
    asked = {**SCRIPT, **recipe, "training": {**SCRIPT["training"], "max_length": length}}
    found = plan({**asked, "hardware": {"gpu": "rtx4090"}, "global_batch_size": 8})["plan"]
    return found["per_device_train_batch_size"], found["gradient_accumulation_steps"]


CELLS = suggested((DOCS / "guides.md").read_text())


def test_the_page_answers_for_three_lengths_and_four_recipes() -> None:
    assert len(CELLS) == 12
    assert all(batch * steps == 8 for _, (batch, steps), _ in CELLS)


@pytest.mark.parametrize(("length", "sizes", "recipe"), CELLS)
def test_the_batch_that_the_page_states_in_place_of_the_guide_s_function_is_what_a_plan_finds(
    length: int, sizes: tuple[int, int], recipe: dict[str, Any]
) -> None:
    assert planned(length, recipe) == sizes


def test_what_the_guide_claims_for_24_gigabytes_and_8_billion_is_right_for_its_script_at_1024_tokens_and_not_at_2048() -> None:
    """The guide says 4 and 2; its code, which divides by 10⁹ twice, would print 8 and 1."""
    right = {length for length, sizes, recipe in CELLS if sizes == (4, 2) and not recipe}
    printed = {length for length, sizes, recipe in CELLS if sizes == (8, 1) and not recipe}
    assert (right, printed) == ({1024}, {512})


# -- the cards ----------------------------------------------------------------------------------------------------------------------------

# Of one kind of kernels each, the one with more memory behind the one with less.
CARDS = (("rtx3060-12", "rtx3090", "a100-40", "a100-80"), ("t4", "v100-32"), ("p100-16", "v100-32"), ("rtx3060-12", "rtx4090", "a100-40"))
MODELS = (LLAMA_7B, LLAMA_13B, LLAMA_33B, LLAMA_70B)
ORDER = ("does_not_fit", "tight", "fits")


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, str], int]:
    """The paper's recipe on the guides' cards."""
    cards = {card for chain in CARDS for card in chain}
    return {(model, card): ORDER.index(verdict(qlora(model, card))) for model in MODELS for card in cards}


@pytest.mark.parametrize("chain", CARDS)
def test_what_fits_a_card_fits_one_with_more_memory_and_a_smaller_model_fits_where_a_larger_does(
    chain: tuple[str, ...], verdicts: dict[tuple[str, str], int]
) -> None:
    for model in MODELS:
        column = [verdicts[model, card] for card in chain]
        assert column == sorted(column), model
    for card in chain:
        row = [verdicts[model, card] for model in MODELS]
        assert row == sorted(row, reverse=True), card


def test_every_card_and_size_that_the_guides_name_has_an_answer(verdicts: dict[tuple[str, str], int]) -> None:
    """8 B on the smallest, nothing of 70 B below 40 GB: 34 GB of it are weights in 4 bits."""
    named = ("rtx3060-12", "rtx3090", "rtx4090", "a100-40", "a100-80", "t4", "p100-16")
    assert all(verdicts[LLAMA_7B, card] == ORDER.index("fits") for card in named)
    assert all(verdicts[LLAMA_70B, card] == 0 for card in named if card not in ("a100-40", "a100-80"))
    assert verdicts[LLAMA_70B, "a100-80"] == ORDER.index("fits")


def test_the_page_names_the_function_that_it_answers_for() -> None:
    assert re.search(r'^## "suggest_batch_size\(24, 8\)"', (DOCS / "guides.md").read_text(), re.MULTILINE)
