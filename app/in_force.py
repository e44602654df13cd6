"""The corrections in force in the state, as one serving process knows them: read every few seconds, and never by a request."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from app.logs import LOGGER
from estimator.errors import VramplanError
from estimator.fitted import Corrections

if TYPE_CHECKING:
    from app.state.opening import State


class InForce:
    """What requests are answered with. While the state is out of reach it stays what it was.

    Args:
        state: to be read; None for none.
        every_seconds: between two looks [s]: for so long processes may differ.
    """

    def __init__(self, state: "State | None", *, every_seconds: float) -> None:
        self._state = state
        self._every_seconds = every_seconds
        self._known: Corrections | None = None

    @property
    def now(self) -> Corrections | None:
        """The corrections as they were last seen."""
        return self._known

    async def follow(self) -> None:
        """Looks again and again, the first time after a while, until it is cancelled."""
        while self._state is not None:
            await asyncio.sleep(self._every_seconds)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Looks once; blocks."""
        try:
            found = self._newest()
        except VramplanError:  # told of by `/readyz`, and logged where the state is opened
            return
        if _version(found) != _version(self._known):
            LOGGER.info("corrections in force: %s", _version(found) or "none")
        self._known = found

    def _newest(self) -> Corrections | None:
        if self._state is None:
            return None
        from app.state import corrections
        from app.state.database import StateError
        from app.state.opening import unavailable

        try:
            database = self._state.ready()
            version = corrections.current_version(database)
            return self._known if version == _version(self._known) else corrections.current(database)
        except StateError:
            raise unavailable() from None


def _version(corrections: Corrections | None) -> str | None:
    return None if corrections is None else corrections.version


Source = Callable[[], Corrections | None]
"""Gives the corrections that a request is to be answered with."""
