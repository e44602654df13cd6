"""Heads that never hold the logits of all tokens, in the operations that CUDA's kernels consist of.

One pass over a tile of positions allocates what every pass does, so two are run where there are more: the second begins while variables of
the first are still alive, and the last one is taken to be full. How many rows a pass has is told by the regime (`scoring.Rows`) and not by
the tensors, since a program that is traced at a few small sizes has to hold at all sizes.

Legend: N scored positions, V vocabulary, h hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from estimator.fused_loss import CHUNK_ROWS
from estimator.scoring import Rows

Forward = Callable[..., Any]


def _passes(rows: Rows) -> range:
    return range(2 if rows.several else 1)


def _slice(tensor: Tensor, rows: Rows) -> Tensor:
    """The rows of one pass: a view, whatever number the tensor has of them."""
    if rows.in_pass is None:
        return tensor
    return tensor.as_strided((rows.in_pass, *tensor.shape[1:]), (0, *tensor.stride()[1:]))


# -- TRL from 1.16 on -------------------------------------------------------------------------------------------------------------------


def tiles(rows: Rows) -> type[torch.autograd.Function]:
    """`ChunkedLogProbFunction` with Triton's kernels, which allocate nothing.

    Source: trl 1.16, kernels/chunked_logprob.py, ChunkedLogProbFunction.
    """

    class Tiles(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = (),
        ) -> tuple[Tensor | None, ...]:
            ctx.set_materialize_grads(False)
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
            vocabulary = weight.shape[0]
            statistics = [torch.zeros(hidden.shape[0], dtype=torch.float32) for _ in range(7)]
            buffer = torch.empty((rows.in_pass or hidden.shape[0], chunk_size), dtype=dtype)
            for _ in _passes(rows):
                chunk = _slice(hidden, rows).to(dtype)
                for start in range(0, vocabulary, chunk_size):
                    for part in (weight, bias):
                        columns = None if part is None else part[start : start + chunk_size].to(dtype)
                        del columns
            running_max, sum_exp, x_sum_exp, sq_sum_exp, z_sum, before_target, target_logit = statistics
            log_z = running_max + torch.log(sum_exp)
            logprobs = target_logit - log_z
            entropy = log_z - x_sum_exp / sum_exp if "entropy" in outputs else None
            squares = torch.log(sq_sum_exp) - 2 * torch.log(sum_exp) if "log_sum_sq_probs" in outputs else None
            mean_logits = z_sum / vocabulary if "mean_logits" in outputs else None
            is_top1 = (target_logit >= running_max) & (target_logit > before_target) if "is_top1" in outputs else None
            ctx.save_for_backward(hidden, weight, bias, targets, log_z, log_z if entropy is None else entropy)
            ctx.compute_dtype, ctx.chunk_size = dtype, chunk_size
            ctx.mark_non_differentiable(*(x for x in (squares, mean_logits, is_top1) if x is not None))
            del buffer, chunk
            return logprobs, entropy, squares, mean_logits, is_top1

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            hidden, weight, bias, _, _, _ = ctx.saved_tensors
            dtype, chunk_size = ctx.compute_dtype, ctx.chunk_size
            inputs = (hidden, weight, bias)
            sums = [
                torch.zeros(t.shape, dtype=torch.float32) if needed else None
                for t, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)
            ]
            buffer = torch.empty((rows.in_pass or hidden.shape[0], chunk_size), dtype=dtype)
            contiguous = [g.float().contiguous() for g in gradients[:2] if g is not None]
            columns = None
            for _ in _passes(rows):
                chunk = _slice(hidden, rows).to(dtype)
                for start in range(0, weight.shape[0], chunk_size):
                    columns = weight[start : start + chunk_size].to(dtype)  # the one before is alive until this one is there
                    if bias is not None:
                        added = bias[start : start + chunk_size].to(dtype)
                        del added
                    if sums[2] is not None:
                        summed = buffer[:, : weight.shape[0] - start].sum(dim=0, dtype=torch.float32)
                        del summed
            results = [None if s is None or t is None else s.to(t.dtype) for s, t in zip(sums, inputs, strict=True)]
            del buffer, contiguous, columns, chunk
            return (*results, None, None, None, None, None, None)

    return Tiles


def _yes(_: object) -> bool:  # a mock would keep its arguments, tensors among them
    return True


@contextmanager
def trl_head(rows: Rows) -> Iterator[None]:
    """TRL's own head takes the path of a card with Triton.

    Source: trl 1.16, trainer/utils.py, add_fused_lm_head.
    """
    import trl.trainer.utils as trl_utils

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(trl_utils, "_use_triton", _yes))
        stack.enter_context(mock.patch.object(trl_utils, "_ChunkedLogProbFunction", tiles(rows)))
        yield


# -- TRL 1.4 to 1.15 --------------------------------------------------------------------------------------------------------------------


def chunked_forward(rows: Rows) -> Forward:
    """The forward that `chunked_nll` gave to a causal language model.

    Source: trl 1.9, trainer/sft_trainer.py, _patch_chunked_ce_lm_head and _chunked_cross_entropy_loss.
    """

    def forward(self: Any, *, labels: Tensor, num_items_in_batch: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        kwargs["use_cache"] = False
        hidden_states = self.base_model(**kwargs).last_hidden_state
        head = self.get_output_embeddings()
        hidden = hidden_states[..., :-1, :].reshape(-1, hidden_states.size(-1))
        labels = labels[..., 1:].reshape(-1)
        valid = labels != -100
        counts = [valid.sum()]
        order = valid.to(torch.int8).argsort(descending=True, stable=True)
        hidden, labels = hidden[order], labels[order]
        counts.append((counts[0] / CHUNK_ROWS).ceil().to(torch.int64) * CHUNK_ROWS)
        loss, correct, entropy = (hidden.new_zeros((), dtype=torch.float32) for _ in range(3))
        config = self.config.get_text_config()
        scale, cap = getattr(config, "logit_scale", 1.0), getattr(config, "final_logit_softcapping", None)
        for number in _passes(rows):
            start = number * (rows.in_pass or 0)
            chunk, targets = (t[start : start + rows.in_pass] if rows.in_pass else t[:] for t in (hidden, labels))
            results = checkpoint(_chunk, chunk, head.weight, head.bias, targets, scale, cap, use_reentrant=False)
            loss, correct, entropy = loss + results[0], correct + results[1], entropy + results[2]
        del counts
        return CausalLMOutputWithPast(loss=loss / num_items_in_batch)

    return forward


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logit_scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Source: trl 1.9, trainer/sft_trainer.py, _chunk."""
    logits = hidden.float() @ weight.float().t()
    if bias is not None:
        logits = logits + bias.float()
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = nn.functional.log_softmax(logits, dim=-1)
    loss = nn.functional.nll_loss(log_p, labels, ignore_index=-100, reduction="sum")
    valid = labels != -100
    correct = ((logits.argmax(dim=-1) == labels) & valid).sum().float()
    entropy = (-(log_p.exp() * log_p).sum(dim=-1) * valid).sum()
    return loss, correct, entropy


