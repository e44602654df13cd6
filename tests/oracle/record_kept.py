"""What other versions of transformers keep of a layer for the backward pass, and what their loss takes: a script of its own.

The versions that the tests run with cannot stand beside others. With another one first on the path, alone in its folder,

    pip install --no-deps --target other transformers==4.51.3 tokenizers==0.21.1 huggingface_hub==0.30.2
    PYTHONPATH=other:. python -P tests/oracle/record_kept.py >> tests/estimator/data/kept_by_other_transformers.jsonl

prints a line per model, with its cache on and off: tiny models in bfloat16, trained in full, without checkpointing and padding. With
`peaks` behind it, for `data/peaks_by_other_transformers.jsonl`, it prints the peak of a pass forward and backward through a model whose
logits are most of what it makes, for one sequence and for two.
"""

import gc
import json
import sys
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from tests.oracle.live import LiveStorages

BATCH, LENGTH, FEW, MANY = 2, 24, 3, 4
_SHARED = {
    "hidden_size": 160,
    "intermediate_size": 272,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 352,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
# Norms without means alone: the CPU's layer norm keeps its statistics in 16 bit, CUDA's in 32.
MODELS: tuple[dict[str, Any], ...] = (
    {"model_type": "llama"},
    {"model_type": "llama", "num_key_value_heads": 4},
    {"model_type": "mistral", "sliding_window": None},
    {"model_type": "qwen2"},
    {"model_type": "qwen2", "num_key_value_heads": 4},
    {"model_type": "qwen3", "head_dim": 40},
    {"model_type": "gemma2", "head_dim": 40, "attn_implementation": "eager"},
    {"model_type": "phi3"},
    {"model_type": "olmo2"},
    {"model_type": "granite"},
    {"model_type": "gemma", "head_dim": 40},
    {"model_type": "olmo"},
    {"model_type": "cohere"},
)

# Long, for a loss that leaves off the last position.
OF_LOGITS: dict[str, Any] = {
    **_SHARED,
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "vocab_size": 4096,
}
LENGTH_OF_LOGITS = 240


def kept(model: dict[str, Any], *, num_layers: int, use_cache: bool) -> int:
    """Alive once the loss is there, outputs included [bytes, not rounded]."""
    fields = {**_SHARED, **model, "num_hidden_layers": num_layers, "use_cache": use_cache}
    attention = fields.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    built = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16, attn_implementation=attention).train()
    ids = torch.randint(1, 352, (BATCH, LENGTH))
    ones = torch.ones_like(ids)  # as collators give them
    live = LiveStorages(granularity_bytes=1)
    live.know([*built.parameters(), *built.buffers()], "static")
    live.know([ids, ones], "inputs")
    with live:
        outputs = built(input_ids=ids, attention_mask=ones, labels=ids)
        gc.collect()
        found = live.live_bytes
    del outputs
    return found


def peak_of_logits(batch: int) -> int:
    """Most that is alive at once, from the first layer to the last gradient [bytes, not rounded]."""
    config = AutoConfig.for_model(**OF_LOGITS, use_cache=False)
    built = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16).train()
    ids = torch.randint(1, 352, (batch, LENGTH_OF_LOGITS))
    live = LiveStorages(granularity_bytes=1)
    live.know([*built.parameters(), *built.buffers()], "static")
    ones = torch.ones_like(ids)
    live.know([ids, ones], "inputs")
    with live:
        built(input_ids=ids, attention_mask=ones, labels=ids).loss.backward()
    return live.peak.num_bytes


def main() -> None:
    if sys.argv[1:] == ["peaks"]:
        for batch in (1, 2):
            line = {"transformers": transformers.__version__, "batch": batch, "peak_bytes": peak_of_logits(batch)}
            print(json.dumps(line), flush=True)
        return
    for model in MODELS:
        for use_cache in (False, True):
            try:
                few, many = (kept(model, num_layers=layers, use_cache=use_cache) for layers in (FEW, MANY))
            except ValueError as error:  # a version that does not have the model
                print(f"{model}: {error}", file=sys.stderr)
                break
            fields = {**_SHARED, **model}
            line = {"transformers": transformers.__version__, "config": fields, "use_cache": use_cache, "layer_bytes": many - few}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
