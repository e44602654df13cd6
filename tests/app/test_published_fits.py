"""What others saw fit or run out of memory, and what arithmetic alone rules out, for the cards that guides name.

Sources: Hugging Face's blog on 4-bit transformers and QLoRA (2023), its table of 13 runs on one T4, batch 1, 4 accumulation steps, AdamW,
SFTTrainer; the QLoRA paper and the same blog: 33 B on 24 GB and 65 B on 48 GB. The T4 runs do not say rank and targets: here they are
64 on PEFT's default for Llama (queries and values), with float16 autocast, eager attention and the preparation.
"""

from typing import Any

import pytest

from app.plan import plan
from app.service import answer
from estimator.gpus import find_gpu

LLAMA_7B, LLAMA_13B, LLAMA_33B, LLAMA_70B = (
    "meta-llama/Llama-2-7b-hf",  # shapes of Llama 7B and 13B
    "meta-llama/Llama-2-13b-hf",
    "lmsys/vicuna-33b-v1.3",
    "meta-llama/Llama-2-70b-hf",
)
INT8 = {"load_in_8bit": True}


def four_bit(kind: str, compute: str, *, nested: bool = False) -> dict[str, Any]:
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_use_double_quant": nested,
    }


def run_of_2023(model: str, quantization: dict[str, Any], length: int, gpu: str, *, checkpointing: bool) -> dict[str, Any]:
    return {
        "model": model,
        "dtype": "float16",
        "attn_implementation": "eager",
        "quantization": quantization,
        "peft": {"r": 64, "target_modules": ["q_proj", "v_proj"]},
        "prepare_model_for_kbit_training": True,
        "padded": True,
        "training": {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "max_length": length,
            "optim": "adamw_torch",
            "fp16": True,
            "gradient_checkpointing": checkpointing,
        },
        "hardware": {"gpu": gpu, "headroom": 0},
    }


def verdict(request: dict[str, Any]) -> str:
    fit = answer(request)["fit"]
    assert fit is not None
    return str(fit["verdict"])


RAN = [
    pytest.param(LLAMA_7B, INT8, 512, True, id="7B int8 512"),
    pytest.param(LLAMA_7B, four_bit("nf4", "bfloat16"), 512, False, id="7B nf4 512, no checkpointing"),
    pytest.param(LLAMA_7B, four_bit("fp4", "bfloat16"), 512, False, id="7B fp4 512, no checkpointing"),
    pytest.param(LLAMA_7B, four_bit("nf4", "bfloat16"), 1024, True, id="7B nf4 1024"),
    pytest.param(LLAMA_13B, four_bit("nf4", "float16"), 512, True, id="13B nf4 512"),
    pytest.param(LLAMA_13B, four_bit("nf4", "float16", nested=True), 1024, True, id="13B nf4 nested 1024"),
]
# Two more of the table ran out of memory and would not today: 7 B int8 at 1,024 and 13 B NF4 at 1,024, both checkpointed. The libraries
# of 2023 kept more (bitsandbytes before 0.45 the inputs of its int8 layers), and the script's own rank and targets are not known.
RAN_OUT = [
    pytest.param(LLAMA_7B, four_bit("nf4", "bfloat16"), 1024, False, id="7B nf4 1024, no checkpointing"),
    pytest.param(LLAMA_7B, four_bit("fp4", "bfloat16"), 1024, False, id="7B fp4 1024, no checkpointing"),
    pytest.param(LLAMA_13B, INT8, 512, True, id="13B int8 512"),
    pytest.param(LLAMA_13B, four_bit("fp4", "bfloat16"), 512, False, id="13B fp4 512, no checkpointing"),
    pytest.param(LLAMA_13B, four_bit("fp4", "float16"), 512, False, id="13B fp4 float16 512, no checkpointing"),
]


@pytest.mark.parametrize("gpu", ["t4", "p100"])  # the P100 has 16 GB too, and neither has flash kernels
@pytest.mark.parametrize(("model", "quantization", "length", "checkpointing"), RAN)
def test_what_ran_on_a_t4_does_not_run_out_of_memory(
    model: str, quantization: dict[str, Any], length: int, checkpointing: bool, gpu: str
) -> None:
    assert verdict(run_of_2023(model, quantization, length, gpu, checkpointing=checkpointing)) != "does_not_fit"


@pytest.mark.parametrize(("model", "quantization", "length", "checkpointing"), RAN_OUT)
def test_what_ran_out_of_memory_on_a_t4_does_not_fit(model: str, quantization: dict[str, Any], length: int, checkpointing: bool) -> None:
    assert verdict(run_of_2023(model, quantization, length, "t4", checkpointing=checkpointing)) == "does_not_fit"


