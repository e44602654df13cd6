"""From the last hidden state to a loss: logits and what the loss functions make of them.

Legend: T = B·S tokens, V vocabulary, h hidden size.
"""

from collections.abc import Sequence

from estimator.dtypes import DType
from estimator.extent import Extent
from estimator.modules import Modules
from estimator.operators import cast, full_precision, saving_output, scale
from estimator.phases import Item
from estimator.tape import Gradients, Node, Value


def label_logits(value: Value) -> Value:
    """Count a tensor of one element per token and vocabulary entry as `logits`."""
    if value.storage is not None:
        value.storage.relabel(Item.LOGITS)
    return value


def cross_entropy(logits: Value, vocabulary: int) -> Value:
    """`F.cross_entropy`: the log-softmax is kept; the backward pass makes two more tensors of its size. Float32 under autocast.

    Source: torch, derivatives.yaml, _log_softmax and nll_loss_forward.
    """
    tape = logits.tape
    logits = label_logits(full_precision(logits))
    rows = logits.extent.scaled(1, vocabulary)
    extent, dtype = logits.extent, logits.dtype

    def log_softmax_backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        result = label_logits(tape.new(extent, dtype))
        del saved
        return [result]

    def nll_backward(node: Node, gradient: Value) -> Gradients:
        saved = node.unpacked()
        result = label_logits(tape.new(extent, dtype))
        del saved
        return [result]

    node = tape.node([logits], log_softmax_backward)
    log_probabilities = label_logits(tape.new(extent, dtype))
    tape.save_output(node, log_probabilities)
    log_probabilities.node = node
    labels, padded = tape.new(rows, DType.INT64), tape.new(rows, DType.INT64)
    node = tape.node([log_probabilities], nll_backward, [log_probabilities, labels])
    loss = tape.new(Extent(1), dtype)
    loss.node = node
    del padded
    return loss


def head_logits(modules: Modules, head: str, hidden: Value, *, scaled: bool, softcap: bool) -> Value:
    """The head's output, as the model returns it.

    Args:
        scaled: whether it is multiplied by a number.
        softcap: whether it is divided by a number, sent through tanh, and multiplied again.
    """
    logits = label_logits(modules.linear(head, hidden))
    if scaled:
        logits = label_logits(scale(logits))
    if softcap:
        for step in (scale, saving_output, scale):
            logits = label_logits(step(logits))
    return logits


def stock_loss(
    modules: Modules,
    head: str,
    hidden: Value,
    vocabulary: int,
    *,
    shifts_logits: bool,
    softcap: bool,
    scaled: bool,
    keeps_half: bool,
    upcasts: bool,
) -> Sequence[Value]:
    """transformers' ForCausalLMLoss: returns the loss and the logits the model hands back.

    Args:
        shifts_logits: whether the logits (and not the labels) are shifted, by a contiguous copy.
        scaled: whether the head's output is multiplied by a number.
        upcasts: whether the logits are turned into float32 first.
        keeps_half: whether the 16-bit logits outlive their float32 copy (the caller holds them).

    Source: transformers, loss/loss_utils.py, ForCausalLMLoss.
    """
    logits = head_logits(modules, head, hidden, scaled=scaled, softcap=softcap)
    full = label_logits(cast(logits, DType.FLOAT32)) if upcasts else logits
    if not keeps_half:
        logits = full
    upcast = full  # a local of the loss function: it lives until the loss is returned
    if shifts_logits:
        full = label_logits(_copied(full))
    loss = cross_entropy(full, vocabulary)
    del upcast
    return loss, logits


def _copied(x: Value) -> Value:
    """`logits[..., :-1, :].contiguous()`: its gradient is a full tensor with the slice copied in. One sequence is contiguous without its
    last position."""
    tape = x.tape

    def backward(node: Node, gradient: Value) -> Gradients:
        return [label_logits(tape.new(gradient.extent, gradient.dtype))]

    node = tape.node([x], backward)
    y = x.view() if tape.one_sequence else tape.new(x.extent, x.dtype)
    y.node = node
    return y
