"""Changes to a request as people would make them: paths of fields with their values, in the spelling that the request has."""

import copy
from collections.abc import Mapping
from typing import Any

from app.answer import Json
from app.pasted import spelling


def applied(payload: Mapping[str, Any], setting: Mapping[str, Any]) -> Json:
    """The request with some fields set; `null` takes a field away."""
    changed = copy.deepcopy(dict(payload))
    for path, value in setting.items():
        *sections, name = path.split(".")
        target = changed
        for section in sections:
            if not isinstance(target.get(section), dict):
                target[section] = {}
            target = target[section]
        target[name] = copy.deepcopy(value)
    return changed


def spelled(payload: Mapping[str, Any], setting: Mapping[str, Any]) -> Json:
    """The setting with each field under the name that the request gives it."""
    return {spelling(payload, path): value for path, value in setting.items()}


def joined(settings: list[Json]) -> Json | None:
    """Several settings as one; None when two of them mean the same field, or one a field and the other a part of it."""
    together: Json = {}
    for setting in settings:
        for path in setting:
            if any(path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.") for other in together):
                return None
        together |= setting
    return together
