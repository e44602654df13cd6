"""Runs one step of TRL's real trainers on the CPU with tiny models, and reports what was alive."""

import gc as garbage
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar as disable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.kernels import chunked_logprob
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import utils as trl_utils

from estimator.introspect.cuda_paths import KERNELS, cuda_paths
from estimator.recipe import Reference
from tests.oracle.live import LiveStorages
from tests.oracle.models import VOCABULARY, Mode, build, stored_tensors
from tests.oracle.run import mode_of


class _Launch:
    """A Triton kernel: whatever it is given, it allocates nothing."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *args, **kwargs: None


def _yes(_: object) -> bool:  # mocks would keep their arguments, tensors among them
    return True


def _nothing(*_: object) -> None:
    return None


@contextmanager
def triton_paths() -> Iterator[None]:
    """TRL's head takes the path of a card with Triton; only what the kernels compute is missing.

    Source: trl 1.16, kernels/chunked_logprob.py: `torch.addmm(…, out=acc)` on CUDA makes no tensor.
    """
    with ExitStack() as stack:
        for module in (trl_utils, chunked_logprob):
            stack.enter_context(mock.patch.object(module, "_use_triton", _yes))
        for name in ("_forward_kernel", "_backward_kernel"):
            stack.enter_context(mock.patch.object(chunked_logprob, name, _Launch()))
        stack.enter_context(mock.patch.object(chunked_logprob, "_addmm_fp32", _nothing))
        cdiv = types.SimpleNamespace(cdiv=lambda a, b: -(-a // b))
        stack.enter_context(mock.patch.object(chunked_logprob, "triton", cdiv, create=True))
        yield


def _tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """One that knows numbers."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    made = Tokenizer(WordLevel(words, unk_token="<eos>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<eos>")


def _ids(length: int) -> list[int]:
    """Valid token ids, none of them padding."""
    return [2 + i % 50 for i in range(length)]


def _words(length: int) -> str:
    return " ".join(f"w{i}" for i in _ids(length))


