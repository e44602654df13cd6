"""The resolved (text) config as plain JSON values, under the names that formulas read."""

from collections.abc import Mapping
from typing import Any

# Without bearing on memory, or recorded elsewhere in the inventory.
_LEFT_OUT = {
    "id2label",
    "label2id",
    "architectures",
    "transformers_version",
    "task_specific_params",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "problem_type",
    "chunk_size_feed_forward",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "initializer_range",
    "dtype",
    "torch_dtype",
    "model_type",
}

# Standard name → what config classes call it, beside the name itself (which attribute_map already serves for many).
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("d_model", "n_embd", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "decoder_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    "num_key_value_heads": (),
    "head_dim": ("attention_head_dim", "d_kv"),
    "intermediate_size": ("ffn_dim", "ffn_hidden_size", "n_inner", "d_ff", "decoder_ffn_dim"),
    "hidden_act": ("hidden_activation", "activation_function", "activation", "dense_act_fn"),
    "vocab_size": (),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_seq_len", "seq_length"),
    "tie_word_embeddings": (),
    "layer_types": (),
    "sliding_window": (),
    "use_cache": (),
    "attention_dropout": ("attn_pdrop", "attention_probs_dropout_prob"),
    "hidden_dropout": ("hidden_dropout_prob", "resid_pdrop", "dropout", "dropout_rate"),
    "embedding_dropout": ("embd_pdrop", "embd_dropout"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_token", "moe_topk", "moe_k"),
}


# What a model hands out of every layer, where its config asks for it: named only then.
_OUTPUTS = ("output_hidden_states", "output_attentions")

# Configs carry fields over from the architecture that a checkpoint was made of. Of these a class that does not declare them runs nothing,
# and formulas would.
_OF_SOME_CLASSES = (
    *("sliding_window", "layer_types", "hidden_activation", "final_logit_softcapping", "attn_logit_softcapping", "clip_qkv"),
    "moe_intermediate_size",
)

# These divide the hidden size by the heads, whatever else the config says.
_DIVIDING = ("gpt2", "gpt_bigcode", "gpt_neox", "stablelm")

# Where no intermediate size is configured, these take four times the hidden size.
_FOURFOLD = ("gpt2", "gptj", "gpt_bigcode", "bloom", "codegen", "gpt_neo")


def resolved(config: Any, text_config: Any) -> dict[str, object]:
    """Facts of the text config: its own fields, and standard names where it has others.

    Args:
        config: the config of the whole model.
        text_config: the part that describes the text decoder; may be `config` itself.
    """
    stray = {name for name in _OF_SOME_CLASSES if not _declares(type(text_config), name)}
    left_out = _LEFT_OUT | stray
    facts = {str(k): plain(v) for k, v in text_config.to_dict().items() if k not in left_out and not str(k).startswith("_")}
    facts |= {name: True for name in _OUTPUTS if getattr(config, name, False) or getattr(text_config, name, False)}
    for name, others in _SYNONYMS.items():
        if facts.get(name) is None:
            values = (getattr(text_config, other, None) for other in (name, *others) if other not in stray)
            facts[name] = plain(next((value for value in values if value is not None), None))
    _fill(facts, text_config)
    facts["root_model_type"] = config.model_type
    facts["is_composite"] = text_config is not config
    facts["is_encoder_decoder"] = bool(getattr(config, "is_encoder_decoder", False))
    return {name: value for name, value in sorted(facts.items()) if value is not None}


def _declares(kind: Any, name: str) -> bool:
    """Whether a config class has a field or a property of this name, or another name for one."""
    return name in kind.__dataclass_fields__ or name in (kind.attribute_map or ()) or hasattr(kind, name)


def _fill(facts: dict[str, object], config: Any) -> None:
    """What classes compute inside modules rather than in the config.

    Source: transformers, modeling_falcon.py, FalconAttention; modeling_gpt_bigcode.py, GPTBigCodeAttention; modeling_gpt2.py, GPT2Block;
    modeling_bloom.py, BloomMLP; modeling_mpt.py, MptMLP; modeling_mistral.py, MistralAttention (`head_dim or hidden_size // heads`);
    modeling_gpt_neox.py, GPTNeoXAttention (`head_size`); modeling_stablelm.py, StableLmAttention.
    """
    heads, hidden = facts.get("num_attention_heads"), facts.get("hidden_size")
    if facts.get("model_type") == "mpt" or config.model_type == "mpt":
        facts["intermediate_size"] = config.expansion_ratio * config.d_model
    if isinstance(hidden, int) and facts.get("intermediate_size") is None:
        facts["intermediate_size"] = 4 * hidden if config.model_type in _FOURFOLD else None
    if isinstance(heads, int):
        multi_query = bool(getattr(config, "multi_query", False))
        if config.model_type == "falcon":
            facts["num_key_value_heads"] = config.num_kv_heads if config.new_decoder_architecture else 1 if multi_query else heads
        elif config.model_type == "gpt_bigcode":
            facts["num_key_value_heads"] = 1 if multi_query else heads
        elif facts.get("num_key_value_heads") is None:
            facts["num_key_value_heads"] = heads
        stated = facts.get("head_dim") and config.model_type not in _DIVIDING  # 0 is none to the classes that can be built with it
        if isinstance(hidden, int) and not stated and heads:
            facts["head_dim"] = hidden // heads


def scalars(settings: Mapping[str, Any]) -> dict[str, object]:
    """The single values of a checkpoint's `quantization_config`; its lists of modules can hold thousands of names."""
    return {str(k): plain(v) for k, v in settings.items() if v is None or isinstance(v, (bool, int, float, str))}


def plain(value: Any) -> Any:
    """The value as JSON has it: types of torch and enums as their names."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    return str(value).removeprefix("torch.")
