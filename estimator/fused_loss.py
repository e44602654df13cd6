"""Losses that never hold the logits of all tokens: TRL's tiles, TRL's checkpointed chunks, Liger's fused linear cross-entropy.

They go through the scored positions pass by pass. What a pass allocates is the same in all, so two are run where there are more: the
second begins while variables of the first are still alive, and the last one is taken to be full.

Legend: T = B·S tokens, N = B·(S - 1) scored positions, V vocabulary, h hidden size.
"""

from dataclasses import dataclass

from estimator.dtypes import DType
from estimator.extent import Extent
from estimator.loss import label_logits
from estimator.operators import (
    add,
    cast,
    custom,
    linear,
    lower_precision,
    mean,
    multiply,
    negate,
    promoted,
    relaid,
    saving_output,
    scale,
    transposed,
)
from estimator.phases import Item
from estimator.tape import Gradients, Node, Parameter, Value
from estimator.units import ceil_div

# Source: trl, kernels/chunked_logprob.py, TOKEN_CHUNK_SIZE; trainer/utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE.
TILE_ROWS = 4096
TILE_COLUMNS = 32768
# Source: trl 1.4 to 1.15, trainer/sft_trainer.py, _CHUNKED_LM_HEAD_CHUNK_SIZE.
CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The output layer, whose tensors these losses use without calling it."""

    weight: Parameter
    """(V, h)"""
    bias: Parameter | None
    width: int
    vocabulary: int

    def rows(self, hidden: Value, in_pass: int | None) -> Extent:
        """Rows of one pass over `hidden`; with None all of them."""
        return hidden.extent.scaled(1, self.width) if in_pass is None else Extent(in_pass)


def scored(hidden: Value) -> Value:
    """`hidden[:, :-1][mask]`: the positions whose next token has a label; the gradient is put into zeros of the size before, twice.

    Source: trl 1.16, trainer/utils.py, add_fused_lm_head; trl 1.9, trainer/sft_trainer.py, _chunked_cross_entropy_loss.
    """
    tape = hidden.tape
    whole = hidden.extent
    extent = whole._replace(shift=-1)

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        indexed = tape.new(extent, gradient.dtype)
        sliced = tape.new(whole, gradient.dtype)
        del saved, indexed
        return [sliced]

    rows = Extent(1, 1, 1, shift=-1)
    indices = [tape.new(rows, DType.INT64) for _ in range(2)]
    node = tape.node([hidden], backward, indices)
    y = tape.new(extent, hidden.dtype)
    y.node = node
    return y


def tiled_loss(hidden: Value, head: Head, in_pass: int | None) -> Value:
    """TRL ≥ 1.16: log-probabilities from tiles of 4,096 tokens by 32,768 entries, recomputed backward.

    Args:
        hidden: (T, h).
        in_pass: 4,096, or None while no more are scored.

    Source: trl 1.16, kernels/chunked_logprob.py, ChunkedLogProbFunction.
    """
    tape = hidden.tape
    hidden = scored(hidden)
    compute = _compute_dtype(hidden)
    rows, all_rows, width = head.rows(hidden, in_pass), head.rows(hidden, None), head.width
    tile, chunk = rows.scaled(TILE_COLUMNS), rows.scaled(width)
    slices = [Extent(min(head.vocabulary - start, TILE_COLUMNS) * width) for start in range(0, head.vocabulary, TILE_COLUMNS)]
    parts = [head.weight] if head.bias is None else [head.weight, head.bias]
    inputs = [(x.extent, x.dtype, x.requires_grad) for x in (hidden, *parts)]

    converts_hidden, converts_weight = hidden.dtype is not compute, head.weight.dtype is not compute

    def chunk_cast() -> Value | None:
        return tape.new(chunk, compute) if converts_hidden else None

    def slice_cast(extent: Extent) -> Value | None:
        return tape.new(extent, compute) if converts_weight else None

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        sums = [tape.new(extent, DType.FLOAT32) if needed else None for extent, _, needed in inputs]
        taken = tape.new(tile, compute, Item.LOGITS)
        hidden_chunk = columns = None
        for _ in _passes(in_pass):
            hidden_chunk = chunk_cast()
            for extent in slices:
                columns = slice_cast(extent)  # the one before is alive until this one is there
        results = [s if s is None or of is DType.FLOAT32 else tape.new(extent, of) for s, (extent, of, _) in zip(sums, inputs, strict=True)]
        del saved, sums, taken, hidden_chunk, columns
        return results

    targets = tape.new(all_rows, DType.INT64)
    statistics = [tape.new(all_rows, DType.FLOAT32) for _ in range(7)]
    taken = tape.new(tile, compute, Item.LOGITS)
    hidden_chunk = None
    for _ in _passes(in_pass):
        hidden_chunk = chunk_cast()
        for extent in slices:
            columns = slice_cast(extent)
            del columns
    normalizers = tape.new(all_rows, DType.FLOAT32)
    log_probabilities = custom([hidden, *parts], all_rows, DType.FLOAT32, backward, saved=[hidden, targets, normalizers])
    del statistics, taken, hidden_chunk
    return _summed(log_probabilities)


def chunked_loss(hidden: Value, head: Head, in_pass: int | None, *, scaled: bool, softcap: bool) -> Value:
    """TRL 1.4 to 1.15: chunks of 256 tokens, each a checkpointed float32 product with a float32 copy of the head.

    The gradients of the chunks, each of the size of all scored hidden states and of the head, are added up while the next one is made.

    Args:
        in_pass: 256, or None while no more are scored.
        scaled: whether logits are multiplied by a number.
        softcap: whether they are divided by a number, sent through tanh, and multiplied again.

    Source: trl 1.9, trainer/sft_trainer.py, _chunked_cross_entropy_loss and _chunk.
    """
    tape = hidden.tape
    hidden = scored(hidden)
    extent, dtype = hidden.extent, hidden.dtype
    rows = head.rows(hidden, in_pass)

    def sliced(node: Node, gradient: Value) -> Gradients:
        return [tape.new(extent, dtype)]

    def chunk(x: Value) -> Value:
        weight = cast(head.weight, DType.FLOAT32)
        weight = relaid(weight) if isinstance(weight, Parameter) and weight.requires_grad else transposed(weight)
        full = cast(x, DType.FLOAT32)
        logits = label_logits(linear(full, weight, None, head.width, head.vocabulary))
        del full, weight
        if head.bias is not None:
            logits = label_logits(add(logits, cast(head.bias, DType.FLOAT32)))
        if scaled:
            logits = label_logits(scale(logits))
        if softcap:
            for step in (scale, saving_output, scale):
                logits = label_logits(step(logits))
        log_probabilities = _log_softmax(logits)
        loss = _picked(log_probabilities, rows)
        valid = tape.new(rows, DType.BOOL)
        # The entropy is only shown, and yet autograd follows it.
        product = label_logits(multiply(label_logits(saving_output(log_probabilities)), log_probabilities))
        entropy = mean(product, head.vocabulary)
        del product
        entropy = multiply(negate(entropy), valid)
        del logits, entropy
        return loss

    loss: Value | None = None
    for _ in _passes(in_pass):
        part = Value(tape, rows.scaled(head.width), dtype, hidden.storage, tape.node([hidden], sliced))
        one = tape.checkpoint(chunk, part, use_reentrant=False)
        loss = one if loss is None else add(loss, one)
    assert loss is not None
    return loss


def liger_loss(hidden: Value, head: Head, in_pass: int | None) -> Value:
    """Liger's fused linear cross-entropy: logits of one chunk at a time; the gradients are made in the forward pass and kept.

    Args:
        hidden: (T, h), the last token of a sequence among them.
        in_pass: rows of a chunk, or None where there is one chunk.

    Source: liger-kernel 0.8, ops/fused_linear_cross_entropy.py, fused_linear_cross_entropy_forward.
    """
    tape = hidden.tape
    compute = _compute_dtype(hidden)
    rows, weight = head.rows(hidden, in_pass), head.weight
    inputs: list[Value] = [hidden, weight] if head.bias is None else [hidden, weight, head.bias]
    needed = [x.requires_grad or x is not weight for x in inputs]
    all_rows = head.rows(hidden, None)

    def backward(node: Node, gradient: Value) -> Gradients:
        gradients = node.unpacked()
        return [gradients.pop(0).view() if made else None for made in needed]

    labels = [tape.new(all_rows, DType.INT64) for _ in range(2)]
    kept = [tape.new(x.extent, x.dtype) for x, made in zip(inputs, needed, strict=True) if made]
    losses = tape.new(all_rows, DType.FLOAT32)
    mask = tape.new(all_rows, DType.BOOL)
    chunk = rows.scaled(head.width)
    logits: Value | None = None
    for _ in _passes(in_pass):
        # The logits of the pass before are alive until these are there, and in the name of their gradient until the bias is added.
        gradient = logits
        logits = _liger_logits(hidden, head, rows, compute)
        if head.bias is not None:
            logits = tape.new(logits.extent, promoted(compute, head.bias.dtype), Item.LOGITS)
        gradient = logits
        operands = [_converted(logits, logits.extent, compute), lower_precision(weight)]
        product = tape.new(chunk, compute)
        del operands, product
        if weight.requires_grad:
            casts = [_converted(logits, logits.extent, compute), _converted(hidden, chunk, compute)]
            product = tape.new(weight.extent, compute)
            del casts
            summed = cast(product, DType.FLOAT32)
            del product, summed
    loss = custom(inputs, Extent(1), DType.FLOAT32, backward, saved=kept)
    del losses, labels, mask, gradient, logits
    return loss


def _liger_logits(hidden: Value, head: Head, rows: Extent, compute: DType) -> Value:
    """`chunk @ weight.t()`, a view that autocast casts anew."""
    tape = hidden.tape
    casts = [_converted(hidden, rows.scaled(head.width), compute), _converted(head.weight, head.weight.extent, compute)]
    logits = tape.new(rows.scaled(head.vocabulary), compute, Item.LOGITS)
    del casts
    return logits


def _converted(x: Value, extent: Extent, dtype: DType) -> Value | None:
    """A part of `x` in another type, or nothing where it is the type that it has."""
    return None if x.dtype is dtype else x.tape.new(extent, dtype)


def liger_chunk_rows(num_tokens: int, vocabulary: int, width: int) -> int:
    """Tokens per chunk [tokens]: as many as give logits about the size of the hidden states, rounded up to a power of two.

    Source: liger-kernel 0.8, ops/fused_linear_cross_entropy.py, fused_linear_cross_entropy_forward.
    """
    rows = ceil_div(num_tokens, ceil_div(vocabulary, width))
    return min(num_tokens, 1 << (rows - 1).bit_length())


def _passes(in_pass: int | None) -> range:
    return range(1 if in_pass is None else 2)


def _compute_dtype(hidden: Value) -> DType:
    """Of matrix products."""
    tape = hidden.tape
    return tape.autocast_dtype if tape.autocast_enabled and tape.autocast_dtype is not None else hidden.dtype


def _summed(x: Value) -> Value:
    extent = x.extent

    def backward(node: Node, gradient: Value) -> Gradients:
        return [x.tape.new(extent, DType.FLOAT32)]

    return custom([x], Extent(1), DType.FLOAT32, backward)


def _log_softmax(x: Value) -> Value:
    extent, dtype = x.extent, x.dtype
    tape = x.tape

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        result = tape.new(extent, dtype, Item.LOGITS)
        del saved
        return [result]

    node = tape.node([x], backward)
    y = tape.new(extent, DType.FLOAT32, Item.LOGITS)
    tape.save_output(node, y)
    y.node = node
    return y


def _picked(x: Value, rows: Extent) -> Value:
    """`F.nll_loss`"""
    extent = x.extent
    tape = x.tape

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        result = tape.new(extent, DType.FLOAT32, Item.LOGITS)
        del saved
        return [result]

    return custom([x], Extent(1), DType.FLOAT32, backward, saved=[x, tape.new(rows, DType.INT64)])
