"""`vramplan calibrate caps`: what the planner recommends for smaller cards, run under a cap of their memory on the card at hand."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from app.card import HEADROOM_BYTES
from app.plan import plan
from app.prediction import payload_of
from calibration.caps import Proof, Trial, prove
from calibration.card import card_id, card_name, total_bytes
from calibration.case import Case
from calibration.record import Record, RecordFile, environment_here
from calibration.runner import Device, NoDeviceError, Runner
from estimator.errors import RequestError
from estimator.gpus import Gpu, find_gpu
from estimator.planner import Policy

# A dry run knows no card of its own: its trace is of this one, which recipes without a card are answered for.
_TRACED_CARD = "a100-80"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One more run, and where the proofs of the recommendations stand."""

    record: Record
    proofs: tuple[Proof, ...]


def card_at_hand(runner: Runner) -> Gpu:
    """The card whose memory is capped, as the catalogue has it.

    Raises:
        NoDeviceError: if there is none.
        UnknownNameError: if it is not in the catalogue, so that the planner does not know what a process takes on it.
    """
    if runner.device is Device.TRACE:
        return find_gpu(_TRACED_CARD)
    card = card_id(runner.gpu)
    name = card_name(card) if runner.device is Device.CUDA else None
    if name is None:
        raise NoDeviceError("a cap needs an NVIDIA GPU (nvidia-smi names none), or --device trace")
    return find_gpu(name, field="card at hand", total_bytes=total_bytes(card))


def smaller_cards(names: Sequence[str], at_hand: Gpu) -> tuple[Gpu, ...]:
    """Of the cards named, those that have less memory than the one at hand; the smallest first.

    Raises:
        RequestError: if none has.
        UnknownNameError: if one is not in the catalogue.
    """
    found = {gpu.id: gpu for gpu in (find_gpu(name, field="cards") for name in names) if gpu.capacity_bytes < at_hand.capacity_bytes}
    if not found:
        raise RequestError(f"cards: none of {', '.join(names) or 'no cards'} has less memory than {at_hand.name}", field="cards")
    return tuple(sorted(found.values(), key=lambda gpu: gpu.capacity_bytes))


def recommended(
    case: Case, at_hand: Gpu, cap_bytes: int, policy: Policy = Policy.CACHE_KEPT, *, headroom_bytes: int = HEADROOM_BYTES
) -> int:
    """The micro-batch that a plan has for the card at hand when only so much of it may be used; 0 where none fits.

    It is planned for the card at hand, whose kernels and context the run will have: of the smaller card only the memory counts.
    """
    training = {name: value for name, value in case.training.items() if name != "per_device_train_batch_size"}
    kept = at_hand.capacity_bytes - cap_bytes + headroom_bytes
    hardware = {"gpu": at_hand.id, "headroom": kept}
    found = plan({**payload_of(case), "training": training, "hardware": hardware, "policy": policy.value})["plan"]
    return 0 if found is None else int(found["per_device_train_batch_size"])


def recommendations(case: Case, at_hand: Gpu, cap_bytes: int) -> dict[str, int]:
    """What the planner recommends by each policy; and without headroom, of which the runs under the cap leave none."""
    found = {policy.value: recommended(case, at_hand, cap_bytes, policy) for policy in Policy}
    given_back = Policy.CACHE_GIVEN_BACK
    found[f"{given_back.value} without headroom"] = recommended(case, at_hand, cap_bytes, given_back, headroom_bytes=0)
    return found


def trials(cases: Sequence[Case], cards: Sequence[Gpu], at_hand: Gpu) -> Iterator[Trial]:
    """Every case on every card, with the recommendations for it; a case on all cards before the next one, so that a budget reaches each."""
    for case in cases:
        for card in cards:
            planned = recommendations(case, at_hand, card.capacity_bytes)
            yield Trial(card=card.id, planned=planned, case=case.at(batch_size=1, cap_bytes=card.capacity_bytes))


def run(
    found: Iterable[Trial], runner: Runner, records: RecordFile, *, budget_seconds: float, clock: Callable[[], float] = time.monotonic
) -> Iterator[Tried]:
    """Runs what the trials still want and appends each record before it is told of; what the file has an answer for is not run again.

    Args:
        found: worked out one after another, as they are come to: a plan takes seconds.
        budget_seconds: that runs may take together; after it none is begun, and nothing more is planned. Planning is not counted.
    """
    spent = 0.0
    key = environment_here(gpu=card_name(card_id(runner.gpu)) if runner.device is Device.CUDA else None).key
    known = [one for one in records if one.kind is runner.kind and one.environment is not None and one.environment.key == key]

    def measure(case: Case) -> Record | None:
        nonlocal spent
        if spent >= budget_seconds:
            return None
        started = clock()
        record = runner.run(case)
        spent += clock() - started
        return record

    for trial in found:
        for record, found_of in prove(trial, known, measure):
            records.append(record)
            known.append(record)
            yield Tried(record=record, proofs=found_of)
        if spent >= budget_seconds:
            return
