"""`device_map="auto"` over several cards, against transformers' own placement of the model on the meta device."""

import json
from dataclasses import replace

import pytest
import torch
from transformers.integrations import accelerate as real

from estimator.parallelism.options import Parallel, Strategy
from estimator.parallelism.placement import UNLIMITED, card_of, placement
from estimator.sources.catalogue import DIRECTORY
from tests.estimator.real_models import inventory_of, meta_model
from tests.estimator.recipes import inference

MODELS = (
    "01-ai-yi-34b.json",
    "bigcode-starcoder2-3b.json",
    "bigscience-bloom-560m.json",
    "eleutherai-pythia-1b.json",
    "facebook-opt-1.3b.json",
    "google-gemma-2-2b.json",
    "meta-llama-llama-2-70b-hf.json",
    "meta-llama-llama-3.2-1b.json",
    "microsoft-phi-2.json",
    "mistralai-mixtral-8x7b-v0.1.json",
    "openai-community-gpt2.json",
    "qwen-qwen2.5-0.5b-instruct.json",
    "tiiuae-falcon-7b.json",
)


@pytest.mark.parametrize("file", MODELS)
def test_modules_lie_where_transformers_puts_them(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without cards the function would strike them out; it otherwise only reads what is free.
    monkeypatch.setattr(real, "get_max_memory", dict)
    config = json.loads((DIRECTORY / file).read_text(encoding="utf-8"))
    config = config.get("config", config)
    inventory, model = inventory_of(config), meta_model(config, torch.bfloat16)
    for num_cards in (2, 3, 4):
        limits = dict.fromkeys(range(num_cards), UNLIMITED) | {"cpu": UNLIMITED}
        memory = real.get_balanced_memory(model, limits, model._no_split_modules)
        expected = real.infer_auto_device_map(model, memory, model._no_split_modules, clean_result=False)
        recipe = replace(inference(), parallel=Parallel(strategy=Strategy.DEVICE_MAP, num_gpus=num_cards))
        ours = placement(inventory, recipe)
        names = [name for name, _ in model.named_parameters()]
        assert {n: card_of(ours, n) for n in names} == {n: card_of(expected, n) for n in names}
