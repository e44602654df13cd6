"""What is written is read back as the same run, and loaded by the real libraries' own parsers."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from app import examples
from app.answer import Json
from app.cli import cli
from app.http import create_app
from app.reading import read_estimate
from app.service import prepare
from app.trainer_files.opening import opened
from app.trainer_files.writing import written
from app.trainer_files.written.amended import amended
from estimator.errors import RequestError

SFT: Json = {
    "model": "Qwen/Qwen2.5-7B",
    "dtype": "bfloat16",
    "attn_implementation": "sdpa",
    "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    "peft": {"r": 16, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    "trainer": "trl",
    "training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_length": 1024, "optim": "paged_adamw_8bit"},
    "stack": {"transformers": "5.23", "trl": "1.16", "peft": "0.21"},
}
PACKED: Json = {**SFT, "attn_implementation": "flash_attention_2", "training": {**SFT["training"], "packing": True, "weight_decay": 0.1}}
FULL: Json = {**examples.FULL, "padded": True, "attn_implementation": "flash_attention_2", "hardware": {"gpu": "a100-80"}}
QLORA: Json = {
    **{name: value for name, value in SFT.items() if name != "trainer"},
    "training": {
        **SFT["training"],
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "padded": True,
}
INT8: Json = {**QLORA, "quantization": {"load_in_8bit": True}, "peft": {"r": 8, "target_modules": "all-linear", "use_dora": True}}
FLAT: Json = {**QLORA, "attn_implementation": "flash_attention_2", "padded": False, "training": {**QLORA["training"], "padding_free": True}}
LIGER: Json = {**QLORA, "training": {**QLORA["training"], "use_liger_kernel": True, "optim_args": "betas=0.9", "weight_decay": 0.01}}


def _spread(request: Json, strategy: str, **options: Any) -> Json:
    return {**request, "hardware": {"num_gpus": 2, "strategy": strategy, **options}}


ZERO2 = _spread(QLORA, "zero2", deepspeed={"zero_optimization": {"stage": 2, "reduce_bucket_size": 123_456, "overlap_comm": True}})
ZERO3 = _spread(
    FULL, "zero3", deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
)
FSDP1 = _spread(
    FULL, "fsdp", fsdp_config={"version": 1, "reshard_after_forward": False, "backward_prefetch": "BACKWARD_PRE", "use_orig_params": False}
)
FSDP = _spread(FULL, "fsdp", fsdp_config={"reshard_after_forward": False, "cpu_offload": True})


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        *((request, "trl") for request in (SFT, PACKED, _spread(SFT, "zero2"), _spread(SFT, "ddp"), _spread(SFT, "fsdp"))),
        *((request, "axolotl") for request in (QLORA, INT8, FLAT, LIGER, FULL, ZERO2, ZERO3, FSDP, FSDP1)),
        *((request, "llamafactory") for request in (INT8, LIGER, ZERO2)),
        *((request, "accelerate") for request in (FSDP, FSDP1, _spread(QLORA, "zero2"), ZERO3, _spread(QLORA, "ddp"), QLORA)),
        *((request, "deepspeed") for request in (ZERO2, ZERO3)),
    ],
)
def test_what_is_written_is_read_back_as_the_same_run(request_: Json, kind: str) -> None:
    assert _known(kind, written(request_, kind).differences) == []


def _known(kind: str, differences: tuple[str, ...]) -> list[str]:
    """Differences but for those that no words of a format can take away.

    LLaMA-Factory loads what the checkpoint has, which is the same type here, and stores 4-bit weights in the compute type, which is the
    same number of bytes; accelerate's own DeepSpeed fields have no sizes.
    """
    expected = {"llamafactory": ("quantization.storage_dtype: uint8 is bfloat16 there",)}.get(kind, ())
    return [line for line in differences if line not in expected]


def test_what_a_trainer_makes_otherwise_is_said() -> None:
    found = written(SFT, "axolotl")
    assert "trainer: trl is transformers there" in found.differences
    assert "training.loss: trl_tiled is stock there" in found.differences
    plain = written({**SFT, "hardware": {"gpu": "rtx4060"}}, "axolotl")
    assert plain.fits is False
    assert plain.device_bytes is not None


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        (QLORA, "trl", "trainer: 'transformers' cannot be written for trl"),
        (QLORA, "deepspeed", "'single' is none of DeepSpeed's"),
        ({**SFT, "model": {"config": {"model_type": "llama"}}}, "trl", "model"),
        (examples.INFERENCE, "axolotl", "only training runs are written"),
        ({**QLORA, "peft": {**QLORA["peft"], "bias": "all"}}, "axolotl", "peft.bias: 'all' cannot be written for axolotl"),
        ({**QLORA, "peft": {"r": 8}}, "axolotl", "peft.target_modules: is needed"),
        ({**QLORA, "attn_implementation": "flex_attention"}, "llamafactory", "attn_implementation: 'flex_attention' cannot be written"),
        (QLORA, "unsloth", "write: 'unsloth' is not known; accepted: accelerate, axolotl"),
    ],
)
def test_what_a_format_has_no_words_for_is_refused(request_: Json, kind: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        written(request_, kind)


@pytest.fixture
def has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's card is not asked."""
    training_args = pytest.importorskip("transformers.training_args")
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True, raising=False)


