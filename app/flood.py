"""How much one address may ask, and how much may be under way at once."""

import ipaddress
import math
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from limits import RateLimitItem, parse_many
from limits.aio.storage import Storage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string

from app.configuration import PREFIX
from app.logs import LOGGER
from estimator.errors import RequestError

# What an IPv6 subscriber is given at least: addresses within it are one caller's. Source: RFC 6177, section 2.
_IPV6_PREFIX = 64
_ZERO = re.compile(r"(?<!\d)0+(?!\d)")
# Of redis-py. A Redis that hangs may hold up a request for this long, and no longer; one that fails is not asked again in the same request.
_REDIS: dict[str, Any] = {"implementation": "redispy", "socket_timeout": 0.5, "socket_connect_timeout": 0.5, "retry": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request is not let in."""

    status: int
    reason: str
    detail: str
    retry_after_seconds: int


class RateLimiter:
    """Counts requests by address, over a sliding window.

    Args:
        limits: `300/minute`, several separated by `;`; `none` for no limit.
        storage: `memory://`, `redis://…`. A storage that fails lets requests in: it must not take the service down with it.

    Raises:
        RequestError: if either cannot be read.
    """

    def __init__(self, limits: str, storage: str) -> None:
        self._items: tuple[RateLimitItem, ...] = ()
        if limits == "none":
            return
        try:
            if _ZERO.search(limits):  # no request would ever be let in, or a window of no length taken for one of one minute
                raise ValueError
            self._items = tuple(parse_many(limits))
        except ValueError:
            name = f"{PREFIX}RATE_LIMIT"
            message = f"{name}: {limits!r}: accepted: `300/minute` with numbers from 1, several separated by `;`, or `none`"
            raise RequestError(message, field=name) from None
        try:
            options = _REDIS if storage.startswith("redis") else {}
            kept = storage_from_string(f"async+{storage}", wrap_exceptions=True, **options)
        except (ConfigurationError, ImportError, ValueError):  # whose messages may quote a password
            name = f"{PREFIX}RATE_LIMIT_STORAGE"
            message = f"{name}: cannot be used; accepted: memory://, and with `pip install 'vramplan[redis]'` redis://HOST:PORT"
            raise RequestError(message, field=name) from None
        assert isinstance(kept, Storage)
        self._strategy = SlidingWindowCounterRateLimiter(kept)

    async def refuses(self, address: str) -> Refusal | None:
        """A refusal if the address has asked too much; else the request is counted."""
        caller = caller_of(address)
        try:
            for item in self._items:
                if not await self._strategy.hit(item, caller):
                    reset = (await self._strategy.get_window_stats(item, caller)).reset_time
                    return Refusal(
                        status=429,
                        reason="rate",
                        detail=f"more than {item.amount} requests per {item.multiples if item.multiples > 1 else ''}"
                        f"{item.GRANULARITY.name}; try again later",
                        retry_after_seconds=max(1, math.ceil(reset - time.time())),
                    )
        except StorageError:
            LOGGER.warning("the storage of rate limits fails; requests are let in")
        return None


@lru_cache(maxsize=4096)
def caller_of(address: str) -> str:
    """Who is behind an address: of IPv6 the network that one subscriber has."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))
    return str(parsed)
