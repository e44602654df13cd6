"""A training script: plain transformers, PEFT and TRL, without anything of ours."""

from typing import Any

from app.answer import Json
from app.trainer_files.written.subject import PLACEHOLDER, Subject
from app.trainer_files.written.trl import arguments
from estimator.recipe import Trainer

_HEADER = '''"""Written by vramplan. Learning rate, epochs, lora_alpha and the dataset have no bearing on memory: put in your own."""

import torch
from datasets import load_dataset
{imports}

MODEL = {model!r}
DATASET = {dataset!r}
MAX_LENGTH = {length}

'''
_MODEL = """
def model():
    loaded = AutoModelForCausalLM.from_pretrained(
        MODEL,
        {dtype_name}={dtype},
        attn_implementation={attention!r},{more}
    )
    {prepare}return loaded

"""
_SFT = """
def main():
    trainer = SFTTrainer(model=model(), args=arguments(), train_dataset=load_dataset(DATASET, split="train"){adapter})
    trainer.train()
    trainer.save_model()

"""
_TRAINER = """
def rows(tokenizer):
    dataset = load_dataset(DATASET, split="train")

    def tokenize(batch):
        return {tokenize}

    return dataset.map(tokenize, batched=True, remove_columns=dataset.column_names)


def main():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer = Trainer(
        model={model},
        args=arguments(),
        train_dataset=rows(tokenizer),
        data_collator={collator},
    )
    trainer.train()
    trainer.save_model()

"""
_CUT = '''
def cut(ids):
    """Text end to end, in rows of MAX_LENGTH tokens."""
    text = [token for sample in ids for token in sample]
    return {"input_ids": [text[i : i + MAX_LENGTH] for i in range(0, len(text) - MAX_LENGTH + 1, MAX_LENGTH)]}

'''
_END = """
if __name__ == "__main__":
    main()
"""


def script(subject: Subject) -> str:
    """The script.

    Raises:
        RequestError: for what it has no words for.
    """
    recipe, training = subject.recipe, subject.training
    sft = recipe.trainer is Trainer.TRL
    subject.refuse("trl", hardware__strategy=(recipe.parallel.strategy.value == "device_map", False))
    prepares = recipe.prepare_for_kbit_training and not (sft and recipe.stack.sft_prepares_for_kbit_training)
    given = {**arguments(subject), **({} if sft else {"remove_unused_columns": True})}
    text = _HEADER.format(
        imports=_imports(subject, prepares=prepares), model=subject.model, dataset=PLACEHOLDER, length=training.sequence_length
    )
    text += _quantization(subject) + _adapter(subject)
    given = {name: _Name("MAX_LENGTH") if name in ("max_length", "max_seq_length") else value for name, value in given.items()}
    text += f"\ndef arguments():\n    return {_call('SFTConfig' if sft else 'TrainingArguments', given)}\n\n"
    text += _model(subject, prepares=prepares)
    if sft:
        return text + _SFT.format(adapter=", peft_config=adapter()" if subject.adapter else "") + _END
    packs = not training.padded
    truncated = 'tokenizer(batch["text"], truncation=True, max_length=MAX_LENGTH)'
    tokenized = 'cut(tokenizer(batch["text"])["input_ids"])' if packs and not training.flattened else truncated
    collator = "DataCollatorWithFlattening()" if training.flattened else "DataCollatorForLanguageModeling(tokenizer, mlm=False)"
    wrapped = "get_peft_model(model(), adapter())" if subject.adapter else "model()"
    body = _TRAINER.format(tokenize=tokenized, model=wrapped, collator=collator)
    return text + (_CUT if packs and not training.flattened else "") + body + _END


class _Name(str):
    """A value that is written as code."""


def _value(value: Any) -> str:
    return str(value) if isinstance(value, _Name) else repr(value)


def _call(name: str, values: Json) -> str:
    """A call with one argument a line, in a function's body."""
    lines = "".join(f"        {key}={_value(value)},\n" for key, value in values.items())
    return f"{name}(\n{lines}    )"


