"""Versions of the frameworks in the inspecting process."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers


def versions_task(payload: Mapping[str, Any]) -> dict[str, str]:
    """The worker's task `versions`: nothing → name and version of each framework it works with."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}
