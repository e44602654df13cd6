"""What outlives a request, on SQLite and on Postgres."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event, func, insert, inspect, select, text

from app.state import corrections, keys, measurements, public
from app.state.database import HEAD, Database
from app.state.measurements import Status
from app.state.opening import State
from app.state.public import SqlInventories, SqlStore
from app.state.tables import CONFIGS, MEASUREMENTS, METADATA
from calibration.gate import Verdict
from estimator.dtypes import DType
from estimator.errors import RequestError, SourceUnavailableError
from estimator.fitted import Corrections
from estimator.sources import safetensors
from estimator.sources.hub import HubConfig
from estimator.sources.resolve import resolve
from tests import postgres
from tests.calibration.test_record import record

PLACE = ("https://hub", "owner/model", "main")
COMMIT = "0" * 40


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str | None]:
    if postgres.why_not() is not None:
        yield None
        return
    with postgres.serving() as server:
        yield server.url


def test_every_thread_that_may_want_postgres_gets_a_connection(postgres_url: str | None) -> None:
    if postgres_url is None:
        pytest.skip(str(postgres.why_not()))
    database = Database(postgres_url, connections=20)
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(database.reading())
    database.close()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path, postgres_url: str | None) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'below' / 'state.sqlite3'}"
    if postgres_url is None:
        pytest.skip(str(postgres.why_not()))
    server = Database(postgres_url)
    with server.writing() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    server.close()
    return postgres_url


# -- migrations -------------------------------------------------------------------------------------------------------------------------


def test_migrations_lead_to_the_tables_as_they_are_declared(database: Database) -> None:
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []
    config = Config()
    config.set_main_option("script_location", "app/state/migrations")
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_several_processes_may_migrate_at_once(url: str) -> None:
    databases = [Database(url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Database.migrate, databases))
    with databases[0].reading() as connection:
        assert inspect(connection).has_table("measurements")
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == [HEAD]
    for database in databases:
        database.close()


@pytest.mark.parametrize("url_", ["mysql://x", "not a url", "oracle+x://"])
def test_another_database_is_refused_and_the_url_not_quoted(url_: str) -> None:
    with pytest.raises(RequestError, match="database_url") as caught:
        Database(url_)
    assert url_ not in str(caught.value)


def test_a_database_that_is_out_of_reach_is_tried_again_later() -> None:
    state = State("postgresql://nobody:secret@127.0.0.1:9/none")
    for _ in range(2):
        with pytest.raises(SourceUnavailableError) as caught:
            state.ready()
        assert "secret" not in str(caught.value)
    state.close()


# -- public facts -----------------------------------------------------------------------------------------------------------------------


def test_public_configs_and_headers_are_shared_by_processes(database: Database) -> None:
    one, other = (SqlStore(database, fresh_seconds=600) for _ in range(2))
    assert other.config(PLACE) is None
    one.keep_config(PLACE, HubConfig(config={"model_type": "llama"}, revision=COMMIT, is_public=True))
    one.keep_config(PLACE, HubConfig(config={"model_type": "gpt2"}, revision=COMMIT, is_public=True))
    kept = other.config(PLACE)
    assert kept is not None
    assert (kept.found.config, kept.found.revision) == ({"model_type": "gpt2"}, COMMIT)
    assert abs(kept.kept_at - time.time()) < 5
    other.forget_config(PLACE)
    assert SqlStore(database, fresh_seconds=600).config(PLACE) is None
    tensors = [safetensors.Stored(name=f"layers.{n}.weight", dtype=DType.BFLOAT16, shape=(2, 3)) for n in range(3)]
    files = safetensors.Files(rows=safetensors.rows_of(tensors), num_files=1, num_tensors=3, stored_bytes=36, first_dtype=DType.BFLOAT16)
    one.keep_files(PLACE, files)
    assert other.files(PLACE) == files


def test_what_is_private_is_never_kept(database: Database) -> None:
    with pytest.raises(AssertionError, match="public"):
        SqlStore(database, fresh_seconds=600).keep_config(PLACE, HubConfig(config={}, revision=COMMIT, is_public=False))


def test_inventories_are_shared_by_processes(database: Database) -> None:
    inventory = resolve("gpt2").inventory
    SqlInventories(database).put(inventory)
    found = SqlInventories(database).get(inventory.content_hash)
    assert found is not None
    assert found.rows == inventory.rows
    assert SqlInventories(database).get("0" * 64) is None


def test_the_oldest_rows_go_when_there_are_too_many(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public, "MAX_ROWS", 20)
    monkeypatch.setattr(public, "_LOOK_EVERY", 1)
    store = SqlStore(database, fresh_seconds=600)
    for number in range(30):
        store.keep_config(("hub", f"owner/{number}", "main"), HubConfig(config={}, revision=COMMIT, is_public=True))
    with database.reading() as connection:
        names = connection.execute(select(CONFIGS.c.model_id).order_by(CONFIGS.c.kept_at)).scalars().all()
    assert len(names) <= 21
    assert names[-1] == "owner/29"
    assert "owner/0" not in names


def test_a_cache_whose_database_is_gone_costs_no_answer() -> None:
    database = Database("postgresql://nobody@127.0.0.1:9/none")
    store = SqlStore(database, fresh_seconds=600)
    store.keep_config(PLACE, HubConfig(config={}, revision=COMMIT, is_public=True))
    assert store.config(PLACE) is not None
    assert store.config(("hub", "other/model", "main")) is None
    store.forget_config(PLACE)
    database.close()


# -- keys -------------------------------------------------------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_kept_as_a_hash(database: Database) -> None:
    secret = keys.create(database, "somebody", is_trusted=True)
    found = keys.find(database, secret)
    assert found is not None
    assert (found.name, found.is_trusted) == ("somebody", True)
    assert keys.find(database, secret[:-1]) is None
    assert keys.find(database, "") is None
    with database.reading() as connection:
        stored = connection.execute(text("SELECT * FROM api_keys")).all()
    assert secret not in str(stored)
    assert secret.removeprefix(keys.PREFIX) not in str(stored)
    assert keys.revoke(database, found.id)
    assert not keys.revoke(database, found.id)
    assert keys.find(database, secret) is None
    assert [key.is_revoked for key in keys.known(database)] == [True]


# -- measurements -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def key(database: Database) -> str:
    found = keys.find(database, keys.create(database, "somebody", is_trusted=True))
    assert found is not None
    return found.id


def test_the_same_post_many_times_at_once_makes_one_row(database: Database, key: str) -> None:
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda _: measurements.keep(database, record(), key, ("for a reason",)), range(10)))
    assert sum(one.is_new for one in found) == 1
    assert {(one.hash, one.status, one.reasons) for one in found} == {
        (measurements.hash_of(record()), Status.QUARANTINED, ("for a reason",))
    }
    with database.reading() as connection:
        assert connection.execute(select(func.count()).select_from(MEASUREMENTS)).scalar() == 1


def test_a_record_in_quarantine_counts_once_someone_has_looked(database: Database, key: str) -> None:
    kept = measurements.keep(database, record(), key, ("odd",))
    assert list(measurements.counting(database)) == []
    assert [one.hash for one in measurements.quarantined(database)] == [kept.hash]
    assert measurements.decide(database, kept.hash, Status.RELEASED)
    assert not measurements.decide(database, kept.hash, Status.REJECTED)
    (counted,) = measurements.counting(database)
    assert (counted.record, counted.key_id, counted.is_trusted) == (record(), key, True)


def test_updates_at_the_same_time_are_not_lost(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(insert(CONFIGS).values(endpoint="e", model_id="m", revision="r", commit_hash="0", config="0", kept_at=0.0))

    def add(_: int) -> None:
        with database.writing() as connection:
            wanted = select(CONFIGS.c.config).where(CONFIGS.c.model_id == "m").with_for_update()
            count = int(connection.execute(wanted).scalar_one())
            connection.execute(CONFIGS.update().values(config=str(count + 1)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(80)))
    with database.reading() as connection:
        assert connection.execute(select(CONFIGS.c.config)).scalar() == "80"


WRITER = """
import sys
from app.state import measurements
from app.state.database import Database
from tests.calibration.test_record import record
database = Database(sys.argv[1])
number = int(sys.argv[2])
while True:
    number += 1
    kept = measurements.keep(database, record(error=str(number)), sys.argv[3], ())
    print(kept.hash, flush=True)
