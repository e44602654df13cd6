"""The real trainers' loop over synthetic full-length sequences, with the meter at the borders of its phases."""

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from calibration.case import Case, JsonObject
from calibration.worker.meter import BACKWARD_HEAD, BACKWARD_LAYERS, Meter
from calibration.worker.model import adapted, lora_config


class Borders(TrainerCallback):  # type: ignore[misc]  # the framework's base class is untyped
    """Tells the meter where the trainer's loop is."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.step_seconds = 0.0
        self.head_seen = False
        self.is_watching = True
        """Whether what the model does belongs to a step."""
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.meter.begin_step()
        self._started = time.monotonic()

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self._close_backward()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._close_backward()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.meter.close("optimizer_step")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_seconds = time.monotonic() - self._started

    def _close_backward(self) -> None:
        self.meter.close(BACKWARD_LAYERS if self.head_seen else "backward")


def train(case: Case, model: Any, meter: Meter, *, on_cpu: bool) -> float:
    """Runs the case's steps.

    Returns:
        Wall time of the last step [s].
    """
    borders = Borders(meter)
    with tempfile.TemporaryDirectory(prefix="vramplan-output-") as folder:
        arguments = _arguments(case, folder, on_cpu=on_cpu)
        make = _sft_trainer if case.trainer == "trl" else _trainer
        trainer = make(case, model, arguments, borders)
        watch_decoder(trainer.model, borders)
        meter.loaded(trainer.model)
        trainer.train()
    return borders.step_seconds


def _trainer(case: Case, model: Any, arguments: JsonObject, borders: Borders) -> Any:
    dataset = Sequences(case, case.sequence_length)
    trainer_class = _with_loss_border(Trainer, borders)
    return trainer_class(
        model=adapted(case, model), args=TrainingArguments(**arguments), train_dataset=dataset, data_collator=_stack, callbacks=[borders]
    )


def _sft_trainer(case: Case, model: Any, arguments: JsonObject, borders: Borders) -> Any:
    """TRL adapts the model itself and wants tokens and a tokenizer in its own wrappers."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    dataset = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in Sequences(case, case.sequence_length)])
    trainer_class = _with_loss_border(SFTTrainer, borders)
    return trainer_class(
        model=model,
        args=SFTConfig(**arguments, max_length=case.sequence_length),
        train_dataset=dataset,
        processing_class=_tokenizer(),
        peft_config=lora_config(case),
        callbacks=[borders],
    )


def _arguments(case: Case, folder: str, *, on_cpu: bool) -> JsonObject:
    """The case's own arguments, with everything off that has no part in a step."""
    own = {name: value for name, value in case.training.items() if name != "max_length"}
    if isinstance(options := own.get("optim_args"), dict):
        own["optim_args"] = ",".join(f"{name}={value}" for name, value in options.items())
    quiet: JsonObject = {
        "output_dir": folder,
        "max_steps": case.num_steps,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
    }
    return {**own, **quiet}


def _with_loss_border(trainer_class: Any, borders: Borders) -> Any:
    """The trainer's class, which tells the meter when the loss stands."""

    class Measured(trainer_class):  # type: ignore[misc]
        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            loss = super().compute_loss(*arguments, **named)
            borders.meter.close("loss" if borders.head_seen else "forward")
            return loss

    return Measured


def watch_decoder(model: Any, borders: Borders) -> Any:
    """Puts a border between layers and head, on the way there and on the way back.

    Returns:
        What removes it; None for models without a separable decoder, which keep one span for forward and loss, and one for backward.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder()
    if decoder is base:
        return None

    def at_head(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if not borders.is_watching:
            return
        borders.head_seen = True
        borders.meter.close("forward")
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(lambda _gradient: borders.meter.close(BACKWARD_HEAD))

    return decoder.register_forward_hook(at_head)


class Sequences:
    """Enough random sequences of full length for the whole run."""

    def __init__(self, case: Case, length: int) -> None:
        accumulation = (case.training.get("gradient_accumulation_steps") if case.is_training else None) or 1
        assert isinstance(accumulation, int)
        self._num = case.batch_size * accumulation * case.num_steps
        self._length = length
        self._padded = bool(case.request.get("padded"))
        text = case.config.get("text_config")
        vocabulary = (text if isinstance(text, dict) else case.config).get("vocab_size")
        # low ids exist in every vocabulary; which token it is has no bearing on memory
        self._num_ids = min(vocabulary, 1000) if isinstance(vocabulary, int) else 100

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self._num:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, self._num_ids, (self._length,), generator=generator)
        mask = torch.ones(self._length, dtype=torch.long)
        if self._padded:
            mask[-1] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[index] for index in range(self._num))


def _stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _tokenizer() -> Any:
    """A tokenizer of two tokens: TRL asks for one, and the data come tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
