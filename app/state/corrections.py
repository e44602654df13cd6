"""Corrections with their history: proposed by a fit, put in force through a gate, taken back by hand."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, select, update

from app.prediction import predict
from app.state import measurements
from app.state.database import Database
from app.state.tables import CORRECTIONS, CURRENT, EVENTS
from calibration.comparison import Comparison, compare, rows_of
from calibration.fit import errors
from calibration.gate import Contribution, Verdict, judge, within_influence
from calibration.prediction import Predict
from estimator.errors import RequestError
from estimator.fitted import Corrections, dumped, parsed


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of the history."""

    version: str
    action: str
    """`activated`, `refused` or `rolled_back`."""
    reason: str
    at: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a fit came to."""

    version: str
    verdict: Verdict


def current(database: Database) -> Corrections | None:
    """The corrections in force."""
    with database.reading() as connection:
        text = connection.execute(select(CORRECTIONS.c.corrections).join(CURRENT, CURRENT.c.version == CORRECTIONS.c.version)).scalar()
    return None if text is None else parsed(text)


def current_version(database: Database) -> str | None:
    """Which corrections are in force."""
    with database.reading() as connection:
        found = connection.execute(select(CURRENT.c.version)).scalar()
    return None if found is None else str(found)


def history(database: Database, *, limit: int = 100) -> list[Event]:
    """What happened, the newest first."""
    with database.reading() as connection:
        rows = connection.execute(select(EVENTS).order_by(EVENTS.c.id.desc()).limit(limit)).all()
    return [Event(version=row.version, action=row.action, reason=row.reason, at=row.at) for row in rows]


def propose(database: Database, *, date: str | None = None, predicting: Predict = predict) -> Proposal:
    """Fits all measurements that count, and puts the result in force if the gate lets it through. Either way it is kept, with the reason.

    Args:
        database: with the measurements.
        date: of the fit, ISO 8601; today if None.
        predicting: gives predictions.
    """
    contributed = list(measurements.counting(database))
    whose = {id(one.record): one for one in contributed}
    rows, _ = rows_of([one.record for one in contributed], predicting)
    used = within_influence(
        [Contribution(row=row, contributor=whose[id(row.record)].key_id, is_trusted=whose[id(row.record)].is_trusted) for row in rows]
    )
    found = compare(used, date=date)
    in_force = current(database)
    before = None if in_force is None else [abs(error.allocated) for error in errors(used, in_force)]
    verdict = judge(found, in_force=before)
    keep(database, found.corrections, verdict, report=_report(found, verdict))
    return Proposal(version=found.corrections.version, verdict=verdict)


def keep(database: Database, corrections: Corrections, verdict: Verdict, *, report: Mapping[str, Any]) -> None:
    """Writes corrections and what the gate says of them, in one transaction."""
    with database.writing() as connection:
        known = connection.execute(select(CORRECTIONS.c.version).where(CORRECTIONS.c.version == corrections.version)).scalar()
        if known is None:  # a version names its records: the same ones give the same factors
            row = {"corrections": dumped(corrections), "report": json.dumps(report), "created_at": time.time()}
            connection.execute(insert(CORRECTIONS).values(version=corrections.version, **row))
        if verdict.is_accepted:
            _put_in_force(connection, corrections.version)
        _note(connection, corrections.version, "activated" if verdict.is_accepted else "refused", verdict.reason)


def roll_back(database: Database, reason: str) -> str | None:
    """Puts what was in force before back, or nothing where nothing was.

    Returns:
        The version now in force.

    Raises:
        RequestError: if nothing is in force.
    """
    with database.writing() as connection:
        now = connection.execute(select(CURRENT.c.version)).scalar()
        if now is None:
            raise RequestError("corrections: none are in force")
        taken_back = select(EVENTS.c.version).where(EVENTS.c.action == "rolled_back")
        earlier = connection.execute(
            select(EVENTS.c.version)
            .where(EVENTS.c.action == "activated", EVENTS.c.version != now, EVENTS.c.version.not_in(taken_back))
            .order_by(EVENTS.c.id.desc())
            .limit(1)
        ).scalar()
        _put_in_force(connection, earlier)
        _note(connection, now, "rolled_back", reason)
    return None if earlier is None else str(earlier)


def _put_in_force(connection: Connection, version: str | None) -> None:
    connection.execute(update(CURRENT).where(CURRENT.c.id == 1).values(version=version))


def _note(connection: Connection, version: str, action: str, reason: str) -> None:
    connection.execute(insert(EVENTS).values(version=version, action=action, reason=reason[:1000], at=time.time()))


def _report(found: Comparison, verdict: Verdict) -> dict[str, Any]:
    return {
        "accepted": verdict.is_accepted,
        "reason": verdict.reason,
        "coverage": found.coverage,
        "bugs": [f"{bug.model}: {bug.term}" for bug in found.bugs],
        "spreads": [
            {"name": one.name, "rows": one.num_rows, "median": one.median, "worst_under": one.worst_under, "worst_over": one.worst_over}
            for one in found.spreads
        ],
    }
