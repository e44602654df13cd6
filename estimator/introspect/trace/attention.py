"""Attention as CUDA's kernels run it: which kernel is taken, what it keeps for the backward pass, what it takes for the length of a call.

Legend: B micro-batch, S sequence length, a heads, d head size.
"""

from typing import Any

import torch
from torch import Tensor

from estimator.attention import rounded_head_dim
from estimator.kernels import Kernel

_FLASH_LARGEST_HEAD = 256
_MASK_ALIGNMENT = 8


class Flash(torch.autograd.Function):
    """Flash attention: keeps q, k, v, its output and one float32 per head and token.

    Tensors come as (B, a, S, d). The backward pass accumulates dq in float32, and for grouped heads expands dk and dv to all heads.

    Source: torch, ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_fwd and mha_bwd; flash-attention 2, flash_api.cpp.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        output = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, torch.empty((batch, heads, length), dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved = ctx.saved_tensors  # held to the end, as the kernel reads its output and the sums of its rows
        query, key, value = saved[:3]
        batch, heads, length, head_dim = query.shape
        results = [torch.empty_like(t) for t in (query, key, value)]
        taken = [
            torch.empty((batch, length, heads, rounded_head_dim(head_dim)), dtype=torch.float32),
            torch.empty((batch, heads, length), dtype=torch.float32),
        ]
        if key.shape[1] != heads:
            taken += [torch.empty((batch, key.shape[2], heads, head_dim), dtype=query.dtype) for _ in range(2)]
        del taken
        return tuple(results)


class MemoryEfficient(torch.autograd.Function):
    """The memory-efficient kernel: takes a mask, keeps it too; its output lies token after token.

    Source: torch, ATen/native/transformers/cuda/attention.cu and attention_backward.cu, _efficient_attention_forward and …_backward.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        output = torch.empty((batch, length, heads, value.shape[-1]), dtype=query.dtype).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask, output, torch.empty((batch, heads, length), dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved = ctx.saved_tensors  # held to the end, as the kernel reads all of it
        query, key, value = saved[:3]
        results = [torch.empty_like(t) for t in (query, key, value)]
        per_head = query.shape[:-1]
        taken = [torch.empty(per_head, dtype=torch.float32), torch.empty((*per_head, query.shape[-1]), dtype=torch.float32)]
        del taken
        return (*results, None)


def _lower_precision(tensor: Tensor) -> Tensor:
    """Source: torch, ATen/autocast_mode.h: scaled_dot_product_attention runs in the lower precision."""
    if torch.is_autocast_enabled("cpu") and tensor.is_floating_point():
        return tensor.to(torch.get_autocast_dtype("cpu"))
    return tensor


class CudaAttention:
    """`F.scaled_dot_product_attention` of a card.

    Args:
        compute_capability: flash attention needs 8.0.
    """

    def __init__(self, compute_capability: tuple[int, int]) -> None:
        self.has_flash = compute_capability >= (8, 0)
        self.ran: set[Kernel] = set()
        """Which kernels it took."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Source: torch, ATen/native/transformers/cuda/sdp_utils.cpp, select_sdp_backend; attention.cpp, scaled_dot_product_attention."""
        # In the order in which GCC evaluates the arguments of `WrapFunction_`'s call: the last first.
        value, key, query = _lower_precision(value), _lower_precision(key), _lower_precision(query)
        head_dim = query.shape[-1]
        # Heads that are left to broadcasting fit no fused kernel; grouped ones fit flash alone.
        # Source: sdp_utils_cpp.h, check_batch_size_and_num_heads_dense.
        are_alike = query.shape[1] == key.shape[1] == value.shape[1]
        fits_flash = self.has_flash and query.dtype.itemsize == 2 and head_dim == value.shape[-1] <= _FLASH_LARGEST_HEAD
        result: Any
        if attn_mask is None and fits_flash and (are_alike or enable_gqa):
            self.ran.add(Kernel.FLASH)
            result = Flash.apply(query, key, value)
        elif are_alike:
            self.ran.add(Kernel.MEMORY_EFFICIENT)
            result = MemoryEfficient.apply(query, key, value, _bias(attn_mask, query))
        else:
            self.ran.add(Kernel.WRITTEN_OUT)
            result = _written_out(query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        output: Tensor = result
        return output


def _bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A boolean mask as numbers to be added, its rows padded to what the kernel can load.

    Source: torch, ATen/native/transformers/attention.cpp, convert_boolean_attn_mask and preprocess_mask.
    """
    if mask is None:
        return None
    bias = torch.empty(mask.shape, dtype=query.dtype) if mask.dtype is torch.bool else _lower_precision(mask)
    missing = -mask.shape[-1] % _MASK_ALIGNMENT
    return torch.nn.functional.pad(bias, (0, missing))[..., : mask.shape[-1]] if missing else bias


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    """The fallback in plain operators, which autocast does not touch any more.

    Source: torch, ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math.
    """
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        output: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    return output


def flash_attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """`flash_attention_2` and `_3` of transformers: tensors come as (B, a, S, d) and go as (B, S, a, d).

    Source: transformers, integrations/flash_attention.py, flash_attention_forward; modeling_flash_attention_utils.py.
    """
    value_dim = value.shape[-1]
    if value_dim != query.shape[-1]:
        value = torch.nn.functional.pad(value, (0, query.shape[-1] - value_dim))
    if query.dtype is torch.float32:
        target = half_precision(module)
        query, key, value = query.to(target), key.to(target), value.to(target)
    output = Flash.apply(query, key, value).transpose(1, 2)
    return (output[..., :value_dim] if value_dim != output.shape[-1] else output), None


def flash_kernel(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
    """`_flash_attention_forward` of transformers, for the classes that call it themselves: tensors come and go as (B, S, a, d)."""
    output: Tensor = Flash.apply(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return output.transpose(1, 2)


def half_precision(module: torch.nn.Module) -> torch.dtype:
    """What float32 is cast to. Source: transformers, integrations/flash_attention.py, get_target_dtype."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    config: Any = module.config
    if hasattr(config, "_is_quantized"):
        loaded: torch.dtype = config.dtype
        return loaded
    return next(m for m in module.modules() if isinstance(m, torch.nn.Linear)).weight.dtype
