"""Connections of callers, as uvicorn holds them, with a limit of time that uvicorn has not."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle


class Connection(H11Protocol):
    """Ends when the head of a request has not arrived within the time that it may rest between requests (`timeout_keep_alive`).

    uvicorn counts that time after an answer only, and no longer once a byte has come: whoever opens connections and is silent, or sends a
    head letter by letter, would hold them for ever, until the process has no more. Bodies have a limit of their own (`transfer`).

    Made of h11's protocol, not of httptools': h11 always comes with uvicorn, and uvicorn limits the size of a head with it alone.

    Source: uvicorn 0.54.0, protocols/http/h11_impl.py (connection_made, data_received, on_response_complete).
    """

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    @property
    def _waits(self) -> bool:
        """Whether no request is under way."""
        cycle: RequestResponseCycle | None = self.cycle  # None before the first
        return cycle is None or cycle.response_complete

    def _watch(self) -> None:
        if not self._waits:
            self._forget()
        elif self._overdue is None and not self.transport.is_closing():
            self._overdue = self.loop.call_later(self.timeout_keep_alive, self._give_up)

    def _forget(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _give_up(self) -> None:
        self._overdue = None
        if self._waits and not self.transport.is_closing():
            self.transport.close()
