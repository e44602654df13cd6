"""The proof under a cap: a process held to the memory of a smaller card runs what the planner recommends for it, and then a little more.

The recommendation must not run out; the next larger micro-batch should. What lies between is looked for, so that the report can say how
tight the recommendation is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from calibration.case import Case
from calibration.record import Kind, Outcome, Record

MAX_RUNS = 10
"""Micro-batches tried for one recommendation at most."""


class Verdict(StrEnum):
    """What the runs say of one recommendation."""

    HELD = "held"
    RAN_OUT = "ran out"
    OPEN = "open"  # not run yet, or it failed for another reason than memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One recommendation to be proved: the case at the recommended micro-batch, or at one where none was recommended."""

    card: str
    case: Case
    """Under the cap."""
    planned: int
    """Recommended micro-batch; 0 where the planner says that none fits."""

    def at(self, batch_size: int) -> Case:
        return self.case.at(batch_size=batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A recommendation and what the runs under its cap showed."""

    card: str
    case: Case
    planned: int
    ran: tuple[int, ...]
    """Micro-batches that ran, in order."""
    ran_out: tuple[int, ...]
    """Micro-batches that did not, in order."""

    @property
    def verdict(self) -> Verdict:
        if self.planned == 0:
            return Verdict.HELD if self.ran or self.ran_out else Verdict.OPEN
        if any(size <= self.planned for size in self.ran_out):
            return Verdict.RAN_OUT
        return Verdict.HELD if self.planned in self.ran else Verdict.OPEN

    @property
    def largest(self) -> int | None:
        """The true maximum: the micro-batch that ran while the next did not; None where it was not found."""
        last = max((size for size in self.ran if not self.ran_out or size < self.ran_out[0]), default=0)
        return last if last + 1 in self.ran_out else None

    @property
    def tightness(self) -> float | None:
        """Recommended over true maximum; above 1 where the recommendation ran out."""
        return self.planned / self.largest if self.largest else None

    @property
    def next_micro_batch(self) -> int | None:
        """What to run to know more: the recommendation, the next, then ever larger ones until one fails, and halves of what is between.

        None once the maximum is known.
        """
        if self.planned and self.planned not in {*self.ran, *self.ran_out}:
            return self.planned
        below, above = max(self.ran, default=0), min(self.ran_out, default=0)
        if above:
            return None if above - below <= 1 else (below + above) // 2
        return 2 * below - self.planned + 1 if below else 1


def proof_of(trial: Trial, records: Iterable[Record]) -> Proof:
    """What records say of one recommendation."""
    outcomes = {record.case_hash: record.outcome for record in records if record.outcome in (Outcome.OK, Outcome.OOM)}
    sizes = {record.case.batch_size for record in records if record.case.cap_bytes == trial.case.cap_bytes}
    seen = {size: outcomes.get(trial.at(size).hash) for size in sorted(sizes)}
    return Proof(
        card=trial.card,
        case=trial.case,
        planned=trial.planned,
        ran=tuple(size for size, outcome in seen.items() if outcome is Outcome.OK),
        ran_out=tuple(size for size, outcome in seen.items() if outcome is Outcome.OOM),
    )


def prove(trial: Trial, known: Sequence[Record], measure: Callable[[Case], Record | None]) -> Iterator[tuple[Record, Proof]]:
    """Runs what a recommendation still wants, one case after another.

    Args:
        trial: the recommendation.
        known: records of earlier runs on the same card with the same libraries.
        measure: runs one case; None where there is no time left.

    Yields:
        Each new record with what is known after it.
    """
    records = list(known)
    for _ in range(MAX_RUNS):
        size = proof_of(trial, records).next_micro_batch
        record = None if size is None else measure(trial.at(size))
        if record is None:
            return
        provenance = record.provenance.model_copy(update={"cap_card": trial.card, "planned_batch_size": trial.planned})
        record = record.model_copy(update={"provenance": provenance})
        records.append(record)
        yield record, proof_of(trial, records)
        if record.outcome not in (Outcome.OK, Outcome.OOM):
            return  # a failure says nothing about memory, and would come again


def proofs(records: Iterable[Record]) -> tuple[Proof, ...]:
    """All recommendations that capped records tell of, card by card and stack by stack; of several for one cap the last."""
    environments: dict[object, list[Record]] = {}
    for record in records:
        if record.case.cap_bytes is not None and record.provenance.cap_card is not None and record.environment is not None:
            environments.setdefault((record.kind, record.environment.key), []).append(record)
    return tuple(proof_of(trial, own) for own in environments.values() for trial in _trials(own))


def _trials(records: Iterable[Record]) -> Iterable[Trial]:
    found: dict[str, Trial] = {}
    for record in sorted(records, key=lambda record: record.provenance.started_at):
        told = record.provenance
        trial = Trial(card=told.cap_card or "", case=record.case, planned=told.planned_batch_size or 0)
        found[trial.at(1).hash] = trial
    return found.values()


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All proofs in a few numbers."""

    tried: int
    ran_out: int
    cards: tuple[str, ...]
    tightness: tuple[float, ...]
    """Recommended over true maximum, where the maximum is known and the recommendation held; the least first."""
    none_fits: int
    """Times the planner said that nothing fits."""
    wrongly_refused: int
    """Of them, how often something did run."""


def summary(found: Sequence[Proof]) -> Summary:
    """What proofs come to; open ones are left out."""
    closed = [proof for proof in found if proof.verdict is not Verdict.OPEN]
    refused = [proof for proof in closed if proof.planned == 0]
    recommended = [proof for proof in closed if proof.planned > 0]
    return Summary(
        tried=len(recommended),
        ran_out=sum(proof.verdict is Verdict.RAN_OUT for proof in recommended),
        cards=tuple(dict.fromkeys(proof.card for proof in closed)),
        tightness=tuple(sorted(p.tightness for p in recommended if p.tightness is not None and p.verdict is Verdict.HELD)),
        none_fits=len(refused),
        wrongly_refused=sum(bool(proof.ran) for proof in refused),
    )


def sentence(found: Sequence[Proof], kind: Kind) -> str:
    """All proofs for people, with what they rest on."""
    if not found:
        return "no recommendation was run under a cap yet"
    basis = "measured" if kind is Kind.MEASURED else "simulated (traced, nothing was measured)"
    all_ = summary(found)
    told = f"{basis}: {all_.tried} recommendations on {len(all_.cards)} card sizes, {all_.ran_out} ran out of memory"
    if all_.tightness:
        least, middle = all_.tightness[0], median(all_.tightness)
        told += f"; recommended / true maximum: median {middle:.0%}, least {least:.0%} of {len(all_.tightness)} with a known maximum"
    if all_.none_fits:
        told += f"; {all_.none_fits} times none was said to fit, {all_.wrongly_refused} of them wrongly"
    return told
