"""What a run is once it is written as the file of a trainer and read by it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import orjson
import yaml

from app.answer import Json
from app.reading import read_estimate
from app.service import Case, prepare
from app.trainer_files.opening import opened
from app.trainer_files.written.accelerate import accelerate
from app.trainer_files.written.axolotl import axolotl
from app.trainer_files.written.deepspeed import deepspeed
from app.trainer_files.written.llamafactory import llamafactory
from app.trainer_files.written.subject import Subject
from app.trainer_files.written.trl import trl
from estimator.errors import VramplanError
from estimator.parallelism.options import Ddp, Fsdp, Parallel, Strategy, Zero
from estimator.recipe import Recipe

KINDS: Mapping[str, Callable[[Subject], Json]] = {
    "accelerate": accelerate,
    "axolotl": axolotl,
    "deepspeed": deepspeed,
    "llamafactory": llamafactory,
    "trl": trl,
}
_COMPARED = ("dtype", "attention", "quantization", "adapter", "prepare_for_kbit_training", "trainer", "training")
# What a launcher's file says; all else of a run stays as it is.
_LAUNCHERS = ("accelerate", "deepspeed")
_COMMENT = "# Written by vramplan. Dataset, template, learning rate, epochs and lora_alpha have no bearing on memory: put in your own.\n"


def text_of(payload: Mapping[str, Any], case: Case, kind: str, name: str = "") -> str:
    """A run as the text of a file.

    Raises:
        RequestError: if it cannot be written so.
    """
    content = KINDS[kind](Subject.of(case.question.request, case.recipe, payload))
    if kind == "deepspeed" or name.endswith(".json"):
        return orjson.dumps(content, option=orjson.OPT_INDENT_2).decode() + "\n"
    return _COMMENT + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def read_back(payload: Mapping[str, Any], kind: str, files: Sequence[Json]) -> Case:
    """What files stand for, on the card of the request.

    Args:
        payload: the run that was written.
        kind: of the first file.
        files: as a request takes them.
    """
    hardware = dict(payload.get("hardware") or {})
    given = {name: value for name, value in hardware.items() if name not in ("strategy", "ddp", "deepspeed", "fsdp_config")}
    if kind in _LAUNCHERS:
        rest = dict(payload)
    else:
        rest = {name: value for name, value in payload.items() if name in ("stack", "engine", "pytorch_cuda_alloc_conf")}
        if "strategy" in hardware and not _is_written(hardware["strategy"]):
            given["strategy"] = hardware["strategy"]
    return prepare(read_estimate(opened({**rest, "files": files, "hardware": given})))


def asked_and_run(payload: Mapping[str, Any], kind: str) -> tuple[Recipe, Recipe] | None:
    """A run, and what a trainer makes of it once it is written as its file; both on one card, since launchers share them out.

    Returns:
        None if the run cannot be written so.
    """
    try:
        case = prepare(read_estimate(payload))
        found = read_back(payload, kind, [{"name": kind, "content": text_of(payload, case, kind), "format": kind}])
    except VramplanError:
        return None
    return replace(case.recipe, parallel=Parallel()), replace(found.recipe, parallel=Parallel())


def _is_written(strategy: object) -> bool:
    return str(strategy).startswith("zero") or strategy == "fsdp"


def differences(asked: Recipe, found: Recipe) -> list[str]:
    """Choices in which two recipes differ, one sentence for each."""
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
