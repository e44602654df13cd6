"""A user's own file with some of its values changed: comments, order and all other keys stay."""

import re
from collections.abc import Mapping

from app.trainer_files.parsing import parse

# Keys of micro-batch, accumulation and length.
SIZES: Mapping[str, tuple[str, str, str]] = {
    "axolotl": ("micro_batch_size", "gradient_accumulation_steps", "sequence_len"),
    "llamafactory": ("per_device_train_batch_size", "gradient_accumulation_steps", "cutoff_len"),
    "trl": ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
    "transformers": ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
}


def amended(name: str, text: str, values: Mapping[str, int]) -> str:
    """The text with top-level keys set; keys that it lacks are added at its end.

    Args:
        name: of the file, for messages.
        text: YAML, in block style or, as JSON is, in braces.
        values: by key.
    """
    held = parse(name, text)
    for key, value in values.items():
        if held.get(key) == value:
            continue
        text, number = re.subn(_line(key), rf"\g<1>{value}", text, count=1)
        if not number:
            text = _added(text, key, value)
    return text


def _line(key: str) -> str:
    """A key of the top level with the number, or nothing, that follows it."""
    return rf"(?m)^((?:\s*[{{,])?[ \t]*[\"']?{re.escape(key)}[\"']?[ \t]*:[ \t]*)(?:\d+|null|~)?"


def _added(text: str, key: str, value: int) -> str:
    if text.lstrip().startswith("{"):
        return text.replace("{", f'{{"{key}": {value}, ', 1)
    return f"{text.rstrip()}\n{key}: {value}\n"
