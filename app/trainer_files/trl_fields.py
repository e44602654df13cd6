"""Fields of `trl sft --config` beside those of SFTConfig."""

from app.fields import SFT_CONFIG, TRAINING_ARGUMENTS, names

# Source: trl 0.13–1.16, scripts/utils.py, ScriptArguments and DatasetMixtureConfig.
SCRIPT = names("""
    dataset_config dataset_name dataset_streaming dataset_test_split dataset_train_split datasets gradient_checkpointing_use_reentrant
    ignore_bias_buffers streaming test_split_size
""")

# Source: trl 0.13–1.16, trainer/model_config.py, ModelConfig.
MODEL = names("""
    attn_implementation bnb_4bit_quant_storage bnb_4bit_quant_type dtype load_in_4bit load_in_8bit lora_alpha lora_dropout
    lora_modules_to_save lora_r lora_target_modules lora_target_parameters lora_task_type model_name_or_path model_revision torch_dtype
    trust_remote_code use_bnb_nested_quant use_dora use_peft use_rslora
""")

# Source: trl 1.16, cli/main.py and scripts/utils.py, TrlParser: what is not an argument of the script.
LAUNCH = names("accelerate_config config env")

# Fields that scripts of transformers' own have as well.
SHARED = names("attn_implementation dtype model_name_or_path model_revision torch_dtype trust_remote_code")

KNOWN = SCRIPT | MODEL | LAUNCH | SFT_CONFIG | TRAINING_ARGUMENTS
