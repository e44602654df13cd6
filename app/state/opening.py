"""The state of one serving process: opened when it starts, tried again while the database is down."""

import threading
import time

from app.logs import LOGGER
from app.state.database import Database, StateError
from estimator.errors import SourceUnavailableError

_TRY_AGAIN_SECONDS = 5.0


class State:
    """A database whose tables are up to date before anyone gets it.

    Args:
        url: of SQLAlchemy.
        connections: see `Database`.
    """

    def __init__(self, url: str, *, connections: int = 15) -> None:
        self.database = Database(url, connections=connections)
        """For caches, which do without what fails."""
        self._lock = threading.Lock()
        self._is_ready = False
        self._next_try = 0.0

    def ready(self) -> Database:
        """The database, its tables up to date.

        Raises:
            SourceUnavailableError: if it does not answer.
        """
        with self._lock:
            if self._is_ready:
                return self.database
            if time.monotonic() >= self._next_try:
                try:
                    self.database.migrate()
                except (StateError, OSError) as error:
                    LOGGER.error("the state cannot be opened: %s", type(error).__name__)
                    self._next_try = time.monotonic() + _TRY_AGAIN_SECONDS
                else:
                    self._is_ready = True
                    return self.database
        raise unavailable()

    def check(self) -> None:
        """Asks the database for an answer.

        Raises:
            SourceUnavailableError: if there is none.
        """
        try:
            self.ready().ping()
        except StateError:
            raise unavailable() from None

    def close(self) -> None:
        """Closes all connections."""
        self.database.close()


def unavailable() -> SourceUnavailableError:
    """The error for a database that does not answer."""
    return SourceUnavailableError("the state of the service is out of reach; try again later", retry_after_seconds=10)
