"""How TrainingArguments spread a run over processes: `fsdp`, `fsdp_config`, `deepspeed` and `ddp_*`, in files and in requests.

Source: transformers 4.57 to 5.23, training_args.py, TrainingArguments._process_fsdp_args and _apply_legacy_fsdp_to_config; trainer.py,
Trainer._build_accelerator_args.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import orjson

from app.answer import Json
from app.trainer_files.deepspeed import named_file, read_named
from app.trainer_files.fsdp import translate_fsdp
from app.trainer_files.translation import Keys, Translation, asked_stack
from estimator.errors import RequestError, UnknownNameError

_DDP = {
    "ddp_bucket_cap_mb": "bucket_cap_mb",
    "ddp_find_unused_parameters": "find_unused_parameters",
    "ddp_static_graph": "static_graph",
}
_SHARDING = ("deepspeed", "fsdp", "fsdp_config")
_FIELDS = (*_SHARDING, *_DDP)
_OFF = ("", "false", "no")
_ON = ("true", "1")
_WORDS = ("full_shard", "shard_grad_op", "offload", "auto_wrap")
_OTHER_SHARDING = ("no_shard", "hybrid_shard", "hybrid_shard_zero2")
_RESHARDS, _OFFLOADS = "hardware.fsdp_config.reshard_after_forward", "hardware.fsdp_config.cpu_offload"


def translate_spread(keys: Keys, others: Mapping[str, Keys]) -> None:
    """Put all of it into the request.

    Raises:
        RequestError: for a spread that is not modelled, or a file that is not given.
    """
    translate_sharding(keys, others)
    translate_ddp(keys)


def translate_sharding(keys: Keys, others: Mapping[str, Keys]) -> None:
    """Put DeepSpeed's or FSDP's options into the request.

    Raises:
        RequestError: as `translate_spread` does, and for both at once.
    """
    fsdp = keys.take("fsdp")
    words = _words(keys, fsdp)
    if words is not None and keys.values.get("deepspeed"):
        raise RequestError(
            f"{keys.named('deepspeed')}: together with {keys.named('fsdp')} transformers refuses it; accepted: one of both",
            field=keys.named("deepspeed"),
        )
    read_named(keys, "deepspeed", others)
    if words is None:
        for key in ("fsdp", "fsdp_config"):  # options are read where it is on
            keys.ignore(key)
        return
    given = keys.values.get("fsdp_config")
    config = keys.section("fsdp_config") if not isinstance(given, str) else named_file(keys, "fsdp_config", given, others)
    keys.taken.add("fsdp_config")
    stack = keys.found.stack
    keys.put("hardware.strategy", "fsdp", "fsdp")
    said = keys.found.value("hardware.fsdp_config.version")
    if not stack.trainer_reads_fsdp_version:
        unread = {name: config.values[name] for name in ("version", "fsdp_version") if name in config.values}
        config = replace(config, values={name: value for name, value in config.values.items() if name not in unread})
        if any(str(value) != "1" for value in unread.values()):
            keys.found.assumed.append(
                f"{keys.named('fsdp_config')}: transformers 4 does not read its version, and accelerate takes FSDP1 unless its own file or "
                "the environment (FSDP_VERSION) says otherwise."
            )
    translate_fsdp(config, default_version=said or (2 if stack.trainer_takes_fsdp2 else 1))
    if "offload" in words and keys.found.value(_OFFLOADS) is None:
        keys.put(_OFFLOADS, True, "fsdp")
    if "shard_grad_op" in words and keys.found.value(_RESHARDS) is None:
        if keys.found.value("hardware.fsdp_config.version") == 2 or stack.trainer_sets_sharding_strategy:
            keys.put(_RESHARDS, False, "fsdp")
        else:
            keys.found.assumed.append(
                f"{keys.named('fsdp')}: accelerate takes FULL_SHARD in FSDP1, whatever transformers since 5.4 is given, unless the "
                "environment has FSDP_SHARDING_STRATEGY."
            )
    if (
        stack.trainer_keeps_gathered_by_default
        and keys.found.value("hardware.fsdp_config.version") == 2
        and keys.found.value(_RESHARDS) is None
    ):
        keys.put(_RESHARDS, False, "fsdp")
    if isinstance(fsdp, str | list) and words and "auto_wrap" not in words and not stack.trainer_takes_fsdp2:
        keys.not_modelled("fsdp", "without auto_wrap, and without an adapter, the whole model is one unit, and layers are counted as units")


def _words(keys: Keys, fsdp: Any) -> list[str] | None:
    """The options of `fsdp`; None where it is off, and no word where it is just on."""
    if not fsdp or (isinstance(fsdp, str) and fsdp.lower() in _OFF):
        return None
    if fsdp is True or (isinstance(fsdp, str) and fsdp.lower() in _ON):
        return []
    if not isinstance(fsdp, str | list):
        raise keys.error("fsdp", fsdp, f"true, false, or words of {', '.join(_WORDS)}")
    words = [str(word).rpartition(".")[2].lower() for word in (fsdp.split() if isinstance(fsdp, str) else fsdp)]
    for word in words:
        if word in _OTHER_SHARDING:
            raise RequestError(
                f"{keys.named('fsdp')}: {word!r} is not modelled; accepted: {', '.join(_WORDS)}, true", field=keys.named("fsdp")
            )
        if word not in _WORDS:
            raise UnknownNameError.of(keys.named("fsdp"), word, _WORDS)
    # Source: transformers 5.9, training_args.py, TrainingArguments._process_fsdp_args; 5.10 has neither check.
    is_alone, is_both = words == ["offload"], {"full_shard", "shard_grad_op"} <= set(words)
    if (is_alone or is_both) and not keys.found.stack.trainer_takes_fsdp2:
        raise keys.error("fsdp", fsdp, "one of full_shard and shard_grad_op, beside offload and auto_wrap")
    return words


def translate_ddp(keys: Keys) -> None:
    """Put options of DistributedDataParallel into the request."""
    for key, field in _DDP.items():
        keys.put(f"hardware.ddp.{field}", keys.take(key), key)


# -- in a request -----------------------------------------------------------------------------------------------------------------------


def with_hardware(payload: Json) -> Json:
    """A request in which what `training` says of it stands under `hardware`, where it is read.

    Raises:
        RequestError: for a file that cannot be read here, and where `hardware` says otherwise.
    """
    training, hardware = payload.get("training"), payload.get("hardware") or {}
    if not isinstance(training, Mapping):
        return payload
    given = {name: _inline(name, training[name]) for name in _FIELDS if training.get(name) not in (None, {})}
    if not given or not isinstance(hardware, Mapping):
        return payload
    found = Translation(stack=asked_stack(payload.get("stack")))
    keys = Keys(file="", values=given, found=found, prefix="training.")
    for path, value in _said(payload):
        found.put(path, value, path)
    translate_sharding(keys, {})
    is_several = isinstance(hardware.get("num_gpus"), int) and hardware["num_gpus"] > 1
    if is_several and given.keys() & _DDP.keys():
        found.payload.setdefault("hardware", {}).setdefault("strategy", "ddp")
    if found.value("hardware.strategy") == "ddp":
        translate_ddp(keys)
    else:
        for key in _DDP:
            keys.ignore(key)
    anew = found.request()
    rest = {name: value for name, value in training.items() if name not in given}
    aside = _merged(payload.get("set_aside") or {}, anew.get("set_aside", {}))
    spread = _merged(hardware, anew.get("hardware", {}))
    changed = {"training": {**rest, **anew.get("training", {})}, "hardware": spread, "set_aside": aside}
    return {**payload, **{name: value for name, value in changed.items() if value or name in payload}}


def _inline(name: str, value: Any) -> Any:
    """The content of an option that the Trainer takes as a mapping, as a text of one, or as the path of one.

    Source: transformers 5.23, training_args.py, TrainingArguments._VALID_DICT_FIELDS.
    """
    if name not in ("deepspeed", "fsdp_config") or not isinstance(value, str) or not value:
        return value
    if value.lstrip().startswith("{"):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            message = f"training.{name}: {value[:80]!r} is not JSON; accepted: an object, or the text of one"
            raise RequestError(message, field=f"training.{name}") from None
    raise RequestError(
        f"training.{name}: {value[:80]!r} is a path, and a request reads no files; accepted: what the file holds. The command line "
        "reads one that lies beside the file of the request",
        field=f"training.{name}",
    )


def _said(payload: Json) -> Iterator[tuple[str, Any]]:
    """What a request says itself of what may be translated, field by field."""
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "gradient_checkpointing"):
        if payload["training"].get(name) is not None:
            yield f"training.{name}", payload["training"][name]
    hardware = payload.get("hardware") or {}
    for name in ("strategy", "ddp", "fsdp_config"):
        yield from _leaves(f"hardware.{name}", hardware.get(name))
    deepspeed = hardware.get("deepspeed")
    if isinstance(deepspeed, Mapping):
        yield from _leaves("hardware.deepspeed.zero_optimization", deepspeed.get("zero_optimization"))


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    elif value is not None:
        yield path, value


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Json:
    """Mappings section by section, lists one after the other."""
    result = dict(base)
    for name, value in over.items():
        known = result.get(name)
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            result[name] = _merged(known, value)
        else:
            result[name] = [*known, *value] if isinstance(known, list) and isinstance(value, list) else value
    return result
