"""A file's keys, taken one by one, and the request that grows from them. No key is dropped in silence: what nobody takes is sorted."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from app.answer import Json
from app.redaction import redacted
from app.request import StackFields
from app.versions import stack_of
from estimator.errors import RequestError, UnknownNameError
from estimator.stack import Stack

_SHOWN = 80


def asked_stack(asked: object) -> Stack:
    """The versions of a request that is not checked yet; those installed where they cannot be read, which is refused later."""
    try:
        return stack_of(StackFields.model_validate(asked or {}))
    except (ValidationError, RequestError):
        return stack_of(StackFields())


@dataclass(slots=True)
class Translation:
    """A request in the making, from one file or several."""

    payload: Json = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    """Keys without a bearing on memory."""
    not_modelled: dict[str, str] = field(default_factory=dict)
    """Keys that have a bearing on memory which no formula covers, and what each does."""
    assumed: list[str] = field(default_factory=list)
    """Sentences on what a file leaves open, or says only together with its trainer."""
    origins: dict[str, str] = field(default_factory=dict)
    """Where each field of the request comes from."""
    own_optimizer: str | None = None
    """An optimizer that is made whatever the trainer is given."""
    precision: str | None = None
    """Mixed precision of the launcher, for a trainer that is given none."""
    stack: Stack = field(default_factory=lambda: stack_of(StackFields()))
    """Versions whose defaults are meant."""

    def put(self, path: str, value: object, origin: str) -> None:
        """Set a field of the request.

        Raises:
            RequestError: if another file, or another key, says otherwise.
        """
        *sections, name = path.split(".")
        target: Any = self.payload
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise self._contradiction(path, origin, value, target)
        if target.setdefault(name, value) != value:
            raise self._contradiction(path, origin, value, target[name])
        self.origins.setdefault(path, origin)

    def _contradiction(self, path: str, origin: str, value: object, other: object) -> RequestError:
        """Of what a field, or one that it lies within or that lies within it, has been set to already."""
        of = next((key for field, key in self.origins.items() if f"{path}.".startswith(f"{field}.") or field.startswith(f"{path}.")), path)
        return RequestError(f"{origin}: {_shown(value)} contradicts {_shown(other)} of {of}", field=origin)

    def value(self, path: str) -> Any:
        """A field of the request so far; None when it is not set."""
        found: Any = self.payload
        for section in path.split("."):
            found = found.get(section) if isinstance(found, Mapping) else None
        return found

    def request(self) -> Json:
        """The request, once all files are read, and in it what was set aside."""
        training = self.payload.get("training")
        if self.own_optimizer is not None:
            self.payload.setdefault("training", {})["optim"] = self.own_optimizer
        is_given = isinstance(training, dict) and (training.get("bf16") or training.get("fp16"))
        if self.precision in ("bf16", "fp16") and not is_given and self.payload.get("trainer") != "trl":
            self.payload.setdefault("training", {})[self.precision] = True
        set_aside = {"ignored": sorted(self.ignored), "not_modelled": self.not_modelled, "assumed": self.assumed}
        if any(set_aside.values()):
            self.payload["set_aside"] = {name: value for name, value in set_aside.items() if value}
        return self.payload


@dataclass(slots=True)
class Keys:
    """One mapping of one file, or of a request where the file has no name; nulls are absent keys."""

    file: str
    values: Mapping[str, Any]
    found: Translation
    prefix: str = ""
    taken: set[str] = field(default_factory=set)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def named(self, key: str) -> str:
        """A key as messages name it."""
        return redacted(f"{self.file}: {self.prefix}{key}" if self.file else f"{self.prefix}{key}")[: _SHOWN * 2]

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key as it stands."""
        self.taken.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean; `"true"` and `"false"` count as such, since launchers write them."""
        value = self.take(key, default)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        return bool(self._checked(key, value, bool, "true or false"))

    def integer(self, key: str, default: int | None = None) -> int | None:
        """A whole number."""
        value = self.take(key, default)
        return None if value is None else self._checked(key, value, int, "a whole number")

    def number(self, key: str, default: float | None = None) -> float | None:
        """A number; text that reads as one counts, since YAML reads `1e-4` as text."""
        value = self.take(key, default)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
        return None if value is None else self._checked(key, value, int | float, "a number")

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string."""
        value = self.take(key, default)
        return None if value is None else str(self._checked(key, value, str, "text"))

    def dtype(self, key: str, alias: str) -> str | None:
        """A dtype under either of two names, put into the request."""
        found: str | None = None
        for name in (key, alias):
            value = self.text(name)
            self.put("dtype", value, name)
            found = found or value
        return found

    def section(self, key: str) -> "Keys":
        """The mapping under a key; an empty one when it is absent."""
        value = self._checked(key, self.take(key, {}), Mapping, "a mapping")
        return Keys(file=self.file, values=value, found=self.found, prefix=f"{self.prefix}{key}.")

    def names(self, key: str, *, split: bool = False) -> list[str] | None:
        """A list of strings; with `split`, also text with commas."""
        value = self.take(key)
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")] if split else [value]
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.error(key, value, "a list of names")
        return value

    def one_of(self, key: str, accepted: Iterable[str], default: str | None = None) -> str | None:
        """One of some names.

        Raises:
            UnknownNameError: if it is another.
        """
        value = self.take(key, default)
        names = list(accepted)
        if value is None:
            return None
        if value not in names:
            raise UnknownNameError.of(self.named(key), value, names)
        return str(value)

    def refuse(self, key: str, what: str, accepted: str = "null", *, unless: tuple[object, ...] = ()) -> None:
        """Take a key whose value, if it is a true one, makes another run than any that is modelled.

        Raises:
            RequestError: if it has one.
        """
        value = self.take(key)
        if value and value not in unless:
            raise RequestError(f"{self.named(key)}: {_shown(value)} is not modelled ({what}); accepted: {accepted}", field=self.named(key))

    def put(self, path: str, value: object, key: str) -> None:
        """Set a field of the request, unless the value is None."""
        if value is not None:
            self.found.put(path, value, self.named(key))

    def not_modelled(self, key: str, effect: str) -> None:
        """Report a key by name."""
        self.taken.add(key)
        self.found.not_modelled[self.named(key)] = effect

    def ignore(self, key: str) -> None:
        """List a key as without a bearing on memory, if it is there."""
        self.taken.add(key)
        if key in self:
            self.found.ignored.append(self.named(key))

    def error(self, key: str, value: object, expected: str) -> RequestError:
        """What is wrong with a value."""
        return RequestError(f"{self.named(key)}: {_shown(value)} is not accepted; expected {expected}", field=self.named(key))

    def rest(
        self,
        *,
        inert: frozenset[str],
        unmodelled: Mapping[str, str],
        trainer: str,
        refuses_unknown: bool = False,
        known: Iterable[str] = (),
    ) -> None:
        """Sort what nobody has taken.

        Args:
            inert: keys without a bearing on memory.
            unmodelled: keys with one that is not modelled, and what they do where they are not false.
            trainer: whose keys these are, as messages name it.
            refuses_unknown: whether it refuses unknown keys; else it passes them over, and so they are reported.
            known: keys of other parts of the file, for suggestions.

        Raises:
            UnknownNameError: for an unknown key of a trainer that refuses those.
        """
        for key, value in self.values.items():
            if key in self.taken or value is None:
                continue
            if key in inert or (key in unmodelled and _is_off(value)):
                self.ignore(key)
            elif key in unmodelled:
                self.not_modelled(key, unmodelled[key])
            else:
                self._unknown(key, [*inert, *unmodelled, *self.taken, *known], trainer, refuses_unknown=refuses_unknown)

    def _unknown(self, key: str, known: list[str], trainer: str, *, refuses_unknown: bool) -> None:
        close = difflib.get_close_matches(str(key), known, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        if refuses_unknown:
            raise UnknownNameError(f"{self.named(key)}: not a known field of {trainer}{meant}", field=self.named(key))
        self.not_modelled(key, f"it is not a known field of {trainer}, which passes over what it does not know{meant}")

    def _checked(self, key: str, value: Any, kind: Any, expected: str) -> Any:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(key, value, expected)
        return value


def _is_off(value: object) -> bool:
    return not value or (isinstance(value, str) and value.lower() in ("none", "no", "false", "null"))


def _shown(value: object) -> str:
    scalar = isinstance(value, str | int | float)
    return redacted(str(value) if scalar else type(value).__name__)[:_SHOWN]
