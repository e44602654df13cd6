"""What the worker can be asked, by name. A task takes the payload of a request and returns JSON values."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

# Name → (module, function); imported when first asked for, so that one task does not pay for another's imports.
TASKS: dict[str, tuple[str, str]] = {
    "inventory": ("estimator.introspect.inventory", "inventory_task"),
    "timeline": ("estimator.introspect.trace.tasks", "timeline_task"),
    "trace": ("estimator.introspect.trace.tasks", "program_task"),
    "versions": ("estimator.introspect.versions", "versions_task"),
}

# Done before the first request: the first model costs seconds of imports, which must not count against a request.
WARM_UP: dict[str, dict[str, Any]] = {
    "inventory": {
        "config": {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        "content_hash": "",
    }
}


def task(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """The function of a task.

    Raises:
        KeyError: if there is no such task.
    """
    module, function = TASKS[name]
    found: Callable[[Mapping[str, Any]], Any] = getattr(import_module(module), function)
    return found
