"""The words of the answer: phases, items, and what a number rests on."""

from enum import StrEnum


class Phase(StrEnum):
    """What the card is doing. Training runs the first five, inference the other three."""

    LOAD = "load"
    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    OPTIMIZER_STEP = "optimizer_step"
    PREFILL = "prefill"
    DECODE = "decode"


class Item(StrEnum):
    """What holds memory."""

    WEIGHTS = "weights"
    QUANTIZATION_STATE = "quantization_state"
    BUFFERS = "buffers"
    ADAPTER_WEIGHTS = "adapter_weights"
    OPTIMIZER_STATES = "optimizer_states"
    GRADIENTS = "gradients"
    ACTIVATIONS = "activations"
    CHECKPOINTS = "checkpoints"
    LOGITS = "logits"
    TEMPORARY = "temporary"
    KV_CACHE = "kv_cache"
    COMMUNICATION = "communication"
    WORKSPACE = "workspace"


class Basis(StrEnum):
    """What a number rests on."""

    EXACT = "exact"
    MODELLED = "modelled"
    TRACED = "traced"
    REPLAYED = "replayed"
    FITTED = "fitted"


LOADED = (Item.WEIGHTS, Item.QUANTIZATION_STATE, Item.BUFFERS, Item.ADAPTER_WEIGHTS)
"""What stays from loading on."""


class Segment(StrEnum):
    """Which part of a step an event belongs to."""

    OUTSIDE = "outside"
    """Embedding, final norm, head, loss, update."""
    FORWARD = "forward"
    """A layer's forward pass, until the next layer begins."""
    BACKWARD = "backward"
    """A layer's backward pass, until the one before begins."""
