"""Requests that run: shown in the API's documentation, offered as presets on the page, and sent by a test."""

from app.answer import Json

_NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

QLORA: Json = {
    "model": "meta-llama/Llama-3.1-8B",
    "dtype": "bfloat16",
    "quantization": _NF4,
    "peft": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": _SEVEN},
    "prepare_model_for_kbit_training": True,
    "training": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_length": 2048,
        "optim": "paged_adamw_8bit",
        "bf16": True,
        "gradient_checkpointing": True,
    },
    "hardware": {"gpu": "rtx4090"},
}
SFT_LORA: Json = {
    "model": "Qwen/Qwen2.5-7B",
    "dtype": "bfloat16",
    "peft": {"r": 16, "target_modules": "all-linear"},
    "trainer": "trl",
    "training": {"per_device_train_batch_size": 2, "max_length": 1024},
    "hardware": {"gpu": "a100-80"},
}
FULL: Json = {
    "model": "HuggingFaceTB/SmolLM2-1.7B",
    "dtype": "bfloat16",
    "training": {
        "per_device_train_batch_size": 1,
        "max_length": 1024,
        "bf16": True,
        "gradient_checkpointing": True,
        "optim": "adamw_torch_fused",
    },
    "hardware": {"gpu": "l4"},
}
INFERENCE: Json = {
    "model": "mistralai/Mistral-7B-v0.1",
    "dtype": "bfloat16",
    "inference": {"batch_size": 1, "prompt_length": 4096, "max_new_tokens": 512},
    "hardware": {"gpu": "rtx3090"},
}

ESTIMATE: dict[str, Json] = {
    "qlora": {"summary": "QLoRA with the transformers Trainer", "value": QLORA},
    "lora": {"summary": "LoRA with TRL's SFTTrainer", "value": SFT_LORA},
    "full": {"summary": "Full fine-tuning", "value": FULL},
    "inference": {"summary": "Generation", "value": INFERENCE},
}
PLAN: dict[str, Json] = {
    "qlora": {"summary": "The largest micro-batch of a global batch of 16", "value": {**QLORA, "global_batch_size": 16}},
    "length": {"summary": "The longest sequence", "value": {**QLORA, "objective": "longest_sequence"}},
    "which": {
        "summary": "Which cards fit, by price",
        "value": {**QLORA, "global_batch_size": 16, "hardware": {"filter": "24GB..80GB bf16"}, "sort": "price"},
    },
}
CHECK: dict[str, Json] = {"qlora": ESTIMATE["qlora"], "lora": ESTIMATE["lora"]}
SWEEP: dict[str, Json] = {
    "qlora": {
        "summary": "Micro-batch by length",
        "value": {**QLORA, "sweep": {"per_device_train_batch_size": "1..16", "max_length": "512..8192:512"}},
    },
}
CONVERT: dict[str, Json] = {
    "axolotl": {
        "summary": "A QLoRA of axolotl with a DeepSpeed JSON",
        "value": {
            "files": [
                {
                    "name": "train.yaml",
                    "content": "base_model: meta-llama/Llama-3.1-8B\nadapter: qlora\nload_in_4bit: true\nlora_r: 16\n"
                    "lora_target_linear: true\nsequence_len: 2048\nmicro_batch_size: 2\ngradient_checkpointing: true\n"
                    "deepspeed: zero2.json\n",
                },
                {"name": "zero2.json", "content": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}},
            ],
            "hardware": {"num_gpus": 2},
        },
    },
}
TRACE: dict[str, Json] = {"qlora": ESTIMATE["qlora"], "full": ESTIMATE["full"]}