"""


def kill_while_writing(database: Database, url: str, key: str, kills: int) -> None:
    acknowledged: list[str] = []
    for round_ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", WRITER, url, str(round_ * 10**6), key], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        acknowledged.append(process.stdout.readline().strip())
        time.sleep(0.003 * (round_ % 7))
        process.kill()
        acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
        process.stdout.close()
        process.wait()
    with database.reading() as connection:
        kept = set(connection.execute(select(MEASUREMENTS.c.hash)).scalars())
    assert len(acknowledged) >= kills
    assert set(acknowledged) <= kept
    if url.startswith("sqlite"):
        with database.reading() as connection:
            assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"


def test_what_was_acknowledged_survives_a_kill(database: Database, url: str, key: str) -> None:
    kill_while_writing(database, url, key, 2)


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_hundred_kills(database: Database, url: str, key: str) -> None:
    kill_while_writing(database, url, key, 100)


# -- cost -------------------------------------------------------------------------------------------------------------------------------


FILL_CONFIGS = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :number)
INSERT INTO public_configs SELECT 'https://hub', 'filled/' || i || '/' || :number, 'main', '0', '{}', i FROM n
"""
FILL_INVENTORIES = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :number)
INSERT INTO public_inventories SELECT lower(hex(randomblob(32))), '{}', i FROM n
"""
FILL_MEASUREMENTS = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :number)
INSERT INTO measurements SELECT lower(hex(randomblob(32))), :key, 'accepted', '[]', '{}', i FROM n
"""


