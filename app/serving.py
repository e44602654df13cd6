"""`vramplan serve`."""

import os

import uvicorn

from app.configuration import PREFIX, Configuration, unknown_names
from app.connection import Connection
from app.logs import LOGGER, configure

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Headers of proxies are believed where `FORWARDED_ALLOW_IPS` says so (uvicorn's own setting; by default those on this machine).
_MAX_HEADER_BYTES = 64 * 1024


def serve_on(host: str, port: int, workers: int = 1) -> None:
    """Serves until the process is told to end; requests under way are then finished.

    Args:
        host, port: where to listen.
        workers: processes.

    Raises:
        RequestError: if a setting, or a file that one names, cannot be read.
    """
    if host in _LOOPBACK:
        # A page of a stranger whose name is made to point here would be asked for under that name.
        os.environ.setdefault(f"{PREFIX}ALLOWED_HOSTS", "127.0.0.1,[::1],localhost")
    configuration = Configuration.of_environment()
    configure(configuration.log_level, configuration.log_format)
    for told in unknown_names(os.environ):
        LOGGER.warning(told)
    if workers > 1:
        from app.http import close, create_app

        close(create_app(configuration))  # what ends each process at once is told of here: uvicorn would start them again for ever
    uvicorn.run(
        "app.serving:application",
        factory=True,
        http=Connection,
        ws="none",  # there are none, and one that is taken over by another protocol would leave the clock of `Connection` running
        host=host,
        port=port,
        workers=workers,
        server_header=False,
        access_log=False,
        log_config=None,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(configuration.shutdown_timeout_seconds),
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
    )


def application() -> object:
    """The application of one serving process."""
    from app.http import create_app

    configuration = Configuration.of_environment()
    configure(configuration.log_level, configuration.log_format)
    return create_app(configuration)