def _arguments(config_class: Any, **values: Any) -> Any:
    """A config for the CPU that writes nothing."""
    common = {"output_dir": "/nonexistent", "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return config_class(**(common | values))


def _dataset(**columns: Any) -> Dataset:
    return Dataset.from_dict({name: [value] * 4 for name, value in columns.items()})


def _peaks(
    trainer: Any, inputs: Mapping[str, Any], *, num_items: int | None = None, before: Any = None, beside: nn.Module | None = None
) -> dict[str, int]:
    """Peaks of the phases of the first step, above what was stored and the inputs [bytes, rounded up to 512].

    Args:
        before: run before the loss, with the inputs; what it returns joins them.
        beside: the reference model.
    """
    with cuda_paths(), triton_paths():
        model = trainer.accelerator.prepare_model(trainer.model)
        model.train()
        trainer.current_gradient_accumulation_steps = 1
        inputs = dict(inputs)
        live = LiveStorages(granularity_bytes=512, kernels=KERNELS)
        live.know(stored_tensors(model) + (stored_tensors(beside) if beside is not None else []), "static")
        live.know([t for t in inputs.values() if isinstance(t, torch.Tensor)], "inputs")
        items = torch.tensor(num_items) if num_items is not None else None
        if items is not None:
            live.know([items], "inputs")
        base = model.get_base_model() if hasattr(model, "get_base_model") else model

        def begin_loss(*_: Any) -> None:
            if torch.is_grad_enabled():
                live.begin("loss")

        hook = base.base_model.register_forward_hook(begin_loss)
        garbage.collect()
        garbage.disable()
        try:
            with live:
                live.begin("forward")
                given = inputs | (before(inputs) if before is not None else {})
                named = {"num_items_in_batch": items} if items is not None else {}
                loss = trainer.compute_loss(model, given, **named) / 1
                live.begin("backward")
                loss.backward()
        finally:
            garbage.enable()
            hook.remove()
        worst: dict[str, int] = {}
        for peak in live.peaks:
            worst[peak.phase] = max(worst.get(peak.phase, 0), peak.num_bytes)
        return worst


def _trainable(model: nn.Module) -> nn.Module:
    """A quantized model as `from_pretrained` leaves it for the Trainer's check."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "is_quantized", False):
        base.hf_quantizer = types.SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    return model


# -- trainers ---------------------------------------------------------------------------------------------------------------------------


def _common(mode: Mode, B: int, gc: bool | None) -> dict[str, Any]:
    return {"bf16": mode.autocast, "gradient_checkpointing": gc is not None, "per_device_train_batch_size": B}


def _without_copy(trainer: Any) -> None:
    """TRL gives a model that comes with an adapter a frozen copy of it; one that gets its adapter from TRL has none."""
    if "ref" in getattr(trainer.model, "peft_config", {}):
        trainer.model.delete_adapter("ref")


def sft(family: str, mode: str | Mode, B: int, S: int, layers: int, *, gc: bool | None = None, **options: Any) -> dict[str, int]:
    """`SFTTrainer`"""
    mode = mode_of(mode)
    model = _trainable(build(family, mode, layers, gc=gc, **options))
    with _quiet():
        args = _arguments(SFTConfig, max_length=S, **_common(mode, B, gc))
        trainer = SFTTrainer(model=model, args=args, train_dataset=_dataset(input_ids=_ids(S)), processing_class=_tokenizer())
        return _peaks(trainer, trainer.data_collator([{"input_ids": _ids(S)}] * B), num_items=B * (S - 1))


def dpo(
    family: str, mode: str | Mode, B: int, S: int, P: int, layers: int, *, reference: Reference, gc: bool | None = None
) -> dict[str, int]:
    """`DPOTrainer`; prompts of P tokens."""
    mode = mode_of(mode)
    model = _trainable(build(family, mode, layers, gc=gc))
    second = build(family, Mode(load_dtype=mode.load_dtype), layers).eval() if reference is Reference.MODEL else None
    texts = {"prompt": _words(P), "chosen": _words(S - P), "rejected": _words(S - P)}
    example: dict[str, Any] = {"prompt_ids": _ids(P), "chosen_ids": _ids(S - P), "rejected_ids": _ids(S - P)}
    if reference is Reference.NONE:
        example |= {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
    with _quiet():
        args = _arguments(DPOConfig, max_length=S, **_common(mode, B, gc))
        trainer = DPOTrainer(model=model, ref_model=second, args=args, train_dataset=_dataset(**texts), processing_class=_tokenizer())
        _without_copy(trainer)
        trainer.precompute_ref_logps = reference is Reference.NONE
        return _peaks(trainer, trainer.data_collator([example] * B), beside=second)


def reward(family: str, mode: str | Mode, B: int, S: int, layers: int, *, gc: bool | None = None) -> dict[str, int]:
    """`RewardTrainer`"""
    mode = mode_of(mode)
    model = _trainable(build(family, mode, layers, gc=gc, labels=1))
    pair = {"chosen_ids": _ids(S), "rejected_ids": _ids(S)}
    with _quiet():
        args = _arguments(RewardConfig, max_length=S, **_common(mode, B, gc))
        trainer = RewardTrainer(model=model, args=args, train_dataset=_dataset(**pair), processing_class=_tokenizer())
        return _peaks(trainer, trainer.data_collator([pair] * B))


def classification(family: str, mode: str | Mode, B: int, S: int, layers: int, *, labels: int, gc: bool | None = None) -> dict[str, int]:
    """transformers' `Trainer` on a model for sequence classification."""
    mode = mode_of(mode)
    model = _trainable(build(family, mode, layers, gc=gc, labels=labels))
    batch = {
        "input_ids": torch.tensor([_ids(S)] * B),
        "attention_mask": torch.ones(B, S, dtype=torch.int64),
        "labels": torch.ones(B, dtype=torch.int64),
    }
    with _quiet():
        args = _arguments(TrainingArguments, **_common(mode, B, gc))
        trainer = Trainer(model=model, args=args, train_dataset=_dataset(input_ids=_ids(S), labels=1))
        return _peaks(trainer, batch, num_items=B)


def grpo(
    family: str,
    mode: str | Mode,
    B: int,
    S: int,
    P: int,
    layers: int,
    *,
    reference: bool = False,
    old_log_probs: bool = False,
    gc: bool | None = None,
) -> dict[str, int]:
    """`GRPOTrainer` after the generation; prompts of P tokens, the reference with the adapter off."""
    mode = mode_of(mode)
    C = S - P
    model = _trainable(build(family, mode, layers, gc=gc))
    batch = {
        "prompt_ids": torch.tensor([_ids(P)] * B),
        "prompt_mask": torch.ones(B, P, dtype=torch.int64),
        "completion_ids": torch.tensor([_ids(C)] * B),
        "completion_mask": torch.ones(B, C, dtype=torch.int64),
        "advantages": torch.ones(B),
        "num_items_in_batch": torch.tensor(B * C),
    }
    with _quiet():
        values = {"num_generations": 2, "max_completion_length": C, "beta": 0.04 if reference else 0.0}
        args = _arguments(GRPOConfig, **values, **_common(mode, B, gc))
        trainer = GRPOTrainer(
            model=model, args=args, reward_funcs=_no_reward, train_dataset=_dataset(prompt=_words(P)), processing_class=_tokenizer()
        )
        _without_copy(trainer)

        def log_probs(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            """Source: trl 1.16, trainer/grpo_trainer.py, GRPOTrainer._generate_and_score_completions."""
            found = {}
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)

            def score() -> torch.Tensor:
                scored: torch.Tensor = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, C, batch_size=B)[0]
                return scored

            with torch.no_grad(), disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
                if old_log_probs:
                    found["old_per_token_logps"] = score()
                if reference:
                    with trl_utils.use_adapter(trainer.model, adapter_name=None):
                        found["ref_per_token_logps"] = score()
            return found

        return _peaks(trainer, batch, before=log_probs)


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that the libraries give to people."""
    disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
