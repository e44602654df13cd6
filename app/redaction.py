"""Text that is safe to show: no tokens of the Hub, no control characters."""

import re

# Tokens of the Hub (`hf_…`, `hf_oauth_…`, `hf_jwt_…`) and keys of this service.
_SECRET = re.compile(r"(hf|vrk)_[A-Za-z0-9][A-Za-z0-9_.-]{3,}")
# The same where they cannot well be anything else: names of models and modules may begin with `hf_` too.
_TOKEN = re.compile(r"hf_(?:(?:oauth|jwt)_[A-Za-z0-9_.-]{4,}|[A-Za-z0-9]{16,})|vrk_[A-Za-z0-9_-]{16,}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def redacted(text: str) -> str:
    """The text with tokens and control characters replaced."""
    return _CONTROL.sub("?", _SECRET.sub(r"\1_…", text))


def printable(text: str) -> str:
    """The text with control characters replaced, and what is a token or a key for sure: names and paths stay as they are."""
    return _CONTROL.sub("?", _TOKEN.sub(lambda found: f"{found[0].partition('_')[0]}_…", text))


def holds_token(text: str) -> bool:
    """Whether a text holds a token or a key, for sure: `redacted` takes more for one."""
    return _TOKEN.search(text) is not None
