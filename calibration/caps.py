"""The proof under a cap: a process held to the memory of a smaller card runs what the planner recommends for it, and then a little more.

The recommendation of each policy must not run out, and one that leaves room for the allocator's cache must not have it given back; the next
larger micro-batch should. What lies between is looked for, so that the report can say how tight the recommendations are.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from calibration.case import Case
from calibration.record import Kind, Outcome, Record

MAX_RUNS = 14
"""Micro-batches tried for one case on one card at most."""
CACHE_KEPT = "cache_kept"
"""The policy that asks for room for the allocator's cache, the planner's own where none is named."""


class Verdict(StrEnum):
    """What the runs say of one recommendation."""

    HELD = "held"
    GAVE_BACK = "gave its cache back"  # ran, though there should have been room for what is cached
    RAN_OUT = "ran out"
    OPEN = "open"  # not run yet, or it failed for another reason than memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One case on one card, with the recommendations to be proved."""

    card: str
    case: Case
    """Under the cap, at any micro-batch."""
    planned: Mapping[str, int]
    """Recommended micro-batch by policy; 0 where the planner says that none fits."""

    def at(self, batch_size: int) -> Case:
        return self.case.at(batch_size=batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Micro-batches tried under one cap, in order."""

    ran: tuple[int, ...]
    ran_out: tuple[int, ...]
    retried: tuple[int, ...]
    """Those that ran, but had to give the allocator's cache back to make room."""

    @property
    def largest(self) -> int | None:
        """The true maximum: the micro-batch that ran while the next did not; None where it was not found."""
        return _last(self.ran, self.ran_out)

    @property
    def largest_unpressed(self) -> int | None:
        """The same of those that ran with their cache kept."""
        return _last([size for size in self.ran if size not in self.retried], [*self.retried, *self.ran_out])

    def following(self, planned: Sequence[int]) -> int | None:
        """What to run to know more: the recommendations, ever larger ones until one fails, halves of what is between, and then halves
        towards the first whose cache is given back.

        None once both maxima are known.
        """
        for size in planned:
            if size and size not in {*self.ran, *self.ran_out}:
                return size
        below, above = max(self.ran, default=0), min(self.ran_out, default=0)
        if not above:
            return 2 * below - max(planned, default=0) + 1 if below else 1
        if above - below > 1:
            return (below + above) // 2
        pressed = min([*self.retried, *self.ran_out])
        kept = max((size for size in self.ran if size < pressed), default=0)
        return (kept + pressed) // 2 if pressed - kept > 1 else None


def _last(ran: Sequence[int], others: Sequence[int]) -> int | None:
    first = min(others, default=0)
    last = max((size for size in ran if not first or size < first), default=0)
    return last if last + 1 == first else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A recommendation and what the runs under its cap showed."""

    card: str
    case: Case
    policy: str
    planned: int
    runs: Runs

    @property
    def verdict(self) -> Verdict:
        runs = self.runs
        if self.planned == 0:
            return Verdict.HELD if runs.ran or runs.ran_out else Verdict.OPEN
        if any(size <= self.planned for size in runs.ran_out):
            return Verdict.RAN_OUT
        if self.planned not in runs.ran:
            return Verdict.OPEN
        return Verdict.GAVE_BACK if self.policy == CACHE_KEPT and self.planned in runs.retried else Verdict.HELD

    @property
    def tightness(self) -> float | None:
        """Recommended over true maximum; above 1 where the recommendation ran out."""
        return self.planned / self.runs.largest if self.runs.largest else None

    @property
    def tightness_unpressed(self) -> float | None:
        """Recommended over the largest that ran with its cache kept."""
        return self.planned / self.runs.largest_unpressed if self.runs.largest_unpressed else None


def runs_of(trial: Trial, records: Iterable[Record]) -> Runs:
    """What records say of one case under one cap."""
    known = {record.case_hash: record for record in records if record.outcome in (Outcome.OK, Outcome.OOM)}
    sizes = sorted({record.case.batch_size for record in known.values() if record.case.cap_bytes == trial.case.cap_bytes})
    seen = {size: known[at] for size in sizes if (at := trial.at(size).hash) in known}
    return Runs(
        ran=tuple(size for size, record in seen.items() if record.outcome is Outcome.OK),
        ran_out=tuple(size for size, record in seen.items() if record.outcome is Outcome.OOM),
        retried=tuple(size for size, record in seen.items() if record.outcome is Outcome.OK and _retried(record)),
    )


def _retried(record: Record) -> bool:
    return record.figures is not None and bool(record.figures.num_allocation_retries)


def proofs_of(trial: Trial, records: Iterable[Record]) -> tuple[Proof, ...]:
    """What records say of the recommendations, policy by policy."""
    runs = runs_of(trial, records)
    return tuple(
        Proof(card=trial.card, case=trial.case, policy=policy, planned=planned, runs=runs) for policy, planned in trial.planned.items()
    )


def prove(trial: Trial, known: Sequence[Record], measure: Callable[[Case], Record | None]) -> Iterator[tuple[Record, tuple[Proof, ...]]]:
    """Runs what recommendations still want, one case after another.

    Args:
        trial: the recommendations.
        known: records of earlier runs on the same card with the same libraries.
        measure: runs one case; None where there is no time left.

    Yields:
        Each new record with what is known after it.
    """
    records = list(known)
    for _ in range(MAX_RUNS):
        size = runs_of(trial, records).following([*trial.planned.values()])
        record = None if size is None else measure(trial.at(size))
        if record is None:
            return
        told = {"cap_card": trial.card, "planned_batch_size": trial.planned.get(CACHE_KEPT), "planned_by_policy": dict(trial.planned)}
        record = record.model_copy(update={"provenance": record.provenance.model_copy(update=told)})
        records.append(record)
        yield record, proofs_of(trial, records)
        if record.outcome not in (Outcome.OK, Outcome.OOM):
            return  # a failure says nothing about memory, and would come again


def proofs(records: Iterable[Record]) -> tuple[Proof, ...]:
    """All recommendations that capped records tell of, card by card and stack by stack; of several for one cap the last."""
    environments: dict[object, list[Record]] = {}
    for record in records:
        if record.case.cap_bytes is not None and record.provenance.cap_card is not None and record.environment is not None:
            environments.setdefault((record.kind, record.environment.key), []).append(record)
    return tuple(proof for own in environments.values() for trial in _trials(own) for proof in proofs_of(trial, own))


def _trials(records: Iterable[Record]) -> Iterable[Trial]:
    found: dict[str, Trial] = {}
    for record in sorted(records, key=lambda record: record.provenance.started_at):
        told = record.provenance
        planned = told.planned_by_policy or {CACHE_KEPT: told.planned_batch_size or 0}
        trial = Trial(card=told.cap_card or "", case=record.case, planned=planned)
        found[trial.at(1).hash] = trial
    return found.values()


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All proofs of one policy in a few numbers."""

    tried: int
    ran_out: int
    gave_back: int
    """Of those that should keep their cache, how many had it given back."""
    cards: tuple[str, ...]
    tightness: tuple[float, ...]
    """Recommended over true maximum, where the maximum is known and the recommendation held; the least first."""
    tightness_unpressed: tuple[float, ...]
    """The same over the largest that ran with its cache kept."""
    none_fits: int
    """Times the planner said that nothing fits."""
    wrongly_refused: int
    """Of them, how often something did run: with its cache kept, where room for it is asked for."""


def summary(found: Sequence[Proof]) -> Summary:
    """What proofs of one policy come to; open ones are left out."""
    closed = [proof for proof in found if proof.verdict is not Verdict.OPEN]
    refused = [proof for proof in closed if proof.planned == 0]
    recommended = [proof for proof in closed if proof.planned > 0]
    survived = [proof for proof in recommended if proof.verdict is not Verdict.RAN_OUT]
    return Summary(
        tried=len(recommended),
        ran_out=len(recommended) - len(survived),
        gave_back=sum(proof.verdict is Verdict.GAVE_BACK for proof in recommended),
        cards=tuple(dict.fromkeys(proof.card for proof in closed)),
        tightness=tuple(sorted(p.tightness for p in survived if p.tightness is not None)),
        tightness_unpressed=tuple(sorted(p.tightness_unpressed for p in survived if p.tightness_unpressed is not None)),
        none_fits=len(refused),
        wrongly_refused=sum(_is_wrongly_refused(proof) for proof in refused),
    )


def _is_wrongly_refused(proof: Proof) -> bool:
    runs = proof.runs
    return any(proof.policy != CACHE_KEPT or size not in runs.retried for size in runs.ran)


def sentences(found: Sequence[Proof], kind: Kind) -> list[str]:
    """All proofs for people, policy by policy, with what they rest on."""
    if not found:
        return ["no recommendation was run under a cap yet"]
    policies = dict.fromkeys(proof.policy for proof in found)
    return [_sentence(policy, [proof for proof in found if proof.policy == policy], kind) for policy in policies]


def _sentence(policy: str, found: Sequence[Proof], kind: Kind) -> str:
    basis = "measured" if kind is Kind.MEASURED else "simulated (traced, nothing was measured)"
    all_ = summary(found)
    told = f"{policy}, {basis}: {all_.tried} recommendations on {len(all_.cards)} card sizes, {all_.ran_out} ran out of memory"
    if policy == CACHE_KEPT:
        told += f", {all_.gave_back} gave their cache back"
    told += _shares("true maximum", all_.tightness)
    if policy == CACHE_KEPT:
        told += _shares("largest that keeps its cache", all_.tightness_unpressed)
    if all_.none_fits:
        told += f"; {all_.none_fits} times none was said to fit, {all_.wrongly_refused} of them wrongly"
    return told


def _shares(of: str, shares: Sequence[float]) -> str:
    if not shares:
        return ""
    return f"; recommended / {of}: median {median(shares):.0%}, least {shares[0]:.0%} of {len(shares)} where it is known"