@pytest.mark.parametrize(
    ("cached", "posted"), [pytest.param(10_000, 10_000, id="CI"), pytest.param(10_000, 1_000_000, id="million", marks=pytest.mark.slow)]
)
def test_what_a_request_costs_does_not_grow_with_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: int, posted: int
) -> None:
    """Counted in instructions of SQLite's machine, which a look through a table would multiply."""
    monkeypatch.setattr(public, "_LOOK_EVERY", 10**9)  # whoever writes looks once in so many for too many rows: bounded by their number
    database = Database(f"sqlite:///{tmp_path / 'state.sqlite3'}")
    database.migrate()
    found = keys.find(database, secret := keys.create(database, "somebody", is_trusted=True))
    assert found is not None
    owner, inventory, number, count = found.id, resolve("gpt2").inventory, 0, 0

    def count_one() -> None:
        nonlocal count
        count += 1

    event.listen(database._engine, "checkout", lambda connection, *_: connection.set_progress_handler(count_one, 1))

    def costs() -> dict[str, int]:
        nonlocal number, count
        number += 1
        place = ("https://hub", f"owner/{number}", "main")
        store, posted_now = SqlStore(database, fresh_seconds=0), record(error=str(number))
        asked: dict[str, Callable[[], object]] = {
            "keep a config": lambda: store.keep_config(place, HubConfig(config={}, revision=COMMIT, is_public=True)),
            "read a config": lambda: SqlStore(database, fresh_seconds=600).config(place),
            "miss a config": lambda: SqlStore(database, fresh_seconds=600).config(("https://hub", "no/model", "main")),
            "keep an inventory": lambda: SqlInventories(database).put(inventory),
            "read an inventory": lambda: SqlInventories(database).get(inventory.content_hash),
            "a key": lambda: keys.find(database, secret),
            "post": lambda: measurements.keep(database, posted_now, owner, ()),
            "post again": lambda: measurements.keep(database, posted_now, owner, ()),
            "look up": lambda: measurements.find(database, measurements.hash_of(posted_now)),
            "quarantine": lambda: measurements.quarantined(database),
            "in force": lambda: corrections.current_version(database),
            "history": lambda: corrections.history(database),
            "ready": database.ping,
        }
        taken = {}
        for name, ask in asked.items():
            count = 0
            ask()
            taken[name] = count
        return taken

    def fill(configs: int, records: int) -> None:
        with database.writing() as connection:
            connection.execute(text(FILL_CONFIGS), {"number": configs})
            connection.execute(text(FILL_INVENTORIES), {"number": configs})
            connection.execute(text(FILL_MEASUREMENTS), {"number": records, "key": owner})

    fill(10, 100)
    costs()  # what is done once
    before = costs()
    fill(cached, posted)
    after = costs()
    database.close()
    assert min(before.values()) > 0
    assert after == {name: pytest.approx(steps, rel=0.1) for name, steps in before.items()}


# -- corrections ------------------------------------------------------------------------------------------------------------------------

ACCEPTED, REFUSED = Verdict(is_accepted=True, reason="better"), Verdict(is_accepted=False, reason="worse")


def of(version: str) -> Corrections:
    return Corrections(version=version, date="2026-01-01", evidence="", groups={}, residuals={})


def test_corrections_are_put_in_force_refused_and_taken_back_with_their_history(database: Database) -> None:
    assert corrections.current(database) is None
    for version, verdict in (("one", ACCEPTED), ("two", ACCEPTED), ("bad", REFUSED)):
        corrections.keep(database, of(version), verdict, report={})
    now = corrections.current(database)
    assert now is not None
    assert now.version == "two"
    assert corrections.roll_back(database, "looked wrong") == "one"
    assert corrections.roll_back(database, "this too") is None
    assert corrections.current(database) is None
    with pytest.raises(RequestError, match="none are in force"):
        corrections.roll_back(database, "once more")
    assert [(event.version, event.action) for event in corrections.history(database)] == [
        ("one", "rolled_back"),
        ("two", "rolled_back"),
        ("bad", "refused"),
        ("two", "activated"),
        ("one", "activated"),
    ]


def test_without_measurements_nothing_is_put_in_force(database: Database) -> None:
    proposal = corrections.propose(database, date="2026-01-01")
    assert not proposal.verdict.is_accepted
    assert corrections.current(database) is None
    assert [event.action for event in corrections.history(database)] == ["refused"]
    assert json.loads(_report(database, proposal.version))["accepted"] is False


def _report(database: Database, version: str) -> Any:
    with database.reading() as connection:
        return connection.execute(text("SELECT report FROM corrections WHERE version = :version"), {"version": version}).scalar()
