"""The versions to answer for: those asked for, else those installed, else those the facts were read from."""

import re
from dataclasses import fields
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version

from app.request import StackFields
from estimator.errors import RequestError
from estimator.stack import Stack, Version, parse_version

# Oldest releases whose behaviour the table of facts covers; adapters are made as since PEFT 0.12 (`autocast_adapter_dtype`), and published
# runs that judge 4-bit layers begin with bitsandbytes 0.43.
OLDEST: dict[str, Version] = {"transformers": (4, 45), "trl": (0, 13), "peft": (0, 12), "bitsandbytes": (0, 43)}


def stack_of(asked: StackFields) -> Stack:
    """The versions of a request.

    Raises:
        RequestError: if one cannot be read, or is older than what the facts cover.
    """
    chosen = dict(installed())
    for name, text in asked.model_dump(exclude_none=True).items():
        chosen[name] = parse_version(f"stack.{name}", text)
    for name, oldest in OLDEST.items():
        if chosen.get(name, oldest) < oldest:
            raise RequestError(
                f"stack.{name}: {shown(chosen[name])} is not covered; accepted: {shown(oldest)} and later", field=f"stack.{name}"
            )
    return Stack(**chosen)


def shown(version_: Version) -> str:
    """A version as people write it."""
    return ".".join(str(part) for part in version_)


@cache
def installed() -> dict[str, Version]:
    """Versions of the libraries that are installed here, read from their metadata without importing them."""
    found: dict[str, Version] = {}
    for field in fields(Stack):
        try:
            found[field.name] = parse_version(field.name, _version(field.name))
        except PackageNotFoundError:
            continue
    return found


def _version(name: str) -> str:
    """As `importlib.metadata.version` has it, which parses all of the metadata for it: some is as long as a README."""
    stated = re.search(r"^Version: (\S+)", distribution(name).read_text("METADATA") or "", re.MULTILINE)
    return stated[1] if stated is not None else version(name)
