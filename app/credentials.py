"""What callers say who they are: a token of the Hub, a key of this service. Both come in headers, and go nowhere but where they are for."""

import re
from collections.abc import Iterable, Mapping

from estimator.errors import RequestError

HUB_HEADER = "x-hf-token"
KEY_HEADER = "x-api-key"

_TOKEN = re.compile(r"hf_[A-Za-z0-9_.-]{4,2000}")


def headers_of(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers as text; of several with one name the last."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in raw}


def hub_token(headers: Mapping[str, str]) -> str | None:
    """The caller's token of the Hub: `X-HF-Token: hf_…`, or `Authorization: Bearer hf_…`.

    Raises:
        RequestError: if a token is malformed, or two differ; it is not quoted.
    """
    own = headers.get(HUB_HEADER, "").strip()
    scheme, _, bearer = headers.get("authorization", "").strip().partition(" ")
    given = {token for token in (own, bearer.strip() if scheme.lower() == "bearer" else "") if token}
    if not given:
        return None
    if len(given) > 1:
        raise RequestError("X-HF-Token and Authorization hold different tokens; give one", field="X-HF-Token")
    (token,) = given
    if not _TOKEN.fullmatch(token):
        raise RequestError("X-HF-Token, or Authorization: Bearer: expected a token of the Hub (hf_…)", field="X-HF-Token")
    return token
