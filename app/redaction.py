"""Text that is safe to show: no tokens of the Hub, no control characters."""

import re

_SECRET = re.compile(r"hf_[A-Za-z0-9]{4,}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def redacted(text: str) -> str:
    """The text with tokens and control characters replaced."""
    return _CONTROL.sub("?", _SECRET.sub("hf_…", text))
