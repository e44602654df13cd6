"""Command-line options, one row each: named like the libraries' arguments, and the field of the request that each one sets."""

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from app.answer import Json
from estimator.errors import RequestError
from estimator.nvidia_smi import MAX_CHARACTERS
from estimator.sources.configfile import read as read_config

Kind = Literal["str", "int", "float", "flag", "names", "file"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option and where its value goes."""

    path: str
    """Field of the request: `training.max_length`."""
    kind: Kind
    help: str
    flags: tuple[str, ...] = ()
    """Spellings beside the field's own."""

    @property
    def parameter(self) -> str:
        return self.path.replace(".", "__")

    @property
    def declarations(self) -> tuple[str, ...]:
        own = "--" + self.path.rpartition(".")[2].replace("_", "-")
        spellings = (own, *self.flags)
        return (f"{own}/--no-{own[2:]}", *self.flags) if self.kind == "flag" else spellings


_MODEL = "Model"
_QUANTIZATION = "Quantization (BitsAndBytesConfig)"
_PEFT = "Adapter (LoraConfig)"
_TRAINING = "Training (TrainingArguments, SFTConfig)"
_INFERENCE = "Inference (generate)"
_HARDWARE = "Hardware"


def _option(path: str, kind: Kind, text: str, *flags: str) -> Option:
    return Option(path=path, kind=kind, help=text, flags=flags)


OPTIONS: dict[str, tuple[Option, ...]] = {
    _MODEL: (
        _option("revision", "str", "branch, tag or commit of a Hub model"),
        _option("dtype", "str", "bfloat16, float16, float32 or auto", "--torch-dtype"),
        _option("attn_implementation", "str", "eager, sdpa, flash_attention_2, …"),
    ),
    _QUANTIZATION: (
        _option("quantization.load_in_4bit", "flag", "4-bit base weights"),
        _option("quantization.load_in_8bit", "flag", "LLM.int8 base weights"),
        _option("quantization.bnb_4bit_quant_type", "str", "nf4 or fp4"),
        _option("quantization.bnb_4bit_use_double_quant", "flag", "quantize the quantization constants"),
        _option("quantization.bnb_4bit_compute_dtype", "str", "bfloat16, float16 or float32"),
        _option("quantization.bnb_4bit_quant_storage", "str", "storage type of packed weights"),
        _option("quantization.llm_int8_skip_modules", "names", "modules to leave alone, comma-separated"),
    ),
    _PEFT: (
        _option("peft.r", "int", "rank", "--lora-r"),
        _option("peft.lora_alpha", "int", "no bearing on memory"),
        _option("peft.lora_dropout", "float", "dropout before the adapter"),
        _option("peft.target_modules", "names", "comma-separated names, all-linear, or a regular expression"),
        _option("peft.modules_to_save", "names", "modules trained in full, comma-separated"),
        _option("peft.use_dora", "flag", "DoRA"),
        _option("peft.use_rslora", "flag", "rsLoRA"),
        _option("peft.bias", "str", "none, all or lora_only"),
        _option("prepare_model_for_kbit_training", "flag", "whether the script calls it"),
    ),
    _TRAINING: (
        _option("trainer", "str", "transformers or trl"),
        _option("training.per_device_train_batch_size", "int", "micro-batch"),
        _option("training.gradient_accumulation_steps", "int", "micro-batches per step"),
        _option("training.max_length", "int", "tokens per sample, as really trained", "--max-seq-length"),
        _option("training.optim", "str", "adamw_torch_fused, paged_adamw_8bit, …"),
        _option("training.weight_decay", "float", "above 0 some optimizers copy the gradients: sgd, rmsprop, adagrad"),
        _option("training.bf16", "flag", "bfloat16 autocast"),
        _option("training.fp16", "flag", "float16 autocast"),
        _option("training.gradient_checkpointing", "flag", "recompute activations in the backward pass"),
        _option("training.gradient_checkpointing_kwargs.use_reentrant", "flag", "variant of checkpointing"),
        _option("training.use_liger_kernel", "flag", "Liger's fused loss"),
        _option("training.loss_type", "str", "SFTConfig's loss"),
        _option("training.packing", "flag", "SFTConfig: samples packed to max_length"),
        _option("training.padding_free", "flag", "SFTConfig: samples end to end in one row"),
        _option("padded", "flag", "batches carry padding"),
    ),
    _INFERENCE: (
        _option("inference.batch_size", "int", "sequences at once"),
        _option("inference.prompt_length", "int", "tokens of the prompt"),
        _option("inference.max_new_tokens", "int", "tokens to generate"),
        _option("inference.cache_implementation", "str", "dynamic or static"),
    ),
    _HARDWARE: (
        _option("hardware.gpu", "str", "rtx4090, a100-80, t4, …; see `vramplan gpus`"),
        _option("hardware.capacity_gib", "float", "capacity in GiB as CUDA reports it"),
        _option("pytorch_cuda_alloc_conf", "str", "PYTORCH_CUDA_ALLOC_CONF of the run", "--alloc-conf"),
        _option("hardware.headroom", "str", "what is kept free: 512MiB, or 5%"),
        _option("hardware.nvidia_smi", "file", "what nvidia-smi printed, from a file; - for standard input"),
        _option("hardware.num_gpus", "int", "how many of them"),
        _option("hardware.strategy", "str", "single, ddp, zero1, zero2, zero3, fsdp, device_map or tensor_parallel"),
        _option("stack", "names", "versions to answer for: transformers=4.57,trl=0.25"),
        _option("engine", "str", "auto, analytic or trace"),
    ),
}

PLAN_OPTIONS: dict[str, tuple[Option, ...]] = {
    "Plan": (
        _option("global_batch_size", "int", "samples per optimizer step; absent = as large as fits"),
        _option("objective", "str", "largest_micro_batch, longest_sequence or most_margin"),
        _option("policy", "str", "cache_kept, or cache_given_back: a larger batch, that runs because the allocator gives its cache back"),
        _option("hardware.filter", "str", "cards to choose from, instead of one: '24GB..80GB bf16'"),
        _option("sort", "str", "of the cards: price, margin, batch, length, memory, speed or cost"),
        _option("epoch_tokens", "int", "tokens of an epoch, for what one costs"),
        _option("confirm", "flag", "replay the allocator for the first cards of the list; without, what it caches is modelled"),
    ),
}

FILE_SUFFIXES = (".yaml", ".yml", ".json")
"""Of files with settings."""

_TYPES: dict[Kind, type] = {"str": str, "int": int, "float": float, "flag": bool, "names": str, "file": str}


def with_options(
    command: Callable[[str | None, str | None, bool, Json], None], *panels: dict[str, tuple[Option, ...]]
) -> Callable[..., None]:
    """A Typer command with MODEL, `--request`, `--json` and every option of the panels; it passes the request on as one mapping.

    Options of the command's own stand beside them.
    """
    options = {option.parameter: (panel, option) for table in panels for panel, group in table.items() for option in group}

    own = [p for p in inspect.signature(command).parameters.values() if p.name not in ("model", "request", "as_json", "options")]

    def called(models: list[str] | None, request: str | None, as_json: bool, **values: Any) -> None:
        extra = {p.name: values.pop(p.name) for p in own}
        given = {options[name][1].path: value for name, value in values.items() if value is not None}
        model, files = _models_and_files(models or [])
        payload = _nested(given, {o.path: o for _, o in options.values()})
        command(model, request, as_json, payload | ({"files": files} if files else {}), **extra)

    parameters = [
        _parameter(
            "models",
            list[str],
            typer.Argument(
                metavar="[MODEL] [FILE]...",
                help="catalogue or Hub id, or path of a config.json; files of axolotl, LLaMA-Factory, TRL, DeepSpeed, accelerate, PEFT",
                show_default=False,
            ),
        ),
        _parameter(
            "request", str, typer.Option("--request", "-f", help="a JSON or YAML request, - for standard input", show_default=False)
        ),
        _parameter("as_json", bool, typer.Option("--json", help="print the answer as JSON"), default=False),
        *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own),
        *(
            _parameter(
                name, _TYPES[option.kind], typer.Option(*option.declarations, help=option.help, rich_help_panel=panel, show_default=False)
            )
            for name, (panel, option) in options.items()
        ),
    ]
    called.__doc__ = command.__doc__
    called.__name__ = command.__name__
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _models_and_files(arguments: list[str]) -> tuple[str | None, list[Json]]:
    files: list[Json] = []
    models = arguments
    if any(Path(argument).suffix.lower() in FILE_SUFFIXES for argument in arguments):
        from app.trainer_files.disk import gathered, is_file

        models = [argument for argument in arguments if not is_file(argument)]
        files = gathered(argument for argument in arguments if argument not in models)
    if len(models) > 1:
        raise typer.BadParameter(f"{models[1]!r} is a second model, or not a file that is read; accepted: one model, and files")
    return models[0] if models else None, files


