"""Files as part of a request: on the command line, over HTTP, several together, and what is refused."""

import json
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from app.answer import Json
from app.cli import cli
from app.http import create_app
from app.trainer_files.formats import Format, format_of
from app.trainer_files.opening import MAX_FILES, opened
from app.trainer_files.writing import convert
from app.yaml_text import parse
from estimator.errors import RequestError

AXOLOTL = """\
base_model: HuggingFaceTB/SmolLM2-1.7B
adapter: lora
lora_r: 8
lora_target_modules: [q_proj, v_proj]
sequence_len: 512
micro_batch_size: 1
flash_attention: true
gradient_checkpointing: true
deepspeed: ds/zero2.json
datasets: [{path: some/data, type: alpaca}]
"""
ZERO2 = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.yaml").write_text(AXOLOTL)
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "zero2.json").write_text(json.dumps(ZERO2))
    return tmp_path


def _run(*arguments: str) -> tuple[int, Json]:
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    if isinstance(result.exception, RequestError):
        return 1, {"detail": result.exception.message}
    return result.exit_code, json.loads(result.stdout) if result.exit_code in (0, 3) else {"detail": result.output}


def test_a_training_file_is_checked_with_the_file_it_points_to(folder: Path) -> None:
    code, found = _run("check", str(folder / "train.yaml"), "--gpu", "rtx4090")
    assert (code, found["verdict"]) == (0, "fits")
    code, found = _run("estimate", str(folder / "train.yaml"), "--gpu", "rtx4090", "--num-gpus", "2")
    assert code == 0
    assert found["recipe"]["strategy"] == "zero2"
    assert f"{folder}/train.yaml: datasets" in found["ignored"]
    assert any(w["code"] == "field_not_modelled" and "lora_mlp_kernel" in w["message"] for w in found["warnings"])


def test_exit_code_3_says_that_a_file_does_not_fit(folder: Path) -> None:
    code, _ = _run("check", str(folder / "train.yaml"), "--capacity-gib", "3")
    assert code == 3


def test_options_and_a_model_stand_above_the_files(folder: Path) -> None:
    _, found = _run("estimate", "Qwen/Qwen2.5-0.5B-Instruct", str(folder / "train.yaml"), "--max-length", "256", "--lora-r", "4")
    assert found["model"]["id"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert found["recipe"]["training"]["max_length"] == 256
    assert found["recipe"]["peft"]["r"] == 4


def test_plan_and_which_take_files_too(folder: Path) -> None:
    code, found = _run("plan", str(folder / "train.yaml"), "--gpu", "rtx4090", "--global-batch-size", "4")
    assert code == 0
    assert found["plan"]["global_batch_size"] == 4


def test_a_file_that_is_none_and_a_second_model_are_refused(folder: Path) -> None:
    (folder / "odd.yaml").write_text("colour: blue\n")
    assert "odd.yaml: not a file that is read; accepted:" in _run("check", str(folder / "odd.yaml"), "--gpu", "t4")[1]["detail"]
    code, _ = _run("check", "openai-community/gpt2", "facebook/opt-125m", "--gpu", "t4")
    assert code == 2


def test_http_takes_files_wherever_it_takes_a_request() -> None:
    files = [{"name": "train.yaml", "content": AXOLOTL}, {"name": "zero2.json", "content": ZERO2}]
    with TestClient(create_app()) as client:
        answer = client.post("/v1/convert", json={"files": files, "hardware": {"num_gpus": 2}})
        assert answer.status_code == 200
        found = answer.json()
        assert found["formats"] == {"train.yaml": "axolotl", "zero2.json": "deepspeed"}
        request = found["request"]
        assert request["hardware"] == {"strategy": "zero2", "deepspeed": {"zero_optimization": {"stage": 2}}, "num_gpus": 2}
        card = {"gpu": "rtx4090", "num_gpus": 2}
        direct = client.post("/v1/check", json={"files": files, "hardware": card}).json()
        assert direct == client.post("/v1/check", json={**request, "hardware": {**request["hardware"], **card}}).json()
        assert direct["verdict"] == "fits"
        refused = client.post("/v1/check", json={"files": files[:1], "hardware": card})
        assert refused.status_code == 422
        assert refused.json()["errors"][0]["field"] == "train.yaml: deepspeed"


@pytest.mark.parametrize(
    "files",
    [
        [],
        "train.yaml",
        [{"name": "a"}],
        [{"name": "a", "content": 3}],
        [{"content": AXOLOTL, "colour": "blue"}],
        [{"name": "a", "content": AXOLOTL, "format": "unsloth"}],
        [{"name": "a", "content": AXOLOTL}, {"name": "a", "content": AXOLOTL}],
        [{"name": str(i), "content": ZERO2} for i in range(MAX_FILES + 1)],
    ],
)
def test_malformed_files_are_refused(files: object) -> None:
    with pytest.raises(RequestError):
        opened({"files": files})


def test_convert_needs_files_or_a_kind_to_write() -> None:
    with pytest.raises(RequestError, match="give files to read, or with write"):
        convert({"model": "openai-community/gpt2"})


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1, *a]",
        "\n".join([f"a0: &a0 [{', '.join('1' * 10)}]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8))]),
        "[" * 2000,
        "- 1\n- 2",
        "1: 2",
        "a: !!python/object/apply:os.system [ls]",
        "a: 'b",
        "x: 1\n" * 2**18,
        "a: \x19",
        "a: \ud800",
        "a: !!int ''",
        "a: !!bool x",
        "a: !!timestamp x",
        'a: "\\UFFFFFFFF"',
    ],
    ids=["self", "bomb", "deep", "list", "numbers", "object", "broken", "long", "control", "surrogate", "int", "bool", "timestamp", "chr"],
)
def test_hostile_text_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        parse("train.yaml", text)


def test_a_fault_of_ones_own_is_not_blamed_on_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.yaml_text._size", lambda node: 0)  # one argument where three are given
    with pytest.raises(TypeError):
        parse("train.yaml", "a: 1")


def test_aliases_and_merge_keys_are_read() -> None:
    assert parse("a.yaml", "base: &b {r: 8}\nother: {<<: *b, n: 1}") == {"base": {"r": 8}, "other": {"r": 8, "n": 1}}


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"base_model": "-"}, Format.AXOLOTL),
        ({"model_name_or_path": "-", "template": "llama3", "lora_dropout": 0.1, "packing": True}, Format.LLAMA_FACTORY),
        ({"model_name_or_path": "-", "dataset_name": "-", "output_dir": "-"}, Format.TRL),
        ({"model_name_or_path": "-", "output_dir": "-"}, Format.TRANSFORMERS),
        ({"peft_type": "LORA", "r": 8}, Format.ADAPTER_CONFIG),
        ({"train_micro_batch_size_per_gpu": 1}, Format.DEEPSPEED),
        ({"distributed_type": "FSDP"}, Format.ACCELERATE),
        ({"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}, Format.FSDP),
        ({"model_type": "llama", "hidden_size": 8}, Format.MODEL_CONFIG),
        ({"model": "openai-community/gpt2", "load_in_4bit": True}, Format.REQUEST),
    ],
)
def test_a_file_is_known_by_its_keys(content: Json, kind: Format) -> None:
    assert format_of("file", yaml.safe_load(yaml.safe_dump(content))) is kind
