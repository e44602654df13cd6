"""Recipes at which the libraries' own code stops on real tensors too: no trace can or should get further.

Each is run for real, on a small model, by tests/estimator/test_coverage.py, which expects the same exception.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
_GROUPED = {**_SMALL, "intermediate_size": 64, "num_key_value_heads": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """An exception of a library."""

    names: tuple[str, ...]
    methods: tuple[str, ...]
    checkpointing: bool | None = None
    """With checkpointing alone or without it alone, which is what asks for gradients of the embeddings; None for both."""
    traced: str
    """What the trace's reason holds."""
    real: str
    """What the exception on real tensors says."""
    config: Mapping[str, Any]
    """Of a small model that shows it."""


_TUPLE = "'tuple' object has no attribute 'dtype'"
_LLAMA4 = {**_GROUPED, "head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 4, "interleave_moe_layer_step": 1}
_GIT = {
    **_SMALL,
    "intermediate_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    },
}

_BLT_PART = {"hidden_size": 64, "hidden_size_global": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
_BLT = {
    "hidden_size": 64,
    "vocab_size": 320,
    "encoder_hash_byte_group_vocab": 64,
    "encoder_hash_byte_group_nb_functions": 1,
    "encoder_hash_byte_group_size": [3],
    **dict.fromkeys(("patcher_config", "encoder_config", "decoder_config", "global_config"), _BLT_PART | {"vocab_size": 320}),
}
_LEAF = "a leaf Variable that requires grad"

STOPS: tuple[Stop, ...] = (
    # their routers are linear layers that return a tuple, which PEFT's wrapper of "all-linear" does not expect
    Stop(names=("llama4_text", "llama4"), methods=("lora", "qlora"), traced=_TUPLE, real=_TUPLE, config=_LLAMA4),
    Stop(names=("phimoe",), methods=("lora", "qlora"), traced=_TUPLE, real=_TUPLE, config={**_GROUPED, "num_local_experts": 4}),
    # a linear layer of several groups, whose adapter is made for one
    Stop(
        names=("deepseek_v4",),
        methods=("lora", "qlora"),
        traced="Attempting to broadcast a dimension of length",
        real="must match the size of tensor",
        config={**_SMALL, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2},
    ),
    # packed weights taken for numbers: clamped in place, and multiplied outside their layer
    Stop(
        names=("gemma3n_text",),
        methods=("qlora",),
        traced="cast from torch.float32 to out tensor with dtype torch.uint8",
        real="can't be cast to the desired output type",
        config={
            **_GROUPED,
            "head_dim": 16,
            "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 16,
            "activation_sparsity_pattern": [0.0, 0.0],
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Stop(
        names=("longcat_flash",),
        methods=("qlora",),
        traced="a and b must have same reduction dim",
        real="mat1 and mat2 shapes cannot be multiplied",
        config={
            **_SMALL,
            "num_layers": 1,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
    ),
    # takes the places of an image off its logits, and adds in place to embeddings whose gradients an adapter needs
    Stop(names=("git",), methods=("full",), traced="Expected input batch_size", real="Expected input batch_size", config=_GIT),
    Stop(
        names=("git",),
        methods=("lora", "qlora"),
        checkpointing=False,
        traced="Expected input batch_size",
        real="Expected input batch_size",
        config=_GIT,
    ),
    Stop(names=("git",), methods=("lora", "qlora"), checkpointing=True, traced=_LEAF, real=_LEAF, config=_GIT),
    # so does this one to the embeddings of its bytes
    Stop(names=("blt",), methods=("lora",), checkpointing=True, traced=_LEAF, real=_LEAF, config=_BLT),
)


def stops_in_reality(name: str, method: str, reason: str, *, checkpointing: bool) -> bool:
    """Whether a trace stopped where real tensors stop too."""
    return any(
        name in stop.names and method in stop.methods and stop.checkpointing in (None, checkpointing) and stop.traced in reason
        for stop in STOPS
    )
