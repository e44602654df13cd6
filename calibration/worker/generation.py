"""transformers' own `generate` over synthetic prompts of full length, with the meter at the border between reading and writing."""

import time
from functools import wraps
from typing import Any

import torch

from calibration.case import Case
from calibration.worker.meter import Meter
from calibration.worker.model import adapted
from calibration.worker.training import Sequences


def generate(case: Case, model: Any, meter: Meter, device: torch.device) -> float:
    """Runs the case's calls, greedily, every prompt to its full number of new tokens.

    Returns:
        Wall time of the last call [s].
    """
    model = adapted(case, model).eval()
    meter.loaded(model)
    inputs = _prompts(case, device)
    # `prepare_model_for_kbit_training` and training configs switch the cache off
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.config.use_cache = True
    borders = _Borders(meter, base)
    seconds = 0.0
    for _ in range(case.num_steps):
        meter.begin_step()
        borders.num_passes = 0
        started = time.monotonic()
        found = base.generate(
            **inputs,
            max_new_tokens=case.inference["max_new_tokens"],
            cache_implementation=case.inference.get("cache_implementation", "dynamic"),
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,  # so that random weights do not end a sequence early
        )
        meter.close("prefill" if borders.num_passes == 1 else "decode")
        seconds = time.monotonic() - started
        assert found.shape[1] == case.sequence_length
        del found
    return seconds


class _Borders:
    """Reading is over when inputs are prepared for the second time: compiled passes have no hooks that could tell."""

    def __init__(self, meter: Meter, model: Any) -> None:
        self.num_passes = 0
        prepare = model.prepare_inputs_for_generation

        @wraps(prepare)  # generate reads the names of its arguments
        def counted(*arguments: Any, **named: Any) -> Any:
            self.num_passes += 1
            if self.num_passes == 2:
                meter.close("prefill")
            return prepare(*arguments, **named)

        model.prepare_inputs_for_generation = counted


def _prompts(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    """One batch; padding, where there is any, is on the left."""
    length = case.inference["prompt_length"]
    assert isinstance(length, int)
    rows = [row for row, _ in zip(Sequences(case, length), range(case.batch_size), strict=False)]
    mask = torch.stack([row["attention_mask"].flip(0) for row in rows])
    return {"input_ids": torch.stack([row["input_ids"] for row in rows]).to(device), "attention_mask": mask.to(device)}
