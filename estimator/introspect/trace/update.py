"""The optimizer that transformers' Trainer would make, and its step on fake tensors."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Trainer, TrainingArguments

from estimator.introspect.trace.errors import NotTraceableError
from estimator.recipe import Recipe


def made_by_trainer(model: nn.Module, name: str, arguments: str | None = None, *, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """What `Trainer.create_optimizer` returns, its parameter groups included.

    Args:
        name: a value of OptimizerNames.
        arguments: `optim_args`.
        weight_decay: of TrainingArguments.
    """
    settings = TrainingArguments(
        output_dir=tempfile.gettempdir(), optim=name, optim_args=arguments, weight_decay=weight_decay, use_cpu=True, report_to=[]
    )
    # Only what create_optimizer reads; a whole Trainer would want a data set.
    trainer: Any = argparse.Namespace(
        model=model,
        args=settings,
        optimizer=None,
        optimizer_cls_and_kwargs=None,
        get_optimizer_cls_and_kwargs=Trainer.get_optimizer_cls_and_kwargs,
    )
    trainer.get_decay_parameter_names = lambda m: Trainer.get_decay_parameter_names(trainer, m)
    bnb.optim.GlobalOptimManager.get_instance().initialize()  # it remembers the embeddings of earlier models
    made: torch.optim.Optimizer = Trainer.create_optimizer(trainer)
    return made


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer of a recipe.

    Raises:
        NotTraceableError: if transformers cannot make it here.
    """
    training = recipe.training
    assert training is not None
    arguments = ",".join(f"{key}={value}" for key, value in training.optimizer_arguments) or None
    try:
        return made_by_trainer(model, training.optimizer, arguments, weight_decay=training.weight_decay)
    except (ImportError, ValueError, RuntimeError) as error:
        raise NotTraceableError(f"optimizer {training.optimizer}: {error}") from error


@contextmanager
def cuda_update(paged: Callable[..., torch.Tensor]) -> Iterator[None]:
    """What an optimizer's step asks of CUDA.

    Args:
        paged: makes a tensor in managed memory.

    Source: torch 2.13, optim/optimizer.py, _default_to_fused_or_foreach (lists of tensors at once on a card alone); bitsandbytes 0.50,
    functional.py, get_paged and prefetch_tensor (a driver's calls), optim/optimizer.py, get_state_buffer; torchao, optim/adam.py, which
    compiles its step.
    """
    with ExitStack() as stack:
        for target, name, replacement in (
            (bnb.functional, "get_paged", paged),
            (bnb.functional, "fill", lambda tensor, value: None),
            (bnb.functional, "prefetch_tensor", lambda tensor, to_cpu=False: None),
            (torch, "compile", lambda function, **_: function),
            (sys.modules["torch.optim.optimizer"], "_get_foreach_kernels_supported_devices", lambda: ["cpu"]),
            (sys.modules["torch.optim.optimizer"], "_foreach_supported_types", [torch.Tensor, nn.Parameter, FakeTensor]),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield


def _nothing(*_: Any, **__: Any) -> None:
    return None


UPDATE_KERNELS: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.bitsandbytes, name).default: _nothing
    for name in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit")
    if hasattr(torch.ops.bitsandbytes, name)
}
"""Updates in place: nothing is made."""


def tensors_of(state: object) -> Iterator[torch.Tensor]:
    """A state that is a tensor, or the tensors that a torchao state is made of."""
    if hasattr(state, "tensor_attrs"):
        yield from (getattr(state, attribute) for attribute in state.tensor_attrs)
    elif isinstance(state, torch.Tensor):
        yield state
