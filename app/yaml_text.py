"""YAML, or JSON, as a mapping: within bounds and with no key twice, since texts come from strangers."""

from typing import Any

import yaml

from app.reading import repeated_key
from app.redaction import redacted
from estimator.errors import RequestError

MAX_CHARACTERS = 1 << 20
MAX_NODES = 20_000


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise repeated_key(key)
        return super().construct_mapping(node, deep)


def parse(name: str, text: str, max_characters: int = MAX_CHARACTERS) -> dict[str, Any]:
    """The mapping that a text holds.

    Args:
        name: of its file or field, for messages.
        text: YAML, of which JSON is a part.
        max_characters: that are accepted.

    Raises:
        RequestError: if it holds anything else, a key twice, or more than `MAX_NODES` values with its aliases written out.
    """
    if len(text) > max_characters:
        raise RequestError(f"{name}: longer than {max_characters:,} characters", field=name)
    try:
        content = _content(name, text)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # PyYAML's scanner believes escapes: `"\UFFFFFFFF"`
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"{name}: neither JSON nor YAML: {redacted(reason)}", field=name) from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RequestError(f"{name}: expected a mapping of names to values", field=name)
    return content


def _content(name: str, text: str) -> Any:
    loader = _Loader(text)  # JSON is read as the YAML that it is
    try:
        node = loader.get_single_node()
        if node is not None and _size(node, {}, ()) > MAX_NODES:
            raise RequestError(f"{name}: holds more than {MAX_NODES:,} values", field=name)
        return _constructed(name, loader, node) if node is not None else None
    finally:
        loader.dispose()


def _constructed(name: str, loader: _Loader, node: yaml.Node) -> Any:
    try:
        return loader.construct_document(node)
    except (LookupError, AttributeError, TypeError, OverflowError):  # PyYAML's constructors believe tags: `!!int ''`, `!!bool x`
        raise RequestError(f"{name}: a value is not what its tag says", field=name) from None


def _size(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Values under a node, each alias counted as often as it is used."""
    if id(node) in above:
        raise yaml.YAMLError("an alias stands inside what it repeats")
    if id(node) not in known:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_size(child, known, (*above, id(node))) for child in children)
    return known[id(node)]
