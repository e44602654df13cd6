"""Makes a CPU run take the code paths that a CUDA run takes, as far as they decide what is kept and what is alive.

What is not emulated: workspaces inside kernels (attention's fp32 dq accumulator and expanded dk/dv, cuBLAS, sorting in the embedding's
backward pass); padding of masks and log-sum-exp to multiples inside the memory-efficient attention kernel; the two 8-byte random states
that fused attention and dropout keep; the choice of the attention kernel (fp32 queries with grouped heads cannot use a fused one on CUDA).
"""

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import bitsandbytes
import torch
from bitsandbytes.autograd import _functions as bnb_autograd
from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.other import transpose
from torch.library import Library, fallthrough_kernel
from transformers import GenerationMixin
from transformers.cache_utils import DynamicSlidingWindowLayer

AUTOCAST_KEY = "AutocastCPU"

# On the CPU these promote their arguments before autograd sees them; on CUDA they have no policy and promote inside the kernel.
# Source: torch, ATen/autocast_mode.cpp, TORCH_LIBRARY_IMPL(aten, AutocastCPU) against (aten, Autocast).
CPU_ONLY_POLICIES = ("cat", "stack", "index_copy")

# CUDA runs these in the lower precision, the CPU does not know them.
LOWER_PRECISION_MISSING_ON_CPU = ("einsum", "mv", "addmv", "addr", "chain_matmul", "linalg_multi_dot")


def autocast_list(name: str) -> tuple[str, ...]:
    """Operations of one autocast policy of CUDA, as `op` or `op.overload`.

    Source: torch, ATen/autocast_mode.h, AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE, AT_FORALL_PROMOTE; read from the header that the
    installed torch ships.
    """
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    body = re.search(rf"#define {name}\(_\)((?:.*\\\n)*.*\n)", header.read_text())
    if body is None:
        raise LookupError(f"{name} is not in {header}")
    return tuple(".".join(entry) if entry[1] else entry[0] for entry in re.findall(r"_\((\w+)(?:,\s*(\w+))?\)", body[1]))


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _eligible(value: object) -> bool:
    # Source: ATen/autocast_mode.h, is_eligible
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype is not torch.float64


def _cast(value: Any, dtype: torch.dtype) -> Any:
    # Casts to float32 are never cached (ATen/autocast_mode.cpp, cached_cast: only those to the lower precision are)
    if _eligible(value):
        return value.to(dtype)
    return type(value)(_cast(v, dtype) for v in value) if isinstance(value, list | tuple) else value


def _below_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _policy_fp32(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _below_autocast():
            return op(*(_cast(a, torch.float32) for a in args), **{k: _cast(v, torch.float32) for k, v in kwargs.items()})

    return kernel


def _policy_fp32_output(op: Any) -> Callable[..., Any]:
    # fp32_set_opt_dtype: the operation itself converts; an explicit dtype is respected
    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = {a.name: v for a, v in zip(op._schema.arguments, args, strict=False)} | kwargs
        if _eligible(args[0]) and given.get("dtype") is None:
            given["dtype"] = torch.float32
        names = [a.name for a in op._schema.arguments if not a.kwarg_only and a.name in given]
        with _below_autocast():
            return op(*(given[n] for n in names), **{k: v for k, v in given.items() if k not in names})

    return kernel


def _policy_promote(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        flat = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else (arg,)) if _eligible(a)]
        widest = torch.float32 if any(a.dtype is torch.float32 for a in flat) else torch.get_autocast_dtype("cpu")
        with _below_autocast():
            return op(*(_cast(a, widest) for a in args), **kwargs)

    return kernel