def _parameter(name: str, kind: type, declaration: Any, default: object = None) -> inspect.Parameter:
    annotation = Annotated[kind if default is not None else kind | None, declaration]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _nested(given: Json, options: dict[str, Option]) -> Json:
    payload: Json = {}
    for path, value in given.items():
        *sections, name = path.split(".")
        target = payload
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = _value(path, options[path].kind, value)
    return payload


def _value(path: str, kind: Kind, value: Any) -> Any:
    if path == "stack":
        return versions_of(value)
    return names_of(value) if kind == "names" else _content(path, value) if kind == "file" else value


def _content(field: str, path: str) -> str:
    try:
        content = sys.stdin.buffer.read(MAX_CHARACTERS + 1) if path == "-" else Path(path).read_bytes()[: MAX_CHARACTERS + 1]
    except OSError as error:
        raise RequestError(f"{field}: {path!r} cannot be read: {error.strerror}", field=field) from None
    return content.decode("utf-8", errors="replace")


def names_of(text: str) -> list[str] | str:
    """Comma-separated names as a list; `all-linear` and regular expressions as they are."""
    if text == "all-linear" or any(c in text for c in r"*+(|\[^$"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def versions_of(text: str) -> dict[str, str]:
    """`transformers=4.57,trl=0.25` as versions by library.

    Raises:
        RequestError: if it is written otherwise.
    """
    versions = {}
    for part in text.split(","):
        name, equals, version = part.partition("=")
        if not equals:
            raise RequestError(f"stack: {part!r} is not accepted; expected name=version,name=version", field="stack")
        versions[name.strip()] = version.strip()
    return versions


def model_argument(model: str) -> str | Json:
    """An id, or the content of the config.json that a path points to."""
    path = Path(model)
    if path.suffix != ".json" and not (path.is_dir() and (path / "config.json").is_file()):
        return model
    return {"config": dict(read_config(path / "config.json" if path.is_dir() else path))}


# Ways to name a card, of which a request has one.
_CARDS = frozenset(("gpu", "capacity_gib", "nvidia_smi"))


def merged(base: Json, over: Json) -> Json:
    """`base` with the fields of `over` set on top, section by section; a card that is named one way replaces one named another way."""
    result = {key: value for key, value in base.items() if key not in _CARDS or not _CARDS & over.keys()}
    for key, value in over.items():
        known = result.get(key)
        result[key] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return result


def all_options() -> Iterable[Option]:
    """Every option, for tests."""
    return (option for table in (OPTIONS, PLAN_OPTIONS) for group in table.values() for option in group)
