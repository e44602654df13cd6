"""Runs one step of TRL's real trainers on the CPU with tiny models, and reports what was alive."""

import gc as garbage
import types
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from estimator.introspect.cuda_paths import KERNELS, cuda_paths
from tests.oracle.live import LiveStorages
from tests.oracle.models import VOCABULARY, stored_tensors


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


def tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """One that knows numbers."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    made = Tokenizer(WordLevel(words, unk_token="<eos>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<eos>")


def ids(length: int, first: int = 2) -> list[int]:
    """Valid token ids, none of them padding."""
    return [first + i % 50 for i in range(length)]


def words(length: int) -> str:
    return " ".join(f"w{i}" for i in ids(length))


def arguments(config_class: Any, **values: Any) -> Any:
    """A config for the CPU that writes nothing."""
    common = {"output_dir": "/nonexistent", "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return config_class(**(common | values))


def dataset(**columns: Any) -> Dataset:
    return Dataset.from_dict({name: [value] * 4 for name, value in columns.items()})


def peaks(
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


def trainable(model: nn.Module) -> nn.Module:
    """A quantized model as `from_pretrained` leaves it for the Trainer's check."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "is_quantized", False):
        base.hf_quantizer = types.SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    return model
