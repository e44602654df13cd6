"""Ways to train that people name, as edits of the form: the method's fields are set, model, card and sizes stay."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson

from app import examples
from app.answer import Json
from app.form import EXTRA, Form, fields
from estimator.errors import RequestError, UnknownNameError
from estimator.gpus import find_gpu

# What says how big the run is, and survives a change of method.
_SIZES = frozenset(("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"))
_SECTIONS = ("quantization.", "peft.", "training.", "inference.")
_METHOD = frozenset(("prepare_model_for_kbit_training", "padded"))
_BATCH = {"per_device_train_batch_size": "1", "gradient_accumulation_steps": "16", "max_length": "2048"}
_ADAPTER = {"r": "16", "target_modules": "all-linear"}
_CHECKPOINTING = {"gradient_checkpointing": "true"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One method."""

    label: str
    help: str
    sets: Mapping[str, str]
    keeps_adapter: bool = False
    """Whether rank and targets of the form stay."""
    is_training: bool = True
    half: tuple[str, ...] = field(default=("dtype",))
    """Fields that take the card's own 16-bit type."""


PRESETS: Mapping[str, Preset] = {
    "qlora": Preset(
        label="QLoRA",
        help="an adapter on 4-bit base weights",
        keeps_adapter=True,
        half=("dtype", "bnb_4bit_compute_dtype"),
        sets={
            "load_in_4bit": "true", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": "true",
            "prepare_model_for_kbit_training": "true", "optim": "paged_adamw_8bit", **_CHECKPOINTING,
        },
    ),
    "lora": Preset(label="LoRA", help="an adapter on 16-bit base weights", keeps_adapter=True, sets=_CHECKPOINTING),
    "int8": Preset(
        label="LoRA, int8",
        help="an adapter on 8-bit base weights",
        keeps_adapter=True,
        sets={"load_in_8bit": "true", "prepare_model_for_kbit_training": "true", **_CHECKPOINTING},
    ),
    "full": Preset(label="Full", help="every weight is trained", sets=_CHECKPOINTING),
    "inference": Preset(
        label="Generate",
        help="prompts in, tokens out",
        is_training=False,
        sets={"batch_size": "1", "prompt_length": "768", "max_new_tokens": "256"},
    ),
    "load": Preset(label="Load only", help="the weights alone", is_training=False, sets={}),
}  # fmt: skip


def first() -> Form:
    """What stands in the form of a first visit."""
    return Form.of(examples.QLORA).edited(lora_alpha="", lora_dropout="", target_modules="all-linear")


def applied_to(form: Form, name: str) -> Form:
    """The form with a preset's method.

    Raises:
        RequestError: if there is no such preset, or `extra` cannot be read.
    """
    if name not in PRESETS:
        raise UnknownNameError.of("preset", name, PRESETS)
    preset = PRESETS[name]
    kept = {key: text for key, text in form.values.items() if not _is_of_method(key, preset)}
    trained = {**_BATCH, **_precision(form)} if preset.is_training else {}
    adapter = _ADAPTER if preset.keeps_adapter else {}
    half = dict.fromkeys(preset.half, _half(form))
    extra = _without_method(form.further(), preset)
    cleared = {EXTRA: orjson.dumps(extra).decode() if extra else "", **({} if preset.is_training else {"trainer": ""})}
    return Form({**trained, **adapter, **kept, **half, **preset.sets}).edited(**cleared)


def method_of(form: Form) -> str | None:
    """The preset whose kind of run the form stands for; None while the form cannot be read."""
    try:
        request = form.request()
    except RequestError:
        return None
    if request.get("inference") is not None:
        return "inference"
    if request.get("training") is None:
        return "load"
    if request.get("peft") is None:
        return "full"
    quantization = request.get("quantization") or {}
    return "qlora" if quantization.get("load_in_4bit") else "int8" if quantization.get("load_in_8bit") else "lora"


def _without_method(extra: Json, preset: Preset) -> Json:
    kept = {"training"} if preset.is_training else set()
    kept |= {"peft"} if preset.keeps_adapter else set()
    return {name: value for name, value in extra.items() if name in kept or f"{name}." not in _SECTIONS}


def _is_of_method(name: str, preset: Preset) -> bool:
    if name not in fields():
        return False
    path = fields()[name].path
    if preset.is_training and name in _SIZES:
        return False
    if preset.keeps_adapter and path.startswith("peft."):
        return False
    return path.startswith(_SECTIONS) or path in _METHOD


def _half(form: Form) -> str:
    """bfloat16 where the card has it."""
    try:
        return "bfloat16" if not form["gpu"] or find_gpu(form["gpu"]).bf16 else "float16"
    except UnknownNameError:
        return "bfloat16"


def _precision(form: Form) -> Mapping[str, str]:
    return {"bf16": "true"} if _half(form) == "bfloat16" else {"fp16": "true"}