def _policy_lower(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _below_autocast():
            return op(*(_cast(a, torch.get_autocast_dtype("cpu")) for a in args), **kwargs)

    return kernel


@contextmanager
def cuda_autocast_lists() -> Iterator[None]:
    """CPU autocast with CUDA's lists: what runs in float32, what promotes, what is left alone.

    Source: torch, ATen/autocast_mode.h and autocast_mode.cpp.
    """
    library = Library("aten", "IMPL")
    plan = [(name, _policy_fp32) for name in autocast_list("AT_FORALL_FP32")]
    plan += [(name, _policy_fp32_output) for name in autocast_list("AT_FORALL_FP32_SET_OPT_DTYPE")]
    plan += [(name, _policy_promote) for name in autocast_list("AT_FORALL_PROMOTE")]
    plan += [(name, _policy_lower) for name in LOWER_PRECISION_MISSING_ON_CPU]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that a kernel is overridden: meant so
        for name, policy in plan:
            library.impl(name, policy(_overload(name)), AUTOCAST_KEY)
        for name in CPU_ONLY_POLICIES:
            library.impl(name, fallthrough_kernel, AUTOCAST_KEY)
        # norm: the dtype is appended and the call goes to the overload that has one (fp32_append_dtype)
        library.impl("norm.Scalar", _norm, AUTOCAST_KEY)
        library.impl("norm.ScalarOpt_dim", _norm_dim, AUTOCAST_KEY)
    try:
        yield
    finally:
        library._destroy()


def _norm(tensor: torch.Tensor, p: Any = 2) -> torch.Tensor:
    with _below_autocast():
        normed: torch.Tensor = torch.ops.aten.norm.ScalarOpt_dtype(tensor, p, dtype=torch.float32 if _eligible(tensor) else tensor.dtype)
        return normed


def _norm_dim(tensor: torch.Tensor, p: Any, dim: list[int], keepdim: bool = False) -> torch.Tensor:
    with _below_autocast():
        dtype = torch.float32 if _eligible(tensor) else tensor.dtype
        normed: torch.Tensor = torch.ops.aten.norm.ScalarOpt_dim_dtype(tensor, p, dim, keepdim, dtype=dtype)
        return normed


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Fused dropout: keeps a bool mask where the CPU's keeps a floating-point noise tensor.

    Source: torch, ATen/native/Dropout.cpp, is_fused_kernel_acceptable and dropout.
    """
    if not training or not 0 < p < 1 or input.numel() == 0:
        return torch.dropout(input, p, training)
    output: torch.Tensor = torch.native_dropout(input, p, training)[0]
    return output


def _gemm_4bit(fused: Callable[[int, int, int], bool]) -> Callable[..., torch.Tensor]:
    """The forward of a 4-bit matrix product in the operations that CUDA's kernel consists of.

    Source: bitsandbytes 0.50, backends/cuda/ops.py, gemm_4bit and _dequant_linear_fallback.
    """

    def gemm(a: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, state: Any) -> torch.Tensor:
        num_rows, num_inputs, num_outputs = a.numel() // a.shape[-1], a.shape[-1], state.shape[0]
        if num_inputs % state.blocksize == 0 and fused(num_rows, num_outputs, num_inputs):
            # one kernel reads the packed weight: nothing but the output
            return a.new_zeros(*a.shape[:-1], num_outputs)
        absmax = state.absmax
        if state.nested:
            dequantized = torch.empty_like(state.absmax, dtype=torch.float32)
            absmax = dequantized + state.offset
        weight = torch.empty(state.shape, dtype=a.dtype).fill_(0.01)
        output = torch.nn.functional.linear(a, weight, bias)
        del absmax
        return output

    return gemm


def _matmul_4bit(gemm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`bitsandbytes.matmul_4bit` for tensors on CUDA: autograd class of the library, forward by `gemm`, its own backward.

    Source: bitsandbytes 0.50, autograd/_functions.py, matmul_4bit and MatMul4Bit.
    """

    class OnCuda(bnb_autograd.MatMul4Bit):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, out: Any = None, bias: Any = None, quant_state: Any = None) -> torch.Tensor:
            b = b.view(-1, 1)
            output = gemm(a, b, bias, quant_state)
            ctx.is_empty, ctx.state = False, quant_state
            ctx.dtype_A, ctx.dtype_B, ctx.dtype_bias = a.dtype, b.dtype, None if bias is None else bias.dtype
            ctx.tensors = (None, b) if any(ctx.needs_input_grad[:2]) else (None, None)
            return output

    def matmul(a: torch.Tensor, b: torch.Tensor, quant_state: Any, out: Any = None, bias: Any = None) -> torch.Tensor:
        if torch.is_grad_enabled() and (a.requires_grad or (bias is not None and bias.requires_grad)):
            result: torch.Tensor = OnCuda.apply(a, b, out, bias, quant_state)
            return result
        return gemm(a, b.view(-1, 1), bias, quant_state)

    return matmul


