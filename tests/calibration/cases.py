"""Tiny cases that run on a CPU within seconds."""

from typing import Any

from calibration.case import Case

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "tie_word_embeddings": False,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320, "n_positions": 64}
MIXTRAL: dict[str, Any] = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
QLORA: dict[str, Any] = {
    "dtype": "bfloat16",
    "quantization": NF4,
    "peft": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "training": {"per_device_train_batch_size": 2, "max_length": 16, "bf16": True, "gradient_checkpointing": True},
}


def case(config: dict[str, Any] = LLAMA, **changes: Any) -> Case:
    """A QLoRA case on a tiny model, with other fields where given."""
    return Case.from_request({"model": {"config": config}, **QLORA, **changes}, config)
