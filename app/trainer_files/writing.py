"""A run written as the file of a trainer or launcher, read back, and answered for as that trainer would run it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import orjson
import yaml

from app.answer import Json, device_bytes
from app.reading import read_estimate
from app.service import prepare
from app.shortfall import missing_bytes
from app.trainer_files.formats import format_of
from app.trainer_files.opening import converted, opened
from app.trainer_files.written.accelerate import accelerate
from app.trainer_files.written.amended import SIZES, amended
from app.trainer_files.written.axolotl import axolotl
from app.trainer_files.written.deepspeed import deepspeed
from app.trainer_files.written.llamafactory import llamafactory
from app.trainer_files.written.script import script
from app.trainer_files.written.subject import Subject
from app.trainer_files.written.trl import trl
from app.yaml_text import parse
from estimator.errors import RequestError, UnknownNameError
from estimator.parallelism.options import Ddp, Fsdp, Parallel, Strategy, Zero
from estimator.recipe import Recipe

KINDS: Mapping[str, Callable[[Subject], Json]] = {
    "accelerate": accelerate,
    "axolotl": axolotl,
    "deepspeed": deepspeed,
    "llamafactory": llamafactory,
    "trl": trl,
}
SCRIPT = ".py"
_COMPARED = ("dtype", "attention", "quantization", "adapter", "prepare_for_kbit_training", "trainer", "training")
# What a launcher's file says; all else of a run stays as it is.
_LAUNCHERS = ("accelerate", "deepspeed")
_COMMENT = "# Written by vramplan. Dataset, template, learning rate, epochs and lora_alpha have no bearing on memory: put in your own.\n"


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
    content = KINDS[kind](Subject.of(question.request, case.recipe, payload))
    if kind == "deepspeed" or name.endswith(".json"):
        text = orjson.dumps(content, option=orjson.OPT_INDENT_2).decode() + "\n"
    else:
        text = _COMMENT + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return _read_back(payload, kind, [{"name": kind, "content": text, "format": kind}], case.recipe)


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
        found = _read_back(payload, kind, [{"name": own, "content": text, "format": kind}, *others], recipe)
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


def _read_back(payload: Mapping[str, Any], kind: str, files: list[Json], recipe: Recipe) -> Written:
    """What the first of some files stands for, on the card of the request."""
    hardware = dict(payload.get("hardware") or {})
    given = {name: value for name, value in hardware.items() if name not in ("strategy", "ddp", "deepspeed", "fsdp_config")}
    if kind in _LAUNCHERS:
        rest = dict(payload)
    else:
        rest = {name: value for name, value in payload.items() if name in ("stack", "engine", "pytorch_cuda_alloc_conf")}
        if "strategy" in hardware and not _is_written(hardware["strategy"]):
            given["strategy"] = hardware["strategy"]
    case = prepare(read_estimate(opened({**rest, "files": files, "hardware": given})))
    estimate = case.answerer.estimate(case.recipe)
    return Written(
        text=str(files[0]["content"]),
        differences=tuple(_differences(recipe, case.recipe)),
        device_bytes=device_bytes(estimate),
        fits=None if case.card is None else missing_bytes(case.recipe, case.card, estimate) <= 0,
    )


def _is_written(strategy: object) -> bool:
    return str(strategy).startswith("zero") or strategy == "fsdp"


def _differences(asked: Recipe, found: Recipe) -> list[str]:
    """Choices in which two recipes differ."""
    sentences: list[str] = []
    for name in _COMPARED:
        sentences += _between(name, getattr(asked, name), getattr(found, name))
    return [*sentences, *_between("parallel", _in_use(asked.parallel), _in_use(found.parallel))]


def _in_use(parallel: Parallel) -> Parallel:
    """How cards share the work, without the options of other strategies."""
    strategy = parallel.strategy
    return replace(
        parallel,
        ddp=parallel.ddp if strategy is Strategy.DDP else Ddp(),
        zero=parallel.zero if strategy.zero_stage else Zero(),
        fsdp=parallel.fsdp if strategy is Strategy.FSDP else Fsdp(),
    )


def _between(path: str, ours: object, theirs: object) -> Iterator[str]:
    if ours == theirs:
        return
    if is_dataclass(ours) and type(ours) is type(theirs):
        for field in fields(ours):
            yield from _between(f"{path}.{field.name}", getattr(ours, field.name), getattr(theirs, field.name))
        return
    yield f"{path}: {_shown(ours)} is {_shown(theirs)} there"


def _shown(value: object) -> str:
    return "absent" if value is None else "present" if is_dataclass(value) else str(value)
