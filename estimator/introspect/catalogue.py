"""Compiles the catalogue: from the facts in each file of `estimator/data/models` to the inventory beside them, and the index.

python -m estimator.introspect.catalogue            rebuild all inventories with the installed transformers, and the index
python -m estimator.introspect.catalogue --check    exit with 1 if anything would change
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from estimator.dtypes import DType
from estimator.introspect.inventory import inspect
from estimator.inventory_codec import decode, encode
from estimator.sources.cache import content_hash
from estimator.sources.catalogue import DIRECTORY, INDEX


def main(arguments: list[str]) -> int:
    """Compiles or checks all files; returns the exit status."""
    check = arguments == ["--check"]
    changed, lines = [], []
    for path in sorted(DIRECTORY.glob("*.json")):
        if path.name == INDEX:
            continue
        data = json.loads(path.read_bytes())
        data["inventory"] = compiled(data)
        changed += [path.name] if _write(path, model_text(data), check) else []
        lines.append(index_line(path.name, data))
    lines.sort(key=lambda line: str(line["id"]).lower())
    text = '{"models": [\n' + ",\n".join(json.dumps(line) for line in lines) + "\n]}\n"
    changed += [INDEX] if _write(DIRECTORY / INDEX, text, check) else []
    print(f"{len(lines)} models, {len(changed)} files {'differ' if check else 'written'}", *changed[:20])
    return 1 if check and changed else 0


def compiled(data: dict[str, Any]) -> dict[str, object]:
    """The encoded inventory of a model's facts. Of weights whose config names no type, the type is that of the files, where it is known."""
    inventory = inspect(data["config"], content_hash(data["config"]))
    if inventory.checkpoint_dtype is None and data.get("weights"):
        inventory = replace(inventory, checkpoint_dtype=DType(data["weights"]["dtype"]))
    return encode(inventory)


def index_line(file: str, data: dict[str, Any]) -> dict[str, object]:
    """What the index holds of one model."""
    inventory = decode(data["inventory"])
    return {
        "id": data["id"],
        "file": file,
        "model_type": inventory.config["root_model_type"],
        "model_class": inventory.model_class,
        "num_parameters": inventory.num_parameters,
        **({"aliases": data["aliases"]} if data.get("aliases") else {}),
    }


def model_text(data: dict[str, Any]) -> str:
    """A file of the catalogue: one line per fact and one per row, so that a change can be read in a diff."""
    inventory = data["inventory"]
    rows = ",\n".join(f"   {json.dumps(row)}" for row in inventory["rows"])
    facts = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in inventory.items() if name != "rows")
    head = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in data.items() if name != "inventory")
    return f'{{\n{head},\n "inventory": {{\n{facts},\n  "rows": [\n{rows}\n  ]\n }}\n}}\n'


def _write(path: Path, text: str, check: bool) -> bool:
    if path.exists() and path.read_text() == text:
        return False
    if not check:
        path.write_text(text)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
