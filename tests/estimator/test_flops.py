"""FLOPs of a step against torch's own counter, on tiny real models in every kind of training."""

from collections.abc import Mapping

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from estimator.flops import step_flops
from tests.oracle import recipes
from tests.oracle.models import MODES, VOCABULARY, AdapterSpec, Mode, build

B, S, LAYERS = 3, 16, 3
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe", "deepseek_v2", "deepseek_v2_lite")
# One product after the other: torch counts no grouped one.
EXPERTS = dict.fromkeys(MIXTURES, "eager")
SCHEMES = {"kept": None, "checkpointed": False, "checkpointed_reentrantly": True}
FULL, LORA = MODES["full_fp32"], Mode(load_dtype=torch.float32, adapter=AdapterSpec(), adapter_dtype=torch.float32)


def counted(family: str, mode: Mode, gc: bool | None, config: Mapping[str, object] | None = None) -> dict[str, int]:
    """Forward and backward FLOPs of the real model, with attention written out, which torch counts on the CPU too."""
    whole = build(family, mode, LAYERS, attention="eager", experts=EXPERTS.get(family), gc=gc, config=config)
    ids = torch.randint(0, VOCABULARY, (B, S))
    counter = FlopCounterMode(display=False)
    with counter:
        loss = whole(input_ids=ids, labels=ids).loss
    forward = counter.get_total_flops()
    with counter:
        loss.backward()
    return {"forward": forward, "backward": counter.get_total_flops()}


def said(family: str, mode: Mode, gc: bool | None, config: Mapping[str, object] | None = None) -> dict[str, int]:
    flops = step_flops(recipes.inventory(family, LAYERS, config), recipes.recipe(family, mode, B, S, gc=gc, attention="eager"))
    return {"forward": flops.forward, "backward": flops.backward}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", [FULL, LORA], ids=["full", "lora"])
def test_a_dense_model_runs_the_flops_that_torch_counts(mode: Mode, scheme: str) -> None:
    assert said("llama", mode, SCHEMES[scheme]) == counted("llama", mode, SCHEMES[scheme])