def _int8_vectorwise_quant(a: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Row-wise quantization, with the temporaries that the outlier search makes.

    Source: bitsandbytes 0.50, backends/cuda/ops.py, int8_vectorwise_quant.
    """
    row_stats = torch.empty(a.numel() // a.shape[-1], dtype=torch.float32).fill_(1.0)
    quantized = torch.empty(a.shape, dtype=torch.int8).fill_(1)
    outlier_columns = None
    if threshold > 0:
        outliers = a.abs() >= threshold
        outliers.any()
        outlier_columns = torch.empty(0, dtype=torch.int64)  # tiny random models have none
    return quantized, row_stats, outlier_columns


def _int8_scaled_mm(a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """int32 product, its float16 dequantization, the cast to the caller's type.

    Source: bitsandbytes 0.50, backends/cuda/ops.py, int8_linear_matmul and int8_mm_dequant; backends/default/ops.py, int8_scaled_mm.
    """
    product = torch.empty((*a.shape[:-1], weight.shape[0]), dtype=torch.int32)
    out = torch.empty_like(product, dtype=torch.float16).fill_(0.01)
    if bias is not None and bias.dtype is not torch.float16:
        out.add_(bias)
    return out.to(dtype)


class _MatMul8bitOnCuda(bnb_autograd.MatMul8bitLt):  # type: ignore[misc]
    """LLM.int8's product as CUDA computes it, with its own backward; the CPU would take MatMul8bitFp, which keeps and makes other tensors.

    Source: bitsandbytes 0.50, autograd/_functions.py, MatMul8bitLt.forward (weights already int8).
    """

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, out: Any = None, bias: Any = None, state: Any = None) -> torch.Tensor:
        input_shape = a.shape
        if a.ndim == 3:
            a = a.reshape(-1, a.shape[-1])
        quantized, row_stats, outlier_columns = _int8_vectorwise_quant(a.to(torch.float16), state.threshold)
        sub_a = torch.empty(0, dtype=a.dtype) if state.threshold > 0 else None
        state.idx = outlier_columns
        output = _int8_scaled_mm(quantized, state.CB, bias, a.dtype)
        ctx.is_empty, ctx.state, ctx.grad_shape = False, state, input_shape
        ctx.dtype_A, ctx.dtype_bias = a.dtype, None if bias is None else bias.dtype
        if any(ctx.needs_input_grad[:2]):
            ctx.tensors, ctx.tensor_states = (None, sub_a, a), (None, outlier_columns)
        else:
            ctx.tensors, ctx.tensor_states = [None, None, None], (None, None)
        del row_stats
        return output.reshape(*input_shape[:-1], state.CB.shape[0])


def _matmul_8bit(
    a: torch.Tensor, b: torch.Tensor, out: Any = None, state: Any = None, threshold: float = 0.0, bias: Any = None
) -> torch.Tensor:
    if threshold > 0:
        state.threshold = threshold
    result: torch.Tensor = _MatMul8bitOnCuda.apply(a, b, out, bias, state)
    return result


def _layer_norm_kernel(x: torch.Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """CUDA keeps mean and reciprocal deviation in float32 whatever the input; the CPU keeps them in the input's type.

    Source: torch, ATen/native/cuda/layer_norm_kernel.cu, layer_norm_cuda (acc_type).
    """
    output, mean, rstd = torch.ops.aten.native_layer_norm.default(x, shape, weight, bias, eps)
    return output, mean.float(), rstd.float()


def _layer_norm_backward_kernel(grad: torch.Tensor, x: torch.Tensor, shape: Any, mean: torch.Tensor, rstd: torch.Tensor, *rest: Any) -> Any:
    weight = rest[0]
    own = torch.float32 if weight is not None and weight.dtype is torch.float32 else x.dtype
    return torch.ops.aten.native_layer_norm_backward.default(grad, x, shape, mean.to(own), rstd.to(own), *rest)


def _attention_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any) -> Any:
    """Without a mask CUDA takes flash, whose output lies in memory as the query does, like the CPU's; with one the memory-efficient
    kernel, whose output lies token after token whatever the query does.

    Source: torch, ATen/native/transformers/cuda/attention.cu, _efficient_attention_forward (`res` is an empty (B, M, heads, Kv)).
    """
    output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(query, key, value, *rest, **named)
    return (output if named.get("attn_mask") is None else _token_after_token(output)), logsumexp


def _attention_backward_kernel(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any
) -> Any:
    """Flash's gradients lie as query, key and value do, the memory-efficient kernel's token after token, like the CPU's.

    Source: torch, ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd (`at::empty_like(q)`); attention_backward.cu,
    _efficient_attention_backward (`at::empty(query.sizes())`).
    """
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(grad, query, key, value, *rest, **named)
    if named.get("attn_mask") is not None:
        return grads
    return tuple(torch.empty_like(x).copy_(g) for x, g in zip((query, key, value), grads, strict=True))


def _token_after_token(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _attention_kernel,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward_kernel,
    torch.ops.aten.native_layer_norm.default: _layer_norm_kernel,
    torch.ops.aten.native_layer_norm_backward.default: _layer_norm_backward_kernel,
}
"""Operations whose CPU kernel returns other shapes or types than CUDA's; handed to `LiveStorages`."""

FUSED_4BIT: dict[str, Callable[[int, int, int], bool]] = {
    "never": lambda num_rows, num_outputs, num_inputs: False,
    "always": lambda num_rows, num_outputs, num_inputs: True,
    "up_to_4_rows": lambda num_rows, num_outputs, num_inputs: num_rows <= 4,
}
"""When the fused 4-bit kernel is taken; `never` is what many rows come to on every card."""


@contextmanager
def _one_thread() -> Iterator[None]:
    # tiny tensors: several threads would spend their time waiting for each other
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _delta_weight(layer: Any, adapter: str) -> torch.Tensor:
    """Source: peft 0.21, tuners/lora/layer.py, Linear.get_delta_weight: on the CPU alone, 16-bit factors are multiplied in float32."""
    product = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
    scaled: torch.Tensor = transpose(product, layer.fan_in_fan_out) * layer.scaling[adapter]
    return scaled


def _unpacked_weight(module: torch.nn.Module) -> torch.Tensor:
    """On the CPU alone the parameter is made anew, which loses the scales of LLM.int8.

    Source: peft 0.21, utils/integrations.py, dequantize_module_weight and dequantize_bnb_weight.
    """
    weight: Any = module.weight
    # by the layer and not by the parameter's class, which a parameter without content does not have
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return cast(torch.Tensor, bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state))
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        if module.state.SCB is None:
            module.state.SCB = weight.SCB
        return cast(torch.Tensor, bitsandbytes.functional.int8_vectorwise_dequant(weight.data, module.state.SCB))
    return cast(torch.Tensor, weight)


