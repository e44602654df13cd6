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
    in_braces = text.lstrip().startswith("{")
    for key, value in values.items():
        if held.get(key) == value:
            continue
        if key not in held:
            text = _added(text, key, value, in_braces=in_braces)
        elif in_braces:
            text = re.sub(rf"(\"{re.escape(key)}\"\s*:\s*)[^,}}\s]+", rf"\g<1>{value}", text, count=1)
        else:
            text = re.sub(rf"(?m)^([\"']?{re.escape(key)}[\"']?[ \t]*:)[ \t]*[^\s#]*", rf"\g<1> {value}", text, count=1)
    return text


def _added(text: str, key: str, value: int, *, in_braces: bool) -> str:
    if in_braces:
        return text.replace("{", f'{{"{key}": {value}, ', 1)
    return f"{text.rstrip()}\n{key}: {value}\n"
