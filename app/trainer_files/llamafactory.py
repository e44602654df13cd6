"""A YAML of LLaMA-Factory, as its parser, loader and trainer read it.

Source: LLaMA-Factory 0.9.5; files and functions are named where a fact is used.
"""

from collections.abc import Mapping

from app.trainer_files import llamafactory_fields as known
from app.trainer_files.translation import Keys
from app.trainer_files.trl import translate_arguments
from estimator.errors import RequestError
from estimator.recipe import Attention

_TRAINER = "LLaMA-Factory"
# Source: extras/constants.py, AttentionFunction; model/model_utils/attention.py, configure_attn_implementation.
_ATTENTION = {
    "auto": None,
    "disabled": Attention.EAGER.value,
    "sdpa": Attention.SDPA.value,
    "fa2": Attention.FLASH_ATTENTION_2.value,
    "fa3": Attention.FLASH_ATTENTION_3.value,
}
_DEFAULT_LENGTH = 2048
# Source: train/sft/workflow.py, run_sft (pad_to_multiple_of).
_PAD_TO = 8


def translate(keys: Keys, others: Mapping[str, Keys]) -> None:
    """Put a training file into the request.

    Args:
        keys: of the file.
        others: further files by the names under which this one may point to them.

    Raises:
        RequestError: for a run that is not modelled, or a value that LLaMA-Factory would refuse.
    """
    keys.put("model", keys.text("model_name_or_path"), "model_name_or_path")
    revision = keys.text("model_revision")
    keys.put("revision", revision if revision != "main" else None, "model_revision")
    keys.found.put("trainer", "transformers", keys.named("model_name_or_path"))
    stage = keys.one_of("stage", ("sft", "pt"), "sft")
    kind = keys.one_of("finetuning_type", ("lora", "full"), "lora")
    checkpointing = keys.values.get("gradient_checkpointing")
    keys.taken.add("gradient_checkpointing")
    translate_arguments(_only_training(keys), others)
    _weights(keys, full=kind == "full")
    attention = _attention(keys)
    if kind == "lora":
        _lora(keys)
    _quantization(keys)
    _checkpointing(keys, also=checkpointing is True)
    _batches(keys, attention, pretrains=stage == "pt")
    if keys.flag("enable_liger_kernel"):
        keys.put("training.use_liger_kernel", True, "enable_liger_kernel")
    keys.rest(inert=known.INERT, unmodelled=known.UNMODELLED, trainer=_TRAINER, refuses_unknown=True, known=known.KNOWN)


def _only_training(keys: Keys) -> Keys:
    """The fields of TrainingArguments alone: others of that name mean something else here."""
    values = {
        key: value for key, value in keys.values.items() if key in known.TRAINING and key not in known.INERT and key not in keys.taken
    }
    keys.taken.update(values)
    return Keys(file=keys.file, values=values, found=keys.found)


def _weights(keys: Keys, *, full: bool) -> None:
    """Weights are loaded as the checkpoint has them; those that are trained become float32, but under pure_bf16 and ZeRO.

    Source: model/loader.py, load_model; model/adapter.py, init_adapter; deepspeed, runtime/engine.py, _configure_distributed_model.
    """
    pure, strategy = keys.flag("pure_bf16"), str(keys.found.value("hardware.strategy"))
    half = "bfloat16" if keys.found.value("training.bf16") else "float16" if keys.found.value("training.fp16") else None
    dtype = "auto"
    if full and not pure and strategy != "zero3":
        dtype = half if strategy.startswith("zero") and half else "float32"
    keys.put("dtype", dtype, "pure_bf16" if pure else "finetuning_type")
    keys.found.put("prepare_model_for_kbit_training", False, keys.named("finetuning_type"))


def _attention(keys: Keys) -> str | None:
    name = _ATTENTION[keys.one_of("flash_attn", _ATTENTION, "auto") or "auto"]
    keys.put("attn_implementation", name, "flash_attn")
    return name