_KEPT = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "optim", "optim_args", "bf16", "fp16", "packing"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "use_liger_kernel", "label_smoothing_factor", "weight_decay"),
)


@pytest.mark.usefixtures("has_bfloat16")
@pytest.mark.parametrize(
    "request_",
    [SFT, PACKED, QLORA, INT8, FLAT, {**FULL, "padded": False}, {**QLORA, "prepare_model_for_kbit_training": True}],
    ids=["sft", "packed", "qlora", "int8", "flat", "full", "prepared"],
)
def test_the_objects_of_a_script_are_those_of_the_run(request_: Json) -> None:
    """The script is run up to its objects, and the objects are pasted back."""
    for package in ("torch", "datasets", "peft", "transformers", "trl"):
        pytest.importorskip(package)
    text = written(request_, "trl", "train.py").text
    module = ModuleType("train")
    exec(compile(text, "train.py", "exec"), module.__dict__)
    arguments = module.arguments().to_dict()
    arguments.setdefault("max_length", module.MAX_LENGTH)
    loaded: Json = {}
    module.AutoModelForCausalLM = type(
        "Auto", (), {"from_pretrained": staticmethod(lambda model, **given: loaded.update(model=model, **given))}
    )
    module.__dict__["prepare_model_for_kbit_training"] = lambda model, use_gradient_checkpointing: loaded.update(prepared=True)
    module.model()
    pasted: Json = {
        "model": loaded["model"],
        "dtype": str(loaded["dtype"]).removeprefix("torch."),
        "attn_implementation": loaded["attn_implementation"],
        "trainer": "trl" if "SFTTrainer" in module.__dict__ else "transformers",
        "training": {name: arguments[name] for name in _KEPT if arguments.get(name) is not None},
        "prepare_model_for_kbit_training": "prepared" in loaded,
        "padded": request_.get("padded", False),
        "stack": request_.get("stack", {}),
        "hardware": request_.get("hardware"),
    }
    pasted["training"]["padding_free"] = bool(arguments.get("padding_free")) or "DataCollatorWithFlattening" in module.__dict__
    if "quantization_config" in loaded:
        pasted["quantization"] = loaded["quantization_config"].to_dict()
    if "adapter" in module.__dict__:
        pasted["peft"] = {name: sorted(value) if isinstance(value, set) else value for name, value in module.adapter().to_dict().items()}
    assert prepare(read_estimate(pasted)).recipe == prepare(read_estimate(request_)).recipe


def _trl(path: Path) -> None:
    trl: Any = pytest.importorskip("trl")
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig))
    _, arguments, model = parser.parse_args_and_config(args=["--config", str(path)], fail_with_unknown_args=True)
    assert (arguments.max_length, arguments.per_device_train_batch_size) == (1024, 2)
    assert trl.get_quantization_config(model).load_in_4bit
    assert trl.get_peft_config(model).r == 16


def _axolotl(path: Path) -> None:
    schema: Any = pytest.importorskip("axolotl.utils.schemas.config")
    theirs = schema.AxolotlInputConfig(**yaml.safe_load(path.read_text()))
    assert (theirs.sequence_len, theirs.micro_batch_size, theirs.lora_r, theirs.lora_mlp_kernel) == (1024, 2, 16, False)


def _llamafactory(path: Path) -> None:
    hparams: Any = pytest.importorskip("llamafactory.hparams")
    transformers = pytest.importorskip("transformers")
    classes = (hparams.ModelArguments, hparams.DataArguments, hparams.FinetuningArguments, transformers.Seq2SeqTrainingArguments)
    model, data, tuning, arguments = transformers.HfArgumentParser(classes).parse_dict(yaml.safe_load(path.read_text()))
    assert (model.quantization_bit, data.cutoff_len, tuning.lora_rank, arguments.per_device_train_batch_size) == (4, 1024, 16, 2)