def _imports(subject: Subject, *, prepares: bool) -> str:
    sft = subject.recipe.trainer is Trainer.TRL
    peft = [
        name for name, used in (("LoraConfig", True), ("get_peft_model", not sft), ("prepare_model_for_kbit_training", prepares)) if used
    ]
    transformers = ["AutoModelForCausalLM"]
    if subject.quantization is not None:
        transformers.append("BitsAndBytesConfig")
    if not sft:
        collator = "DataCollatorWithFlattening" if subject.training.flattened else "DataCollatorForLanguageModeling"
        transformers += ["AutoTokenizer", collator, "Trainer", "TrainingArguments"]
    lines = ["from accelerate import PartialState"] if subject.quantization is not None else []
    if subject.adapter is not None:
        lines.append(f"from peft import {', '.join(peft)}")
    lines.append(f"from transformers import {', '.join(sorted(transformers))}")
    return "\n".join([*lines, *(["from trl import SFTConfig, SFTTrainer"] if sft else [])])


def _quantization(subject: Subject) -> str:
    quantization = subject.quantization
    if quantization is None:
        return ""
    values: Json = {"load_in_8bit": True, "llm_int8_threshold": quantization.threshold}
    if quantization.kind.is_4bit:
        values = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantization.kind.value,
            "bnb_4bit_use_double_quant": quantization.double_quant,
            "bnb_4bit_compute_dtype": _Name(f"torch.{quantization.compute_dtype.value}"),
            "bnb_4bit_quant_storage": _Name(f"torch.{quantization.storage_dtype.value}"),
        }
    if quantization.skip_modules is not None:
        values["llm_int8_skip_modules"] = list(quantization.skip_modules)
    return f"\ndef quantization():\n    return {_call('BitsAndBytesConfig', values)}\n\n"


def _adapter(subject: Subject) -> str:
    adapter = subject.adapter
    if adapter is None:
        return ""
    values: Json = {
        "r": adapter.r,
        "lora_alpha": subject.lora_alpha,
        "lora_dropout": adapter.dropout,
        "bias": adapter.bias,
        "task_type": "CAUSAL_LM",
    }
    modules, excluded = adapter.target_modules, adapter.exclude_modules
    optional: Json = {
        "target_modules": list(modules) if isinstance(modules, tuple) else modules,
        "exclude_modules": list(excluded) if isinstance(excluded, tuple) else excluded,
        "target_parameters": list(adapter.target_parameters),
        "use_dora": adapter.use_dora,
        "use_rslora": adapter.use_rslora,
        "lora_bias": adapter.lora_bias,
        "modules_to_save": list(adapter.modules_to_save),
        "rank_pattern": dict(adapter.rank_pattern),
        "layers_to_transform": list(adapter.layers_to_transform or ()),
        "layers_pattern": list(adapter.layers_pattern),
    }
    subject.refuse("trl", peft__trainable_token_indices=(adapter.trainable_token_indices, ()))
    return f"\ndef adapter():\n    return {_call('LoraConfig', values | {name: value for name, value in optional.items() if value})}\n\n"


def _model(subject: Subject, *, prepares: bool) -> str:
    recipe = subject.recipe
    more = f"\n        revision={subject.revision!r}," if subject.revision is not None else ""
    if subject.quantization is not None:
        more += '\n        quantization_config=quantization(),\n        device_map={"": PartialState().local_process_index},'
    prepare = (
        f"loaded = prepare_model_for_kbit_training(loaded, use_gradient_checkpointing={recipe.training.gradient_checkpointing})\n    "
        if prepares and recipe.training is not None
        else ""
    )
    return _MODEL.format(
        # Source: transformers 4.56, modeling_utils.py, from_pretrained (`torch_dtype` before).
        dtype_name="dtype" if recipe.stack.transformers >= (4, 56) else "torch_dtype",
        dtype=f"torch.{recipe.dtype.value}",
        attention=recipe.attention.value,
        more=more,
        prepare=prepare,
    )
