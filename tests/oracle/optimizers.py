"""Optimizers as CUDA runs them."""

import torch


def as_on_cuda(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """With the implementation that torch takes for tensors on CUDA: lists at once, unless fused.

    Source: torch, optim/optimizer.py, _default_to_fused_or_foreach.
    """
    for group in optimizer.param_groups:
        if "foreach" in group and not group.get("fused"):
            group["foreach"] = True
    return optimizer
