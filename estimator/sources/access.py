"""Who asks the Hub: the token of the caller at hand, for as long as one question takes."""

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from estimator.sources.cache import InventoryCache
    from estimator.sources.lookup import Lookup

PUBLIC = "public"
_KEY = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a caller may see. It is held in a context variable, so that it can neither outlive the question nor be taken for another's."""

    token: str | None = field(default=None, repr=False)
    """The caller's own token; sent to the Hub where the Hub demands one, and nowhere else."""
    uses_environment: bool = True
    """Whether `HF_TOKEN` stands in for a token that is not given: right for a command line, wrong for a service asked by strangers."""
    token_from: str = "HF_TOKEN"
    """Where a token is given, for messages."""
    lookup: "Lookup | None" = None
    """What the Hub is asked through; the program's own if None."""
    inventories: "InventoryCache | None" = None
    """Inventories of public models; the program's own if None."""

    @property
    def secret(self) -> str | None:
        """The token to send where one is demanded."""
        return self.token or (os.environ.get("HF_TOKEN") or None if self.uses_environment else None)

    @property
    def scope(self) -> str:
        """What tells callers apart where results are shared: a keyed hash of the token, with a key that lives as long as the process."""
        secret = self.secret
        return PUBLIC if secret is None else hmac.new(_KEY, secret.encode(), hashlib.sha256).hexdigest()


_current: ContextVar[Access | None] = ContextVar("vramplan_access", default=None)


def current() -> Access:
    """The access of the question being answered."""
    return _current.get() or Access()


@contextmanager
def using(access: Access) -> Iterator[None]:
    """Answers what is asked inside with this access; threads started with a copy of the context see it too."""
    reset = _current.set(access)
    try:
        yield
    finally:
        _current.reset(reset)