@contextmanager
def _optimize_model_for_decode(model: Any) -> Iterator[None]:
    """Source: transformers 5.23, generation/utils.py, GenerationMixin._optimize_model_for_decode: on the CPU it does nothing."""
    before = model.get_experts_implementation()
    model.set_experts_implementation({name: "batched_mm" if kind == "grouped_mm" else kind for name, kind in before.items()})
    try:
        yield
    finally:
        model.set_experts_implementation(before)


_make_window = DynamicSlidingWindowLayer.__init__


def _make_window_without_its_size(layer: Any, *args: Any, **kwargs: Any) -> None:
    _make_window(layer, *args, **kwargs)
    layer._sliding_window_tensor = None


def _window_with_its_size(layer: Any, *args: Any, **kwargs: Any) -> None:
    """The size of the window is made on the host and copied with the first keys; on the CPU the original would be the copy.

    Source: transformers 5.23, cache_utils.py, DynamicSlidingWindowLayer.__init__ and lazy_initialization.
    """
    super(DynamicSlidingWindowLayer, layer).lazy_initialization(*args, **kwargs)
    layer._sliding_window_tensor = torch.tensor(layer.sliding_window, dtype=torch.long)


@contextmanager
def cuda_paths(*, fused_4bit: str = "never", attention: Callable[..., torch.Tensor] | None = None) -> Iterator[None]:
    """Everything in this file at once, undone on exit.

    Args:
        fused_4bit: when the fused 4-bit kernel is taken, see `FUSED_4BIT`.
        attention: stands for `F.scaled_dot_product_attention`; the CPU's own, without dropout, if None.
    """
    asked_without_device = torch.is_autocast_enabled
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def is_autocast_enabled(*device_type: str) -> bool:
        # without an argument it means "on CUDA"; PEFT asks so before it casts the input of a quantized layer (peft/tuners/lora/bnb.py)
        return asked_without_device(*(device_type or ("cpu",)))

    @functools.wraps(sdpa)
    def fused_sdpa(*args: Any, **kwargs: Any) -> torch.Tensor:
        # the CPU has no fused attention with dropout and would keep the probabilities; CUDA's keeps a seed
        bound = inspect.signature(lambda query, key, value, attn_mask=None, dropout_p=0.0, *more, **named: None).bind(*args, **kwargs)
        bound.arguments["dropout_p"] = 0.0
        named = {k: v for k, v in bound.arguments.items() if k not in ("more", "named")}
        return sdpa(**named, **bound.arguments.get("named", {}))

    with ExitStack() as stack:
        stack.enter_context(_one_thread())
        stack.enter_context(cuda_autocast_lists())
        for target, name, replacement in (
            (torch, "is_autocast_enabled", is_autocast_enabled),
            (torch.nn.functional, "dropout", _dropout),
            (torch.nn.functional, "scaled_dot_product_attention", attention or fused_sdpa),
            (bitsandbytes, "matmul_4bit", _matmul_4bit(_gemm_4bit(FUSED_4BIT[fused_4bit]))),
            (bitsandbytes, "matmul", _matmul_8bit),
            (LoraLinear, "get_delta_weight", _delta_weight),
            # the CPU would pack 4-bit weights anew, in another layout, for inference (bitsandbytes/nn/modules.py, Linear4bit.forward)
            (bitsandbytes.nn.modules, "has_avx512bf16", lambda: False),
            (DynamicSlidingWindowLayer, "__init__", _make_window_without_its_size),
            (DynamicSlidingWindowLayer, "lazy_initialization", _window_with_its_size),
            (GenerationMixin, "_optimize_model_for_decode", _optimize_model_for_decode),
            (dora, "dequantize_module_weight", _unpacked_weight),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield
