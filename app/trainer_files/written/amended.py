"""A user's own file with some of its values changed: comments, order and all other keys stay."""

from collections.abc import Mapping

import yaml

from app.yaml_text import parse

# Keys of micro-batch, accumulation and length.
SIZES: Mapping[str, tuple[str, str, str]] = {
    "axolotl": ("micro_batch_size", "gradient_accumulation_steps", "sequence_len"),
    "llamafactory": ("per_device_train_batch_size", "gradient_accumulation_steps", "cutoff_len"),
    "trl": ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
    "transformers": ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
}


def amended(name: str, text: str, values: Mapping[str, int]) -> str:
    """The text with top-level keys set; keys that it lacks are added at its end, or at its beginning in braces.

    Args:
        name: of the file, for messages.
        text: YAML, in block style or, as JSON is, in braces.
        values: by key.
    """
    held = parse(name, text)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode), "parse takes nothing else"
    places = {key.value: (value.start_mark.index, value.end_mark.index) for key, value in root.value}
    changed = {key: value for key, value in values.items() if held.get(key) != value}
    for key in sorted(changed.keys() & places.keys(), key=places.__getitem__, reverse=True):
        start, end = places[key]
        text = f"{text[:start]}{' ' if text[start - 1] == ':' else ''}{changed[key]}{text[end:]}"
    for key, value in changed.items():
        if key in places:
            continue
        if root.flow_style:
            brace = root.start_mark.index + 1
            text = f'{text[:brace]}"{key}": {value}, {text[brace:]}'
        else:
            text = f"{text.rstrip()}\n{key}: {value}\n"
    return text
