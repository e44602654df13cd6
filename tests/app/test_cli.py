"""The command line, as a process: what it prints and how it ends."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from app import examples
from app.catalogue import inspect_model
from app.cli import cli
from app.configuration import Configuration
from app.options import all_options
from app.request import HardwareFields, InferenceFields, PeftFields, PlanRequest, QuantizationFields, TrainingFields
from app.terminal import escape, print_inspection
from estimator.errors import RequestError

MODEL = "meta-llama/Llama-3.1-8B"
QLORA = (
    "--load-in-4bit",
    "--bnb-4bit-quant-type",
    "nf4",
    "--bnb-4bit-use-double-quant",
    "--bnb-4bit-compute-dtype",
    "bfloat16",
    "--dtype",
    "bfloat16",
    "--lora-r",
    "16",
    "--lora-alpha",
    "32",
    "--lora-dropout",
    "0.05",
    "--target-modules",
    "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    "--prepare-model-for-kbit-training",
    "--per-device-train-batch-size",
    "4",
    "--gradient-accumulation-steps",
    "4",
    "--max-length",
    "2048",
    "--optim",
    "paged_adamw_8bit",
    "--bf16",
    "--gradient-checkpointing",
    "--gpu",
    "rtx4090",
)


def run(*arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from app.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, check=False)


def test_options_ask_the_same_question_as_the_request() -> None:
    by_options = run("estimate", MODEL, *QLORA, "--json")
    by_request = run("estimate", "--request", "-", "--json", stdin=json.dumps(examples.QLORA))
    assert json.loads(by_options.stdout) == json.loads(by_request.stdout)


def test_the_default_output_is_verdict_table_and_warnings() -> None:
    done = run("estimate", MODEL, *QLORA)
    first, *rest = done.stdout.splitlines()
    assert "rtx4090" in first
    assert any(line.startswith("quantization_state") for line in rest)
    assert any(line.startswith("allocated") for line in rest)
    assert any("merge_needs_dequantized_copy" in line for line in rest)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--max-length", "512", "--gpu", "a100-80"),
            "full training of bfloat16 weights, batch 8 × 512 tokens, adamw_torch_fused, no autocast, no gradient checkpointing, "
            "sdpa attention.",
        ),
        (
            QLORA,
            "LoRA r = 16 on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj over double-quantized nf4 weights, "
            "prepare_model_for_kbit_training, batch 4 × 2,048 tokens × 4 steps, paged_adamw_8bit, bf16, gradient checkpointing, "
            "sdpa attention.",
        ),
        (
            ("--load-in-8bit", "--batch-size", "1", "--prompt-length", "1000", "--max-new-tokens", "50"),
            "generation from int8 weights, 1 × 1,000 + 50 tokens, dynamic cache, sdpa attention.",
        ),
        ((), "the load of bfloat16 weights alone."),
    ],
)
def test_an_answer_says_what_was_estimated_defaults_included(arguments: tuple[str, ...], said: str) -> None:
    assert f"Estimated: {said}" in " ".join(run("estimate", MODEL, *arguments).stdout.split())


def test_what_would_be_refused_says_so_in_its_first_line() -> None:
    fp16 = ("--dtype", "float16", "--fp16", "--per-device-train-batch-size", "1", "--max-length", "512")
    done = run("estimate", "openai-community/gpt2", *fp16, "--gpu", "t4")
    assert done.stdout.startswith("Fits on t4, but would not run as it stands (fp16_gradients_refused):")


def test_without_closed_forms_of_a_step_the_load_alone_is_said_to_be_known() -> None:
    generating = ("--batch-size", "1", "--prompt-length", "10", "--max-new-tokens", "5", "--attn-implementation", "eager")
    done = " ".join(run("estimate", "tiiuae/falcon-7b", *generating).stdout.split())
    assert "the step of this model is not modelled" in done
    assert "; the load alone is known" in done


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("estimate", "openai-community/gpt2"), 0),
        (("estimate", "openai-community/gpt2", "--gpu", "rtx4090"), 0),
        (("estimate", "meta-llama/Llama-3.1-70B", "--gpu", "rtx4090"), 3),
        (("estimate", "openai-community/gpt2", "--gpu", "abacus"), 1),
        (("estimate", "openai-community/gpt2", "--max-length", "0"), 1),
        (("estimate", "--request", "/nowhere/request.json"), 1),
        (("estimate", "/nowhere/config.json"), 1),
        (("estimate",), 2),
        (("estimate", "openai-community/gpt2", "--nonsense"), 2),
        (("estimate", "openai-community/gpt2", "--max-length", "long"), 2),
        (("models", "pythia"), 0),
        (("gpus",), 0),
        (("inspect", "openai-community/gpt2"), 0),
    ],
)
def test_the_exit_code_says_how_it_went(arguments: tuple[str, ...], code: int) -> None:
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert (done.stderr == "") == (code in (0, 3))


def test_an_error_names_the_field() -> None:
    assert "hardware.gpu: 'abacus' is not known" in run("estimate", "openai-community/gpt2", "--gpu", "abacus").stderr


def test_an_error_about_the_optimizer_names_field_value_and_what_is_accepted() -> None:
    named = run("estimate", "openai-community/gpt2", "--max-length", "8", "--optim", "lomo")
    assert named.stderr.startswith(
        "error: training.optim: 'lomo' is not modelled, because lomo_optim is no dependency; accepted: adafactor, "
    )
    request = '{"model": "openai-community/gpt2", "training": {"max_length": 8, "optim": "sgd", "optim_args": "momentum=x"}}'
    piped = run("estimate", "--request", "-", stdin=request)
    assert piped.stderr.startswith("error: training.optim_args: momentum='x' is not accepted; expected a number from 0 on")
    assert (named.returncode, piped.returncode) == (1, 1)


def test_a_request_may_be_yaml(tmp_path: Path) -> None:
    file = tmp_path / "request.yaml"
    file.write_text("model: openai-community/gpt2\ntraining:\n  max_length: 128\n  per_device_train_batch_size: 2\n")
    result = json.loads(run("estimate", "--request", str(file), "--json").stdout)
    assert result["recipe"]["training"]["max_length"] == 128


def test_options_override_the_request(tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    file.write_text(json.dumps(examples.QLORA))
    result = json.loads(run("estimate", "--request", str(file), "--max-length", "256", "--gpu", "a100-80", "--json").stdout)
    assert result["recipe"]["training"]["max_length"] == 256
    assert result["recipe"]["training"]["per_device_train_batch_size"] == 4
    assert result["fit"]["gpu"] == "a100-80"


def test_a_plan_can_be_asked_for() -> None:
    done = run("plan", MODEL, *QLORA, "--gpu", "a100-80", "--global-batch-size", "16", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["plan"]["global_batch_size"] == 16


def test_every_option_sets_a_field_of_the_request() -> None:
    sections: dict[str, Any] = {
        "quantization": QuantizationFields,
        "training": TrainingFields,
        "inference": InferenceFields,
        "hardware": HardwareFields,
        "peft": PeftFields,
    }
    inert = {"peft.lora_alpha"}
    for option in all_options():
        section, _, name = option.path.partition(".")
        known = set(sections[section].model_fields) if name else set(PlanRequest.model_fields)
        assert (name.partition(".")[0] or section) in known or option.path in inert


def test_an_estimate_of_a_catalogue_model_imports_no_framework_and_no_web_server() -> None:
    program = (
        "import sys; from app.cli import cli; "
        f"cli(['estimate', {MODEL!r}, *{QLORA!r}], standalone_mode=False); "
        "assert not {'torch', 'transformers', 'numpy', 'fastapi', 'uvicorn'} & set(sys.modules), 'heavy import'; "
        "assert not {'yaml', 'logging', 'estimator.sources.hub', 'estimator.timeline', 'estimator.fitted', 'estimator.parallelism.fsdp'} "
        "& set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "heavy import" not in done.stderr
    assert "Error" not in done.stderr, done.stderr


def test_a_command_is_built_without_the_others_and_all_of_them_are_listed() -> None:
    group: Any = typer.main.get_command(cli)
    context = group.make_context("vramplan", ["check"])
    assert group.get_command(context, "check").name == "check"
    assert set(group.commands) == {"check"}
    listed = run("--help").stdout
    assert all(f" {name} " in listed for name in group.list_commands(context))
    assert group.list_commands(context)[0] == "estimate"


def test_a_misspelt_command_is_told_what_was_meant() -> None:
    assert "Did you mean 'estimate'" in " ".join(run("estimat").stderr.replace("│", " ").split())


@pytest.mark.parametrize(("arguments", "seen"), [(["models", "--json"], "False __all__"), (["serve"], "True None")])
def test_a_question_hurries_and_a_service_collects_garbage_and_has_plugins(arguments: list[str], seen: str) -> None:
    program = """if True:
        import gc, os, app.catalogue, app.cli, app.serving
        def tell(*_):
            print(gc.isenabled(), os.environ.get("PYDANTIC_DISABLE_PLUGINS"))
            return []
        app.catalogue.list_models = app.serving.serve_on = tell
        app.cli.main()
    """
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == seen


def test_gpus_are_filtered_and_sorted() -> None:
    found = json.loads(run("gpus", "--filter", "24GB..80GB runpod", "--bf16", "--sort", "memory", "--json").stdout)
    assert {"rtx4090", "a100-80"} <= {gpu["id"] for gpu in found}
    assert [gpu["capacity_bytes"] for gpu in found] == sorted(gpu["capacity_bytes"] for gpu in found)
    done = run("gpus", "--filter", "abacus")
    assert done.returncode == 1
    assert "'abacus' is not known" in done.stderr


def test_what_nvidia_smi_printed_is_read_from_a_file_or_standard_input(tmp_path: Path) -> None:
    paste = "NVIDIA L4, 23034 MiB, 22600 MiB\n"
    file = tmp_path / "smi.txt"
    file.write_text(paste)
    from_file = run("estimate", "openai-community/gpt2", "--nvidia-smi", str(file), "--json")
    from_input = run("estimate", "openai-community/gpt2", "--nvidia-smi", "-", "--json", stdin=paste)
    assert json.loads(from_file.stdout)["fit"]["gpu"] == "l4"
    assert from_file.stdout == from_input.stdout
    assert run("estimate", "openai-community/gpt2", "--nvidia-smi", "/nowhere").returncode == 1


def test_prices_that_cannot_be_fetched_are_an_error_and_change_nothing(tmp_path: Path) -> None:
    out = tmp_path / "offers.json"
    out.write_text("before")
    code = "import sys; sys.modules['gpuhunt'] = None; from app.cli import main; main()"
    command = [sys.executable, "-c", code, "gpus", "--refresh-prices", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "vramplan[prices]" in done.stderr
    assert out.read_text() == "before"


def test_which_lists_cards_whatever_card_the_request_names() -> None:
    shown = run("which", "--request", "-", "--filter", "24GB 1", stdin=json.dumps(examples.QLORA))
    assert shown.returncode == 0, shown.stderr
    assert "rtx3090" in shown.stdout
    nowhere = run("which", "--request", "-", "--filter", "..8GB 1", "--json", stdin=json.dumps(examples.QLORA))
    assert nowhere.returncode == 3
    assert {row["verdict"] for row in json.loads(nowhere.stdout)["gpus"]} == {"does_not_fit"}


def test_a_sweep_writes_table_and_picture(tmp_path: Path) -> None:
    table, picture = tmp_path / "sweep.csv", tmp_path / "sweep.svg"
    options = ("--batches", "1..4", "--lengths", "512,1024", "--ranks", "8", "--csv", str(table), "--svg", str(picture))
    shown = run("sweep", "--request", "-", *options, stdin=json.dumps(examples.QLORA))
    assert shown.returncode == 0, shown.stderr
    assert "largest batch that fits" in shown.stdout
    assert len(table.read_text().splitlines()) == 9
    assert picture.read_text().startswith("<svg ")


@pytest.mark.parametrize("command", ["estimate", "plan", "check"])
def test_a_key_that_stands_twice_is_refused_by_its_name(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--request", "-"], input='{"model": "gpt2", "dtype": "bfloat16", "dtype": "float32"}')
    assert isinstance(result.exception, RequestError)
    assert "dtype: is given twice" in result.exception.message


def test_a_request_on_standard_input_may_be_yaml() -> None:
    request = "model: openai-community/gpt2\ndtype: bfloat16\n"
    result = CliRunner().invoke(cli, ["estimate", "--request", "-", "--json"], input=request)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"]["id"] == "openai-community/gpt2"


def test_what_files_of_strangers_are_called_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    file = tmp_path / "train.yml"
    file.write_text(
        "base_model: openai-community/gpt2\nsequence_len: 64\nmicro_batch_size: 1\n"
        '"[red]x[/red][link=http://evil.example]y[/link]\\e]0;title\\a": 1\n'
    )
    result = CliRunner().invoke(cli, ["estimate", str(file)], color=True)
    assert result.exit_code == 0, result.output
    assert "[red]x[/red][link=http://evil.example]y[/link]?]0;title?" in "".join(result.output.split())
    assert "\x1b]" not in result.output
    assert "\x07" not in result.output


def test_names_of_strangers_in_tables_are_shown_and_not_obeyed() -> None:
    found = inspect_model("openai-community/gpt2")
    found["model_class"] = "\x1b]0;title\x07[red]x[/red]"
    found["tensors"] = [{**found["tensors"][0], "name": "\x1b[31mweight[/bold]", "module_class": "\x9b2J"}]
    out = io.StringIO()
    print_inspection(Console(file=out, color_system=None, width=200), found)
    assert "?]0;title?[red]x[/red]" in out.getvalue()
    assert "?[31mweight[/bold]" in out.getvalue()
    assert escape("/data/hf_cache/someone/hf_llama-7b") == "/data/hf_cache/someone/hf_llama-7b"
    assert "a1B2c3D4" not in escape("hf_a1B2c3D4e5F6g7H8i9J0")
    assert not {"\x1b", "\x07", "\x9b"} & set(out.getvalue())


def test_a_service_on_a_loopback_address_answers_under_its_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a stranger whose name is made to point to this machine asks under that name."""
    served: list[tuple[str, int]] = []
    monkeypatch.setattr("uvicorn.run", lambda _, *, host, port, **__: served.append((host, port)))
    monkeypatch.setattr("app.serving.configure", lambda *_: None)
    monkeypatch.setenv("VRAMPLAN_ALLOWED_HOSTS", "")  # put back afterwards
    monkeypatch.delenv("VRAMPLAN_ALLOWED_HOSTS")
    result = CliRunner().invoke(cli, ["serve"])
    assert result.exit_code == 0, result.output
    assert served == [("127.0.0.1", 8000)]
    assert Configuration.of_environment().allowed_hosts == ("127.0.0.1", "[::1]", "localhost")
