"""The optimizer that transformers' Trainer makes for a model."""

import argparse
import tempfile
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import Trainer, TrainingArguments


def made_by_trainer(model: nn.Module, name: str, arguments: str | None = None) -> torch.optim.Optimizer:
    """What `Trainer.create_optimizer` returns, its parameter groups included.

    Args:
        name: a value of OptimizerNames.
        arguments: `optim_args`.
    """
    settings = TrainingArguments(output_dir=tempfile.gettempdir(), optim=name, optim_args=arguments, use_cpu=True, report_to=[])
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


def as_on_cuda(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """With the implementation that torch takes for tensors on CUDA: lists at once, unless fused.

    Source: torch, optim/optimizer.py, _default_to_fused_or_foreach.
    """
    for group in optimizer.param_groups:
        if "foreach" in group and not group.get("fused"):
            group["foreach"] = True
    return optimizer
