"""Files given with a request, turned into fields of the request: the launcher's first, the trainer's on top, the adapter's beside it."""

from collections.abc import Mapping
from typing import Any

from app.answer import SCHEMA_VERSION, Json
from app.options import merged
from app.trainer_files import accelerate, adapter_config, axolotl, deepspeed, llamafactory, trl
from app.trainer_files.formats import Format, format_of
from app.trainer_files.fsdp import translate_fsdp
from app.trainer_files.translation import Keys, Translation, asked_stack
from app.yaml_text import parse
from estimator.errors import RequestError

MAX_FILES = 8
FIELD = "files"

_FORMATS_ORDER = (Format.ACCELERATE, Format.DEEPSPEED, Format.FSDP, *(f for f in Format if f.trains), Format.ADAPTER_CONFIG)


def opened(payload: Mapping[str, Any]) -> Json:
    """A request with its `files` read: what is given beside them stands above what they say.

    Raises:
        RequestError: if a file cannot be read, contradicts another, or asks for what is not modelled.
    """
    files = payload.get(FIELD)
    rest = {name: value for name, value in payload.items() if name != FIELD}
    if files is None:
        return rest
    result, formats = _read(files, rest.get("stack"))
    result = merged(result, rest)
    hardware = result.get("hardware")
    trains = any(Format(name).trains for name in formats.values())
    if trains and isinstance(hardware, dict) and "strategy" not in hardware and _is_several(hardware.get("num_gpus")):
        hardware["strategy"] = "ddp"  # what the launchers of all these trainers make of several GPUs
    return result


def converted(payload: Mapping[str, Any]) -> Json:
    """The request that files stand for, and whose files they are.

    Raises:
        RequestError: as `opened` does.
    """
    files = payload.get(FIELD)
    formats = _read(files, payload.get("stack"))[1] if files is not None else {}
    return {"schema_version": SCHEMA_VERSION, "formats": formats, "request": opened(payload)}


def _is_several(number: object) -> bool:
    return isinstance(number, int) and number > 1


def _read(files: object, stack: object) -> tuple[Json, dict[str, str]]:
    contents = _contents(files)
    formats = {name: format_of(name, values, given) for name, (values, given) in contents.items()}
    found = Translation(stack=asked_stack(stack))
    keys = {name: Keys(file=name, values=values, found=found) for name, (values, _) in contents.items()}
    trainers = [name for name, kind in formats.items() if kind.trains]
    if len(trainers) > 1:
        raise RequestError(f"{trainers[1]}: a second training file beside {trainers[0]}; accepted: one", field=trainers[1])
    requests = [name for name, kind in formats.items() if kind is Format.REQUEST]
    for name in sorted(formats, key=lambda name: _FORMATS_ORDER.index(formats[name]) if formats[name] in _FORMATS_ORDER else -1):
        if not keys[name].taken:  # one that another file points to is read there
            _translate(formats[name], keys[name], {other: k for other, k in keys.items() if other != name})
    result = found.request()
    if trainers:
        result.setdefault("set_aside", {})["trainer"] = formats[trainers[0]].value
    for name in requests:
        result = merged(result, dict(contents[name][0]))
    return result, {name: kind.value for name, kind in formats.items()}


def _translate(kind: Format, keys: Keys, others: Mapping[str, Keys]) -> None:
    match kind:
        case Format.ACCELERATE:
            accelerate.translate(keys, others)
        case Format.DEEPSPEED:
            deepspeed.translate(keys)
        case Format.FSDP:
            translate_fsdp(keys, default_version=2)
        case Format.AXOLOTL:
            axolotl.translate(keys, others)
        case Format.LLAMA_FACTORY:
            llamafactory.translate(keys, others)
        case Format.TRL:
            trl.translate_sft(keys, others)
        case Format.TRANSFORMERS:
            trl.translate_script(keys, others)
        case Format.ADAPTER_CONFIG:
            adapter_config.translate(keys)
        case Format.MODEL_CONFIG:
            keys.found.put("model", {"config": dict(keys.values)}, keys.file)
        case Format.REQUEST:
            keys.taken.update(keys.values)


def _contents(files: object) -> dict[str, tuple[dict[str, Any], object]]:
    """What each file holds, by its name, with the format that is given for it."""
    if not isinstance(files, list) or not files or len(files) > MAX_FILES:
        raise RequestError(f"{FIELD}: expected a list of 1 to {MAX_FILES} files", field=FIELD)
    contents: dict[str, tuple[dict[str, Any], object]] = {}
    for index, file in enumerate(files):
        field = f"{FIELD}.{index}"
        if not isinstance(file, Mapping) or not file.keys() <= {"name", "content", "format"}:
            raise RequestError(f"{field}: expected an object with name, content and format", field=field)
        name, content = file.get("name", field), file.get("content")
        if not isinstance(name, str) or not 1 <= len(name) <= 512 or name in contents:
            raise RequestError(f"{field}.name: expected a name of its own", field=f"{field}.name")
        if isinstance(content, str):
            content = parse(name, content)
        if not isinstance(content, dict):
            raise RequestError(f"{field}.content: expected the text of a file, or what it holds", field=f"{field}.content")
        contents[name] = (content, file.get("format"))
    return contents
