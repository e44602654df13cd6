"""Losses that never hold the logits of all tokens: TRL's tiles, TRL's checkpointed chunks, Liger's fused linear cross-entropy.

Legend: T = B·S tokens, V vocabulary, h hidden size.
"""

from estimator.dtypes import DType
from estimator.operators import cast, custom, linear, lower_precision
from estimator.phases import Item
from estimator.tape import Extent, Gradients, Node, Parameter, Value
from estimator.units import ceil_div

# Source: trl, kernels/chunked_logprob.py, TOKEN_CHUNK_SIZE; trainer/utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE.
TILE_ROWS = 4096
_TILE_COLUMNS = 32768
# Source: trl 1.4 to 1.15, trainer/sft_trainer.py, _CHUNKED_LM_HEAD_CHUNK_SIZE.
CHUNK_ROWS = 256


def scored(hidden: Value) -> Value:
    """`hidden[mask]`: the positions with a label, all of them here; its gradient is put into zeros of the full size, twice (index, slice).

    Source: trl, trainer/utils.py, add_fused_lm_head.
    """
    tape = hidden.tape

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        indexed = tape.new(gradient.extent, gradient.dtype)
        sliced = tape.new(gradient.extent, gradient.dtype)
        del saved, indexed
        return [sliced]

    rows = Extent(1, 1, 1)
    indices = [tape.new(rows, DType.INT64) for _ in range(2)]
    node = tape.node([hidden], backward, indices)
    y = tape.new(hidden.extent, hidden.dtype)
    y.node = node
    return y


def tiled_loss(hidden: Value, weight: Parameter, width: int, tile_rows: int | None) -> Value:
    """TRL ≥ 1.16: log-probabilities from tiles of 4,096 tokens by 32,768 entries, recomputed backward.

    Args:
        hidden: (T, h).
        tile_rows: 4,096, or None while there are fewer tokens.

    Source: trl 1.16, kernels/chunked_logprob.py, ChunkedLogProbFunction.
    """
    tape = hidden.tape
    hidden = scored(hidden)
    compute = tape.autocast_dtype if tape.autocast_enabled and tape.autocast_dtype is not None else hidden.dtype
    rows, vector = hidden.extent.scaled(1, width), DType.FLOAT32
    tile = rows.scaled(_TILE_COLUMNS) if tile_rows is None else Extent(tile_rows * _TILE_COLUMNS)
    chunk = hidden.extent if tile_rows is None else Extent(tile_rows * width)
    vocabulary = weight.extent.coefficient // width
    slice_extent = Extent(min(vocabulary, _TILE_COLUMNS) * width)
    extent, dtype, weight_extent, weight_dtype = hidden.extent, hidden.dtype, weight.extent, weight.dtype
    trained = weight.requires_grad

    def buffers() -> list[Value]:
        taken = [tape.new(tile, compute, Item.LOGITS)]
        if dtype is not compute:
            taken.append(tape.new(chunk, compute))
        if weight_dtype is not compute:
            taken.append(tape.new(slice_extent, compute))
        return taken

    def backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        grad_hidden = tape.new(extent, DType.FLOAT32)
        grad_weight = tape.new(weight_extent, DType.FLOAT32) if trained else None
        taken = buffers()
        result = grad_hidden if dtype is DType.FLOAT32 else tape.new(extent, dtype)
        cast_weight = grad_weight if grad_weight is None or weight_dtype is DType.FLOAT32 else tape.new(weight_extent, weight_dtype)
        del saved, taken, grad_hidden, grad_weight
        return [result, cast_weight]

    statistics = [tape.new(rows, vector) for _ in range(7)]
    taken = buffers()
    targets, normalizers = tape.new(rows, DType.INT64), tape.new(rows, vector)
    log_probabilities = custom([hidden, weight], rows, vector, backward, saved=[hidden, targets, normalizers])
    del statistics, taken
    return _summed(log_probabilities)


def chunked_loss(hidden: Value, weight: Parameter, width: int, vocabulary: int) -> Value:
    """TRL 1.4 to 1.15: chunks of 256 tokens, each a checkpointed float32 product with a float32 copy of the head.

    One chunk is run: the others come before or after it in the same memory.

    Source: trl 1.9, trainer/sft_trainer.py, _chunked_cross_entropy_loss.
    """
    tape = hidden.tape
    hidden = scored(hidden)
    extent, dtype = hidden.extent, hidden.dtype
    rows = Extent(CHUNK_ROWS)

    def backward(node: Node, gradient: Value) -> Gradients:
        return [tape.new(extent, dtype)]

    part = Value(tape, rows.scaled(width), dtype, hidden.storage, tape.node([hidden], backward))

    def chunk(x: Value) -> Value:
        logits = linear(cast(x, DType.FLOAT32), cast(weight, DType.FLOAT32), None, width, vocabulary)
        log_probabilities = _log_softmax(logits)
        loss = _picked(log_probabilities, rows)
        entropy = [tape.new(log_probabilities.extent, DType.FLOAT32, Item.LOGITS) for _ in range(2)]
        del entropy
        return loss

    return tape.checkpoint(chunk, part, use_reentrant=False)


def liger_loss(hidden: Value, weight: Parameter, width: int, chunk_rows: int) -> Value:
    """Liger's fused linear cross-entropy: logits of one chunk at a time; the gradients are made in the forward pass and kept.

    Source: liger-kernel 0.8, ops/fused_linear_cross_entropy.py, fused_linear_cross_entropy_forward.
    """
    tape = hidden.tape
    vocabulary = weight.extent.coefficient // width
    hidden, matrix = lower_precision(hidden), lower_precision(weight)
    trained = matrix.requires_grad

    def backward(node: Node, gradient: Value) -> Gradients:
        gradients = node.unpacked()
        return [gradients[0].view(), gradients[1].view() if trained else None]

    kept = [tape.new(hidden.extent, hidden.dtype)]
    if trained:
        kept.append(tape.new(matrix.extent, matrix.dtype))
    losses = tape.new(hidden.extent.scaled(1, width), DType.FLOAT32)
    logits = tape.new(Extent(chunk_rows * vocabulary), hidden.dtype, Item.LOGITS)
    product = tape.new(Extent(chunk_rows * width), hidden.dtype)
    loss = custom([hidden, matrix], Extent(1), DType.FLOAT32, backward, saved=kept)
    del losses, logits, product
    return loss


def liger_chunk_rows(num_tokens: int, vocabulary: int, width: int) -> int:
    """Tokens per chunk [tokens]: as many as give logits about the size of the hidden states, rounded up to a power of two.

    Source: liger-kernel 0.8, ops/fused_linear_cross_entropy.py, fused_linear_cross_entropy_forward.
    """
    rows = ceil_div(num_tokens, ceil_div(vocabulary, width))
    return min(num_tokens, 1 << (rows - 1).bit_length())


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