def qlora(model: str, gpu: str, *, prepared: bool = True) -> dict[str, Any]:
    """The paper's recipe at r = 16: NF4 twice quantized, all linear layers, 32-bit paged AdamW, batch 1 × 512, checkpointing."""
    return {
        "model": model,
        "dtype": "bfloat16",
        "quantization": four_bit("nf4", "bfloat16", nested=True),
        "peft": {"r": 16, "target_modules": "all-linear"},
        "prepare_model_for_kbit_training": prepared,
        "training": {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 16,
            "max_length": 512,
            "optim": "paged_adamw_32bit",
            "bf16": True,
            "gradient_checkpointing": True,
        },
        "hardware": {"gpu": gpu},
    }


def lora(model: str, gpu: str) -> dict[str, Any]:
    own = {name: value for name, value in qlora(model, gpu).items() if name not in ("quantization", "prepare_model_for_kbit_training")}
    return {**own, "peft": {"r": 16, "target_modules": ["q_proj", "v_proj"]}}


def full(model: str, gpu: str) -> dict[str, Any]:
    own = {name: value for name, value in lora(model, gpu).items() if name != "peft"}
    return {**own, "training": {**own["training"], "gradient_accumulation_steps": 1, "optim": "adamw_torch"}}


@pytest.mark.parametrize(
    ("model", "gpu"),
    [
        (LLAMA_33B, "rtx3090"),
        (LLAMA_33B, "rtx4090"),
        (LLAMA_33B, "a100-40"),
        (LLAMA_70B, "a6000"),
        (LLAMA_70B, "a100-80"),
        (LLAMA_7B, "rtx3060-12"),
        (LLAMA_13B, "rtx3090"),
    ],
)
def test_the_papers_models_train_in_four_bits_on_the_papers_cards(model: str, gpu: str) -> None:
    """With the paper's norms in 32 bits as with the preparation of today, which turns the head into 32 bits as well."""
    for prepared in (False, True):
        assert verdict(qlora(model, gpu, prepared=prepared)) != "does_not_fit"
    assert verdict(qlora(model, gpu, prepared=False)) == "fits"


@pytest.mark.parametrize(
    ("request_", "billions", "bytes_each"),
    [  # parameters of the quantized layers, or of all, and the least that one takes
        pytest.param(qlora(LLAMA_70B, "rtx4090"), 68.5, 0.5, id="70B, 4 bits, 24 GB"),
        pytest.param(qlora(LLAMA_33B, "t4"), 32.1, 0.5, id="33B, 4 bits, T4"),
        pytest.param(lora(LLAMA_13B, "p100"), 13.0, 2, id="13B, 16 bits, P100"),
        pytest.param(qlora(LLAMA_33B, "rtx3060-12"), 32.1, 0.5, id="33B, 4 bits, 12 GB"),
        pytest.param(lora(LLAMA_7B, "rtx3060-12"), 6.74, 2, id="7B, 16 bits, 12 GB"),
        pytest.param(lora(LLAMA_13B, "rtx3090"), 13.0, 2, id="13B, 16 bits, 24 GB"),
        pytest.param(lora(LLAMA_33B, "a100-40"), 32.5, 2, id="33B, 16 bits, 40 GB"),
        pytest.param(lora(LLAMA_70B, "a100-80"), 69.0, 2, id="70B, 16 bits, 80 GB"),
        pytest.param(full(LLAMA_7B, "a100-40"), 6.74, 8, id="7B, AdamW in 16 bits, 40 GB"),
        pytest.param(full(LLAMA_13B, "a100-80"), 13.0, 8, id="13B, AdamW in 16 bits, 80 GB"),
    ],
)
def test_what_arithmetic_rules_out_is_a_shortfall_of_at_least_that_much(
    request_: dict[str, Any], billions: float, bytes_each: float
) -> None:
    least = billions * 1e9 * bytes_each - find_gpu(request_["hardware"]["gpu"]).capacity_bytes
    assert least > 0
    found = plan({**request_, "global_batch_size": 16})
    assert found["plan"] is None
    assert found["shortfall"]["missing_bytes"] > least
    assert any(change["fits"] for change in found["shortfall"]["changes"])


@pytest.mark.parametrize(("model", "gpu"), [(LLAMA_13B, "a100-40"), (LLAMA_33B, "a100-80")])
def test_sixteen_bit_weights_that_leave_a_third_of_the_card_free_or_nearly_train_with_lora(model: str, gpu: str) -> None:
    """26 GB of 40, 65 GB of 80."""
    assert verdict(lora(model, gpu)) == "fits"
