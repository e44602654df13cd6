"""Which models Liger patches."""

from estimator.inventory import Inventory

# Source: liger-kernel 0.8, transformers/monkey_patch.py, MODEL_TYPE_TO_APPLY_LIGER_FN. Older releases know fewer: 0.5.2 nine of them:
# gemma, gemma2, llama, mistral, mixtral, mllama, phi3, qwen2 and qwen2_vl.
PATCHED = frozenset(
    (
        *("exaone4", "falcon_h1", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4_text", "glm4", "glm4v", "glm4v_moe"),
        *("gpt_oss", "granite", "hunyuan_v1_dense", "hunyuan_v1_moe", "internvl", "llama", "llama4", "llama4_text", "llava"),
        *("ministral", "mistral", "mixtral", "mllama", "mllama_text_model", "nemotron", "olmo2", "olmo3", "paligemma", "phi3"),
        *("pixtral", "qwen2", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_vl", "qwen2_vl_text", "qwen3", "qwen3_5", "qwen3_5_moe"),
        *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "qwen3_vl_moe_text"),
        *("qwen3_vl_text", "smollm3", "smolvlm"),
    )
)
# Source: the same, apply_liger_kernel_to_granite, whose logits are scaled; apply_liger_kernel_to_pixtral, a vision tower alone.
_WITHOUT_FUSED_LOSS = frozenset({"granite", "pixtral"})


def patches(inventory: Inventory) -> bool:
    """Whether `use_liger_kernel` changes anything: other types are passed over with a line in the log."""
    return _type(inventory) in PATCHED


def fuses_loss(inventory: Inventory) -> bool:
    """Whether the fused linear cross-entropy is put in, unless the config says no."""
    return patches(inventory) and _type(inventory) not in _WITHOUT_FUSED_LOSS


def _type(inventory: Inventory) -> str:
    """Of the whole model, also where only its text part is modelled."""
    return str(inventory.config.get("root_model_type", inventory.model_type))
