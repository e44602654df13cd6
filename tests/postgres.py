"""A Postgres server of one's own, from the distribution's packages, for as long as a context lasts."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_START_SECONDS = 30.0


def binaries() -> Path | None:
    """The folder of `initdb` and `postgres`; None where there is none."""
    if (found := shutil.which("initdb")) is not None:
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return versions[-1].parent if versions else None


def why_not() -> str | None:
    """What keeps a server from being started here; None if nothing does."""
    if binaries() is None:
        return "no Postgres server is installed (Debian: apt-get install postgresql)"
    if os.geteuid() == 0 and _user() is None:
        return "Postgres refuses to run as root, and there is no user `postgres`"
    return None


def _user() -> str | None:
    import pwd

    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        return None


@dataclass
class Server:
    """A running server."""

    url: str
    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    def restart(self, *, wait_seconds: float = 0.0) -> None:
        """Kills it as a crash would, and starts it again."""
        self.process.kill()
        self.process.wait()
        (self.folder / "data" / "postmaster.pid").unlink(missing_ok=True)
        time.sleep(wait_seconds)
        self.process = _start(self.folder, self.port)


@contextmanager
def serving() -> Iterator[Server]:
    """A fresh server on the loopback."""
    folder = Path(tempfile.mkdtemp(prefix="vramplan-postgres-"))
    user = _user() if os.geteuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user)
    bin_folder = binaries()
    assert bin_folder is not None
    subprocess.run(
        [bin_folder / "initdb", "-D", folder / "data", "-U", "vramplan", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"],
        check=True, capture_output=True, user=user, cwd="/",
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(url=f"postgresql://vramplan@127.0.0.1:{port}/postgres", folder=folder, port=port, process=_start(folder, port))
    try:
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(10)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, port: int) -> "subprocess.Popen[bytes]":
    bin_folder = binaries()
    assert bin_folder is not None
    process = subprocess.Popen(
        [bin_folder / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder, "-c", "listen_addresses=127.0.0.1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, user=_user() if os.geteuid() == 0 else None, cwd="/",
    )  # fmt: skip
    deadline = time.monotonic() + _START_SECONDS
    while subprocess.run([bin_folder / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)], check=False).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError("the Postgres server does not start")
        time.sleep(0.05)
    return process