def _accelerate(path: Path) -> None:
    config_args: Any = pytest.importorskip("accelerate.commands.config.config_args")
    theirs = config_args.load_config_from_file(str(path))
    assert (theirs.distributed_type.value, theirs.num_processes, theirs.mixed_precision) == ("FSDP", 2, "bf16")


def _deepspeed(path: Path) -> None:
    utils: Any = pytest.importorskip("accelerate.utils.deepspeed")
    theirs = utils.HfDeepSpeedConfig(str(path))
    assert theirs.is_zero2()
    assert theirs.get_value("zero_optimization.reduce_bucket_size") == 123_456


@pytest.mark.usefixtures("has_bfloat16")
@pytest.mark.parametrize(
    ("request_", "kind", "load"),
    [
        (SFT, "trl", _trl),
        (PACKED, "trl", _trl),
        (QLORA, "axolotl", _axolotl),
        (FLAT, "axolotl", _axolotl),
        (QLORA, "llamafactory", _llamafactory),
        (FSDP, "accelerate", _accelerate),
        (ZERO2, "deepspeed", _deepspeed),
    ],
)
def test_the_real_parser_loads_it(
    request_: Json, kind: str, load: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    path = tmp_path / ("out.json" if kind == "deepspeed" else "out.yaml")
    path.write_text(written(request_, kind).text)
    load(path)


@pytest.mark.parametrize("request_", [ZERO2, ZERO3])
def test_deepspeeds_own_schema_takes_it(request_: Json) -> None:
    schema: Any = pytest.importorskip("deepspeed.runtime.zero.config")
    options = json.loads(written(request_, "deepspeed").text)["zero_optimization"]
    theirs = schema.DeepSpeedZeroConfig(**options)
    assert int(theirs.stage) == options["stage"]
    assert theirs.reduce_bucket_size == options["reduce_bucket_size"]


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("# mine\na: 1  # small\nb: 2\n", {"a": 3}, "# mine\na: 3  # small\nb: 2\n"),
        ("a:\nb: 2\n", {"a": 3}, "a: 3\nb: 2\n"),
        ("a: 1\n", {"b": 2}, "a: 1\nb: 2\n"),
        ("x:\n  a: 1\na: 2\n", {"a": 3}, "x:\n  a: 1\na: 3\n"),
        ('{"a": 1, "b": 2}', {"b": 3}, '{"a": 1, "b": 3}'),
        ('{"a": 1}', {"b": 3}, '{"b": 3, "a": 1}'),
        ("a: 1\n", {"a": 1}, "a: 1\n"),
    ],
)
def test_a_users_own_file_keeps_all_but_its_sizes(text: str, values: dict[str, int], expected: str) -> None:
    assert amended("own.yaml", text, values) == expected


OWN = """\
# my run
base_model: HuggingFaceTB/SmolLM2-1.7B
sequence_len: 1000   # 64 divides 1024
micro_batch_size: 1
gradient_accumulation_steps: 16
flash_attention: true
gradient_checkpointing: true
datasets: [{path: some/data, type: alpaca}]
"""


def test_a_plan_of_a_training_file_is_that_file_with_other_sizes(tmp_path: Path) -> None:
    own, out = tmp_path / "own.yaml", tmp_path / "out.yaml"
    own.write_text(OWN)
    options = ["plan", str(own), "--gpu", "l4", "--global-batch-size", "16", "--json", "--write", "axolotl", str(out)]
    result = CliRunner().invoke(cli, options)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)["plan"]
    batch, steps = plan["per_device_train_batch_size"], plan["gradient_accumulation_steps"]
    assert batch > 1
    assert out.read_text() == OWN.replace("size: 1\n", f"size: {batch}\n").replace("steps: 16", f"steps: {steps}")
    assert "read back, it peaks at" in result.stderr


def test_http_writes_a_run_as_a_file() -> None:
    with TestClient(create_app()) as client:
        found = client.post("/v1/convert", json={**SFT, "write": "trl", "hardware": {"gpu": "a100-80"}}).json()
        assert found["written"]["fits"] is True
        assert yaml.safe_load(found["written"]["content"])["model_name_or_path"] == "Qwen/Qwen2.5-7B"
        code = client.post("/v1/convert", json={**SFT, "write": "trl", "as": "train.py"}).json()["written"]["content"]
        compile(code, "train.py", "exec")
        assert client.post("/v1/convert", json={**SFT, "write": "unsloth"}).status_code == 422
        again = opened({"files": [{"name": "out.yaml", "content": found["written"]["content"]}]})
        assert read_estimate(again).request.peft == read_estimate(SFT).request.peft
