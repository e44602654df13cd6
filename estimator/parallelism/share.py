"""What one rank holds, where one card alone would hold everything."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType

from estimator.estimate import Notice
from estimator.phases import Item, Phase
from estimator.static_memory import StaticMemory
from estimator.storage import StoredTensor

STEP_PHASES = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One rank's part of the static memory, and what exchanging the rest takes."""

    tensors: tuple[StoredTensor, ...]
    """As the operators of the step see them: gathered, and cast."""
    stored: Mapping[Item, int]
    """Between steps [bytes]."""
    gradients_bytes: int
    """At the optimizer's step [bytes]."""
    waiting_gradients_bytes: int
    """From the first micro-batch to the last: those of earlier micro-batches [bytes]."""
    gradients_rest: bool = False
    """Whether they stay from one step to the next forward pass, whatever `zero_grad` does."""
    gradients_have_places: bool
    """Whether gradients move to their place as soon as they are there, so that the step itself holds one at a time."""
    kept_gradients: Fraction = Fraction(0)
    """What a rank keeps of each gradient as the backward pass goes on, where gradients have places that are made only then."""
    keeps_layer_inputs: bool = False
    """Whether inputs of recomputed layers, and their gradients, stay until the backward pass ends."""
    update_temporary_bytes: int
    """Peak of what the optimizer's step allocates and frees [bytes]."""
    loaded: Mapping[Item, int] = field(default_factory=lambda: MappingProxyType({}))
    """After loading, where it differs from what one card loads [bytes]."""
    paged_bytes: int = 0
    loaded_communication_bytes: int = 0
    """While models are made equal before the first step [bytes]."""
    communication: Mapping[Phase, int] = field(default_factory=lambda: MappingProxyType({}))
    """Buckets and gathered parameters, by phase [bytes]."""
    ending_communication_bytes: int = 0
    """As the backward pass ends: beside all gradients, when no activation is left [bytes]."""
    host_bytes: int = 0
    """Pinned memory of the host [bytes]."""
    outside_bytes: int = 0
    """On the device, outside torch's allocator: buffers of NCCL [bytes]."""
    notices: tuple[Notice, ...] = ()


def stored_bytes(static: StaticMemory) -> dict[Item, int]:
    """All that stays on one card between steps, optimizer states included [bytes]."""
    return {
        Item.WEIGHTS: static.weights_bytes,
        Item.QUANTIZATION_STATE: static.quantization_state_bytes,
        Item.BUFFERS: static.buffers_bytes,
        Item.ADAPTER_WEIGHTS: static.adapter_weights_bytes,
        Item.OPTIMIZER_STATES: static.optimizer_states_bytes,
    }


def whole(static: StaticMemory, *, accumulates: bool) -> Share:
    """Everything, on one card."""
    return Share(
        tensors=static.tensors,
        stored=stored_bytes(static),
        gradients_bytes=static.gradients_bytes,
        waiting_gradients_bytes=static.gradients_bytes if accumulates else 0,
        gradients_have_places=accumulates,
        update_temporary_bytes=static.optimizer_temporary_bytes,
        paged_bytes=static.paged_bytes,
    )