def _lora(keys: Keys) -> None:
    """Source: hparams/finetuning_args.py, LoraArguments; model/adapter.py, _setup_lora_tuning; model/model_utils/misc.py,
    find_all_linear_modules.
    """
    keys.put("peft.r", keys.integer("lora_rank", 8), "lora_rank")
    keys.put("peft.lora_dropout", float(keys.number("lora_dropout", 0.0) or 0.0), "lora_dropout")
    target = keys.names("lora_target", split=True) or ["all"]
    keys.put("peft.target_modules", "all-linear" if target == ["all"] else target, "lora_target")
    keys.put("peft.modules_to_save", keys.names("additional_target", split=True), "additional_target")
    keys.put("peft.use_dora", keys.flag("use_dora"), "use_dora")
    keys.put("peft.use_rslora", keys.flag("use_rslora"), "use_rslora")
    # Source: hparams/parser.py, get_train_args (ddp_find_unused_parameters).
    if keys.found.value("hardware.ddp.find_unused_parameters") is None:
        keys.found.put("hardware.ddp.find_unused_parameters", False, keys.named("finetuning_type"))


def _quantization(keys: Keys) -> None:
    """Source: model/model_utils/quantization.py, configure_quantization; extras/misc.py, infer_optim_dtype."""
    bits = keys.integer("quantization_bit")
    keys.one_of("quantization_method", ("bnb", "bitsandbytes"), "bnb")
    kind = keys.one_of("quantization_type", ("nf4", "fp4"), "nf4")
    double = keys.flag("double_quantization", default=True)
    if bits is None:
        return
    if bits not in (4, 8):
        raise keys.error("quantization_bit", bits, "4 or 8")
    if "peft" not in keys.found.payload:
        raise RequestError(
            f"{keys.named('quantization_bit')}: needs finetuning_type: lora; accepted: null", field=keys.named("quantization_bit")
        )
    if bits == 8:
        keys.put("quantization.load_in_8bit", True, "quantization_bit")
        return
    half = "float16" if keys.found.value("training.fp16") else "bfloat16"
    if not any(keys.found.value(f"training.{name}") for name in ("bf16", "fp16")) and not keys.flag("pure_bf16"):
        keys.found.assumed.append(
            f"{keys.named('quantization_bit')}: without bf16 or fp16 the compute type follows the checkpoint; bfloat16 is taken."
        )
    for name, value in (
        ("load_in_4bit", True),
        ("bnb_4bit_quant_type", kind),
        ("bnb_4bit_use_double_quant", double),
        ("bnb_4bit_compute_dtype", half),
        ("bnb_4bit_quant_storage", half),
    ):
        keys.put(f"quantization.{name}", value, "quantization_bit")


def _checkpointing(keys: Keys, *, also: bool) -> None:
    """It is on unless it is switched off; the Trainer's own switch turns it on as well.

    Source: model/model_utils/checkpointing.py, prepare_model_for_training.
    """
    off, reentrant = keys.flag("disable_gradient_checkpointing"), keys.flag("use_reentrant_gc", default=True)
    if keys.found.value("training.gradient_checkpointing"):
        return  # FSDP checkpoints by itself
    on = also or not off
    keys.put("training.gradient_checkpointing", on, "disable_gradient_checkpointing")
    if on and keys.found.value("training.gradient_checkpointing_kwargs") is None:
        reentrant = reentrant and keys.found.value("hardware.strategy") != "fsdp"
        keys.put("training.gradient_checkpointing_kwargs.use_reentrant", reentrant, "use_reentrant_gc")


def _batches(keys: Keys, attention: str | None, *, pretrains: bool) -> None:
    """In fine-tuning packed rows hold one token more than asked, and all rows are filled to a multiple of 8; not so in pre-training.

    Source: hparams/parser.py, get_train_args; hparams/data_args.py, DataArguments; data/processor/supervised.py,
    PackedSupervisedDatasetProcessor; data/processor/pretrain.py; data/collator.py, SFTDataCollatorWith4DAttentionMask;
    train/sft/workflow.py and train/pt/workflow.py.
    """
    neat = keys.flag("neat_packing")
    packs = keys.flag("packing", default=pretrains) or neat
    length = keys.integer("cutoff_len", _DEFAULT_LENGTH) or _DEFAULT_LENGTH
    batch = keys.found.value("training.per_device_train_batch_size")
    several = not isinstance(batch, int) or batch > 1  # TrainingArguments has 8
    if pretrains:
        keys.put("training.max_length", length, "cutoff_len")
        keys.put("padded", several and not packs, "packing")
        return
    length += packs
    keys.put("training.max_length", length, "cutoff_len")
    if neat and attention == Attention.FLASH_ATTENTION_2:
        keys.put("training.padding_free", True, "neat_packing")
        return
    keys.found.put("training.pad_to_multiple_of", _PAD_TO, keys.named("cutoff_len"))
    keys.put("padded", neat or not packs or length % _PAD_TO != 0, "packing" if packs else "cutoff_len")
