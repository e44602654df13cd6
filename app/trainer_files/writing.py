"""A run written as the file of a trainer or launcher, read back, and answered for as that trainer would run it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.answer import Json, device_bytes
from app.reading import read_estimate
from app.service import prepare
from app.shortfall import missing_bytes
from app.trainer_files.formats import format_of
from app.trainer_files.opening import converted
from app.trainer_files.read_back import KINDS, differences, read_back, text_of
from app.trainer_files.written.amended import SIZES, amended
from app.trainer_files.written.script import script
from app.trainer_files.written.subject import Subject
from app.yaml_text import parse
from estimator.errors import RequestError, UnknownNameError
from estimator.recipe import Recipe

SCRIPT = ".py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A file, and what it stands for once its trainer reads it."""

    text: str
    differences: tuple[str, ...]
    """Choices that this trainer makes otherwise than the run that was written."""
    device_bytes: int | None
    """Of the run as its trainer makes it; None for a script, which says everything itself [bytes]."""
    fits: bool | None
    """Whether that fits the card; None without a card."""

    def rendered(self) -> Json:
        """The file in the words of the API."""
        return {"content": self.text, "differences": list(self.differences), "device_bytes": self.device_bytes, "fits": self.fits}


def written(payload: Mapping[str, Any], kind: str, name: str = "", files: Sequence[Json] = ()) -> Written:
    """A request of `estimate`, written as a file.

    Args:
        payload: of the run, its files read.
        kind: one of `KINDS`.
        name: of the file; `.py` with `trl` asks for a script.
        files: that the request was made of. One of this kind is written anew with its sizes changed and all else as it was, if it still
            stands for the same run.

    Raises:
        RequestError: if the run cannot be written so.
        UnknownNameError: for another kind.
    """
    if kind not in KINDS:
        raise UnknownNameError.of("write", kind, KINDS)
    question = read_estimate(payload)
    case = prepare(question)
    if kind == "trl" and name.endswith(SCRIPT):
        return Written(text=script(Subject.of(question.request, case.recipe, payload)), differences=(), device_bytes=None, fits=None)
    anew = _amended(payload, kind, files, case.recipe)
    if anew is not None:
        return anew
    text = text_of(payload, case, kind, name)
    return _rendered(payload, kind, [{"name": kind, "content": text, "format": kind}], case.recipe)


def _amended(payload: Mapping[str, Any], kind: str, files: Sequence[Json], recipe: Recipe) -> Written | None:
    """The user's own file with the sizes of the run; None without one, or where it stands for another run."""
    texts = {str(file["name"]): file["content"] for file in files if isinstance(file.get("content"), str)}
    own = next((name for name, text in texts.items() if kind in SIZES and format_of(name, parse(name, text)) == kind), None)
    if own is None or recipe.training is None:
        return None
    training = recipe.training
    sizes = (training.micro_batch_size, training.gradient_accumulation_steps, training.sequence_length)
    values = dict(zip(SIZES[kind], sizes, strict=True))
    others = [dict(file) for file in files if file["name"] != own]
    # The length as its trainer makes it of what the file says may be the one that is planned already.
    for keys in (SIZES[kind][:2], SIZES[kind]):
        text = amended(own, texts[own], {key: values[key] for key in keys})
        found = _rendered(payload, kind, [{"name": own, "content": text, "format": kind}, *others], recipe)
        if not found.differences:
            return found
    return None


def convert(payload: Mapping[str, Any]) -> Json:
    """The answer to `convert`: files as a request, and with `write` that run as a file of another kind; `as` names it.

    Raises:
        VramplanError: if the files cannot be read, or the run cannot be written.
    """
    if "files" not in payload and "write" not in payload:
        raise RequestError("files: give files to read, or with write a run to write", field="files")
    rest = {name: value for name, value in payload.items() if name not in ("write", "as")}
    found = converted(rest)
    kind, name = payload.get("write"), payload.get("as", "")
    if kind is None:
        return {**found, "written": None}
    if not isinstance(kind, str) or not isinstance(name, str):
        raise UnknownNameError.of("write", kind, KINDS)
    return {**found, "written": written(found["request"], kind, name, payload.get("files") or ()).rendered()}


def _rendered(payload: Mapping[str, Any], kind: str, files: list[Json], recipe: Recipe) -> Written:
    """The first of some files, with what all stand for."""
    case = read_back(payload, kind, files)
    estimate = case.answerer.estimate(case.recipe)
    return Written(
        text=str(files[0]["content"]),
        differences=tuple(differences(recipe, case.recipe)),
        device_bytes=device_bytes(estimate),
        fits=None if case.card is None else missing_bytes(case.recipe, case.card, estimate) <= 0,
    )
