"""The card of a request: what it can hold, and what fits."""

from dataclasses import dataclass

from app.request import HardwareFields
from estimator.correction import margin_without_interval
from estimator.gpus import find_gpu
from estimator.units import GIB, MIB

# Kept free on purpose: what a driver update or a desktop may take from a card that was sized to the last byte.
HEADROOM_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU as far as the verdict needs it."""

    id: str | None
    """None when only a capacity was given."""
    name: str
    capacity_bytes: int
    """What CUDA reports as total [bytes]."""
    compute_capability: tuple[int, int] | None = None
    num_multiprocessors: int | None = None
    headroom_bytes: int = HEADROOM_BYTES

    @property
    def usable_bytes(self) -> int:
        """Capacity less headroom [bytes]."""
        return self.capacity_bytes - self.headroom_bytes

    def required_bytes(self, device_bytes: int, device_high_bytes: int | None = None) -> int:
        """What must be usable for a verdict of `fits`: the interval's upper end, or the estimate and a margin [bytes]."""
        return device_high_bytes if device_high_bytes is not None else round(device_bytes * (1 + margin_without_interval().share))

    def verdict(self, device_bytes: int, device_high_bytes: int | None = None) -> str:
        """`fits`, `tight` or `does_not_fit`.

        Args:
            device_bytes: estimate of what the card must hold at the peak [bytes].
            device_high_bytes: upper end of its interval [bytes]; None when there is no interval.
        """
        if device_bytes > self.usable_bytes:
            return "does_not_fit"
        return "fits" if self.required_bytes(device_bytes, device_high_bytes) <= self.usable_bytes else "tight"


def card_of(hardware: HardwareFields | None) -> Card | None:
    """The card that a request names.

    Raises:
        UnknownNameError: if there is no such GPU in the catalogue.
    """
    if hardware is None or (hardware.gpu is None and hardware.capacity_gib is None):
        return None
    if hardware.capacity_gib is not None:
        return Card(id=None, name=f"a card of {hardware.capacity_gib:g} GiB", capacity_bytes=round(hardware.capacity_gib * GIB))
    assert hardware.gpu is not None
    gpu = find_gpu(hardware.gpu)
    return Card(
        id=gpu.id,
        name=gpu.name,
        capacity_bytes=gpu.capacity_bytes,
        compute_capability=gpu.compute_capability,
        num_multiprocessors=gpu.num_sms,
    )
