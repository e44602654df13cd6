"""Plans and shortfalls of random jobs, held to what asking for every size and every change alone gives."""

import random
from itertools import combinations
from typing import Any

import pytest

from app.answer import device_bytes
from app.card import card_of
from app.plan import plan
from app.reading import read_estimate
from app.service import prepare, render
from app.settings import applied, joined
from app.shortfall import missing_bytes
from estimator.errors import RequestError

MODELS = (
    "HuggingFaceTB/SmolLM2-1.7B",
    "Qwen/Qwen2.5-7B",
    "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-3.1-8B",
    "mistralai/Mistral-7B-v0.1",
)
CARDS = ("t4", "rtx3060-12", "rtx4060", "rtx4090", "a6000", "a100-40", "a100-80", "h100-sxm", "p100")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
GLOBAL_BATCHES = (1, 2, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def jobs(number: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [job(draw) for _ in range(number)]


def job(draw: random.Random) -> dict[str, Any]:
    method = draw.choice(("full", "lora", "qlora", "qlora", "int8"))
    training: dict[str, Any] = {
        "max_length": draw.choice((256, 512, 1000, 1024, 2048, 4096, 8192)),
        "optim": draw.choice(("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd")),
        "bf16": True,
        "gradient_checkpointing": draw.random() < 0.7,
        "use_liger_kernel": draw.random() < 0.2,
    }
    request: dict[str, Any] = {
        "model": draw.choice(MODELS),
        "dtype": draw.choice(("bfloat16", "bfloat16", "float32")),
        "trainer": draw.choice(("transformers", "transformers", "trl")),
        "training": training,
        "padded": draw.random() < 0.2,
        "hardware": {"gpu": draw.choice(CARDS)} if draw.random() < 0.7 else {"capacity_gib": round(draw.uniform(4, 90), 2)},
        "global_batch_size": draw.choice(GLOBAL_BATCHES),
    }
    if draw.random() < 0.3:
        request["hardware"]["headroom"] = draw.choice(("1GiB", "5%", 0))
    if method != "full":
        request["peft"] = {"r": draw.choice((4, 8, 16, 64)), "target_modules": draw.choice(("all-linear", ["q_proj", "v_proj"]))}
    if method == "qlora":
        request["quantization"] = {**NF4, "bnb_4bit_use_double_quant": draw.random() < 0.5}
        request["prepare_model_for_kbit_training"] = draw.random() < 0.5
    if method == "int8":
        request["quantization"] = {"load_in_8bit": True}
    return request


def asked(request: dict[str, Any], **sizes: int) -> dict[str, Any]:
    """The request of one run."""
    own = {name: value for name, value in request.items() if name != "global_batch_size"}
    return {**own, "training": {**own["training"], **sizes}}


def missing(payload: dict[str, Any]) -> int:
    """What one run lacks, asked as `estimate` is asked."""
    case = prepare(read_estimate(payload))
    card = card_of(case.question.request.hardware)
    assert card is not None
    found = case.answerer.estimate(case.recipe)
    lacks = missing_bytes(case.recipe, card, found)
    assert (lacks <= 0) == (render(case, found)["fit"]["verdict"] == "fits")
    return lacks


def check_plan(request: dict[str, Any]) -> bool:
    """Holds one job's answer to single questions; says whether there is a plan."""
    total = request["global_batch_size"]
    result = plan(request)
    needs = {
        size: missing(asked(request, per_device_train_batch_size=size, gradient_accumulation_steps=total // size))
        for size in range(1, total + 1)
        if total % size == 0
    }
    fitting = [size for size, lacks in needs.items() if lacks <= 0]
    found = result["plan"]
    assert (found is None) == (not fitting)
    assert (result["shortfall"] is None) == bool(fitting)
    if found is None:
        check_shortfall(request, result["shortfall"], needs[1])
        return False
    assert found["per_device_train_batch_size"] == max(fitting)
    assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] == found["global_batch_size"] == total
    assert found["estimate"]["fit"]["verdict"] == "fits"
    assert found["margin_bytes"] == found["estimate"]["fit"]["free_bytes"]
    longest = found["longest_max_length"]
    sizes = {name: found[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    assert missing(asked(request, **sizes, max_length=longest)) <= 0
    limit = prepare(read_estimate(asked(request, **sizes))).inventory.num_positions
    longer = (longest // 64 + 1) * 64
    assert longer > (limit or longer) or missing(asked(request, **sizes, max_length=longer)) > 0
    return True


def check_shortfall(request: dict[str, Any], shortfall: dict[str, Any], lacks: int) -> None:
    assert shortfall["missing_bytes"] == lacks > 0
    assert shortfall["missing_by_phase"][shortfall["phase"]] == max(shortfall["missing_by_phase"].values()) == lacks
    total = request["global_batch_size"]
    smallest = asked(request, per_device_train_batch_size=1, gradient_accumulation_steps=total)
    before = prepare(read_estimate(smallest))
    held = device_bytes(before.answerer.estimate(before.recipe))
    for change in shortfall["changes"]:
        changed = applied(smallest, change["set"])
        case = prepare(read_estimate(changed))
        saved = 0 if "hardware.gpu" in change["set"] else held - device_bytes(case.answerer.estimate(case.recipe))
        assert saved == change["saves_bytes"], change
        assert max(0, missing(changed)) == change["missing_bytes"], change
        assert change["fits"] == (change["missing_bytes"] == 0)
        assert change["set"] == joined(change["parts"])
        for size in range(1, len(change["parts"])):
            for parts in combinations(change["parts"], size):
                try:
                    assert missing(applied(smallest, joined(list(parts)) or {})) > 0, (change, parts)
                except RequestError:  # a part that is refused alone
                    continue
    assert [change["fits"] for change in shortfall["changes"]] == sorted((c["fits"] for c in shortfall["changes"]), reverse=True)


def test_plans_and_changes_of_random_jobs_are_what_single_questions_give() -> None:
    planned = [check_plan(request) for request in jobs(4, seed=11)]
    assert 0 < sum(planned) < 4


@pytest.mark.slow
def test_plans_and_changes_of_five_hundred_random_jobs_are_what_single_questions_give() -> None:
    planned = [check_plan(request) for request in jobs(500, seed=2026)]
    assert 100 < sum(planned) < 450