# -- Liger ------------------------------------------------------------------------------------------------------------------------------


def liger_forward(rows: Rows) -> Forward:
    """The forward that Liger gives to a causal language model, its fused loss only: other kernels of Liger are not applied.

    Source: liger-kernel 0.8, transformers/model/llama.py, lce_forward; transformers/model/loss_utils.py, LigerForCausalLMLoss.
    """
    function = _liger_function(rows)

    def forward(self: Any, *, labels: Tensor, num_items_in_batch: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        hidden = self.base_model(**kwargs)[0]
        head = self.get_output_embeddings()
        labels = nn.functional.pad(labels, (0, 1), value=-100)
        shifted = labels[..., 1:].contiguous().view(-1)
        loss = function.apply(hidden.view(-1, hidden.shape[-1]), head.weight, shifted, head.bias)
        return CausalLMOutputWithPast(loss=loss / num_items_in_batch)

    return forward


def _liger_function(rows: Rows) -> Any:
    class LinearCrossEntropy(torch.autograd.Function):
        """Source: liger-kernel 0.8, ops/fused_linear_cross_entropy.py, fused_linear_cross_entropy_forward and …_backward."""

        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
            grad_hidden = torch.zeros_like(hidden)
            grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
            grad_bias = torch.zeros_like(bias) if bias is not None else None
            losses = torch.zeros(hidden.shape[0], dtype=torch.float32)
            mask = target != -100
            count = mask.sum()
            del count  # read at once
            grad_logits = None
            for _ in _passes(rows):
                chunk = _slice(hidden, rows)
                logits = chunk @ weight.t()  # the logits of the pass before are alive until these are there, and `grad_logits` longer
                if bias is not None:
                    logits = logits + bias
                logits = logits.contiguous()
                grad_logits = logits
                product = grad_logits @ weight
                del product
                if grad_weight is not None:
                    grad_weight += torch.mm(grad_logits.t(), chunk).float()
                if grad_bias is not None:
                    summed = grad_logits.sum(dim=0)
                    del summed
            loss = torch.sum(losses)
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
            del mask, grad_logits, logits
            return loss

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
            return grad_hidden, grad_weight, None, grad_bias

    return LinearCrossEntropy


@contextmanager
def forward_replaced(model: Any, forward: Forward) -> Iterator[None]:
    """Gives a model another forward for a while, as libraries do: on the object itself."""
    before = model.__dict__.get("forward")
    model.forward = MethodType(forward, model)
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before
