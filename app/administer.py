"""`vramplan state …`: keys, quarantine and corrections of a service, on its database."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from app.configuration import Configuration
from estimator.errors import RequestError

if TYPE_CHECKING:
    from app.state.database import Database

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Keys, quarantined measurements and corrections of a service.")


@contextmanager
def _database() -> Iterator["Database"]:
    from app.state.opening import State

    url = Configuration().database
    if url is None:
        raise RequestError("VRAMPLAN_DATABASE_URL: the service keeps no state", field="database_url")
    state = State(url)
    try:
        yield state.ready()
    finally:
        state.close()


@app.command()
def migrate() -> None:
    """Bring the tables up to date, as the service does when it starts."""
    with _database():
        typer.echo("the tables are up to date")


@app.command("new-key")
def new_key(
    name: Annotated[str, typer.Argument(help="whose it is")],
    trusted: Annotated[bool, typer.Option("--trusted", help="what comes with it is the operator's own")] = False,
) -> None:
    """Print a new key; it cannot be shown again."""
    from app.state import keys

    with _database() as database:
        typer.echo(keys.create(database, name, is_trusted=trusted))


@app.command("keys")
def list_keys() -> None:
    """List the keys."""
    from app.state import keys

    with _database() as database:
        for key in keys.known(database):
            marks = [word for word, holds in (("trusted", key.is_trusted), ("revoked", key.is_revoked)) if holds]
            typer.echo(f"{key.id}  {key.name}  {' '.join(marks)}".rstrip())


@app.command("revoke-key")
def revoke_key(key_id: Annotated[str, typer.Argument(help="as `vramplan state keys` lists it")]) -> None:
    """Take a key back."""
    from app.state import keys

    with _database() as database:
        if not keys.revoke(database, key_id):
            raise RequestError(f"{key_id}: no such key, or revoked already")


@app.command()
def quarantine() -> None:
    """List measurements that wait to be looked at."""
    from app.state import measurements

    with _database() as database:
        for posted in measurements.quarantined(database):
            typer.echo(f"{posted.hash}  {'; '.join(posted.reasons)}")


@app.command()
def release(record_hash: Annotated[str, typer.Argument(help="as `vramplan state quarantine` lists it")]) -> None:
    """Let a quarantined measurement count."""
    _decide(record_hash, "released")


@app.command()
def reject(record_hash: Annotated[str, typer.Argument(help="as `vramplan state quarantine` lists it")]) -> None:
    """Keep a quarantined measurement from counting, for good."""
    _decide(record_hash, "rejected")


def _decide(record_hash: str, status: str) -> None:
    from app.state import measurements

    with _database() as database:
        if not measurements.decide(database, record_hash, measurements.Status(status)):
            raise RequestError(f"{record_hash}: not in quarantine")


@app.command()
def fit() -> None:
    """Fit all measurements that count, and put the corrections in force if they predict unseen models better."""
    from app.state import corrections

    with _database() as database:
        proposal = corrections.propose(database)
    typer.echo(f"{proposal.version}: {'in force' if proposal.verdict.is_accepted else 'refused'}; {proposal.verdict.reason}")
    if not proposal.verdict.is_accepted:
        raise typer.Exit(3)


@app.command()
def rollback(reason: Annotated[str, typer.Argument(help="for the history")]) -> None:
    """Put the corrections that were in force before back."""
    from app.state import corrections

    with _database() as database:
        typer.echo(f"in force: {corrections.roll_back(database, reason) or 'none'}")


@app.command()
def history() -> None:
    """Print what happened to corrections, the newest first."""
    from app.state import corrections

    with _database() as database:
        for event in corrections.history(database):
            at = datetime.fromtimestamp(event.at, UTC).isoformat(timespec="seconds")
            typer.echo(f"{at}  {event.action:<12}{event.version}  {event.reason}")
