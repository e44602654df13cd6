"""Tensor parallelism, `tp_plan="auto"`: a rank's slices of a model, as a model of its own.

Linear layers are cut along their outputs (colwise) or their inputs (rowwise), so that each rank has some of the heads and some of the
width of every MLP; hidden states are whole everywhere. Rank 0 has the largest slices.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, lru_cache
from importlib.resources import files

from estimator.errors import RequestError
from estimator.inventory import Inventory, TensorRole, TensorRow
from estimator.units import ceil_div

_FIELD = "hardware.strategy"
TRANSFORMERS = (5, 23)
"""Whose plans these are."""
# Source: transformers 5.23, distributed/tensor_parallel.py: shard_param of ColwiseParallel, RowwiseParallel, EmbeddingParallel and
# PackedColwiseParallel; the others leave parameters whole.
_CUT_OUTPUTS = ("colwise", "colwise_gather_output", "packed_colwise")
_CUT_INPUTS = ("rowwise",)
_CUT_ROWS = ("embedding_rowwise",)
_WHOLE = ("moe_tp_experts", "replicated_with_grad_allreduce", "mla_kv_a_proj")
_KNOWN = (*_CUT_OUTPUTS, *_CUT_INPUTS, *_CUT_ROWS, *_WHOLE)
# Projections whose outputs are queries of all heads, and keys.
_QUERIES = ("q_proj", "q_b_proj", "query_key_value")
_KEYS = ("k_proj", "query_key_value")
_HEAD = "lm_head"


@cache
def plans() -> Mapping[str, Mapping[str, str]]:
    """`model_type` → module or parameter (`*` for the number of a layer) → how it is cut."""
    text = files("estimator").joinpath("data/tensor_parallel.json").read_text(encoding="utf-8")
    return {model_type: plan["styles"] for plan in json.loads(text)["plans"] for model_type in plan["model_types"]}


def plan_of(inventory: Inventory, num_gpus: int) -> Mapping[str, str]:
    """Module or parameter (`*` for the number of a layer) → how it is cut.

    Raises:
        RequestError: if the model has no plan, its plan gathers inside the layers, or its heads do not divide.
    """
    plan = plans().get(inventory.model_type)
    if plan is None:
        raise RequestError(
            f"{_FIELD}: 'tensor_parallel' is not known for {inventory.model_type!r}; accepted: device_map, or a model of "
            f"{', '.join(sorted(plans()))}",
            field=_FIELD,
        )
    gathered = sorted(name for name, style in plan.items() if style not in _KNOWN or ("gather" in style and name != _HEAD))
    if gathered:
        raise RequestError(
            f"{_FIELD}: 'tensor_parallel' of {inventory.model_type!r} puts outputs together inside its layers ({gathered[0]}), "
            f"which is not modelled; accepted: device_map",
            field=_FIELD,
        )
    for name, number in _divided(inventory, plan).items():
        if number % num_gpus:
            raise RequestError(
                f"hardware.num_gpus: {num_gpus} does not divide {name}, {number}; accepted with 'tensor_parallel': a divisor",
                field="hardware.num_gpus",
            )
    return plan


def _divided(inventory: Inventory, plan: Mapping[str, str]) -> dict[str, int]:
    """Numbers of the config of which a rank has a part, all of them multiples of the number of ranks.

    Source: transformers 5.23, models/*/modeling_*.py (`view(*input_shape, -1, self.head_dim)` of a rank's slice) and
    distributed/tensor_parallel.py, get_kv_heads_per_rank; experts' gate and up projections are cut half by half (_StridedShard).
    """
    config = inventory.config
    attention = {name: style for name, style in plan.items() if ".self_attn." in name or ".attention." in name}
    cut = {name.rpartition(".")[2] for name, style in attention.items() if style == "colwise"}
    wanted = []
    if cut.intersection(_QUERIES):
        wanted.append("num_attention_heads")
    if cut.intersection(_KEYS):
        wanted.append("num_key_value_heads")
    if "packed_colwise" in plan.values():
        wanted += ["moe_intermediate_size"] if config.get("moe_intermediate_size") else ["intermediate_size"]
    return {name: number for name in wanted if isinstance(number := config.get(name), int)}


@lru_cache(maxsize=256)
def rank(inventory: Inventory, num_gpus: int) -> Inventory:
    """What the first rank has.

    Raises:
        RequestError: as `plan_of`.
    """
    plan = plan_of(inventory, num_gpus)
    config = dict(inventory.config)
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(config.get("head_dim"), int) and isinstance(heads, int) and isinstance(width, int):
        config["head_dim"] = width // heads
    for name, number in _divided(inventory, plan).items():
        config[name] = number // num_gpus
    return replace(
        inventory,
        content_hash=f"{inventory.content_hash}, first of {num_gpus} ranks of tensor parallelism",
        rows=tuple(_cut(row, plan, num_gpus) for row in inventory.rows),
        config=config,
    )


def _cut(row: TensorRow, plan: Mapping[str, str], num_gpus: int) -> TensorRow:
    style = plan.get(row.pattern.replace("{}", "*"), plan.get(row.module_pattern.replace("{}", "*")))
    is_whole = style is None or style in _WHOLE or (style in _CUT_INPUTS and row.leaf == "bias")
    if is_whole or row.role is not TensorRole.PARAMETER:
        return row
    # A bias has no dimension of inputs.
    dimension = 0 if style in _CUT_ROWS or len(row.shape) == 1 else -2 if style in _CUT_OUTPUTS else -1
    shape = list(row.shape)
    shape[dimension] = ceil_div(shape[dimension], num_gpus)
    return replace(row, shape=tuple(shape))


def gathered_bytes(inventory: Inventory, num_gpus: int, batch: int, width: int) -> int:
    """Logits of one position from all ranks, twice: as they arrive, and put together [bytes].

    Args:
        num_gpus: ranks; each sends as much as the first.
        batch: sequences.
        width: of one logit [bytes].

    Source: torch, distributed/tensor/placement_types.py, Shard._to_replicate_tensor (all_gather_tensor along dimension 0, then cat).
    """
    vocabulary = inventory.config["vocab_size"]
    assert isinstance(vocabulary, int)
    return 2 * batch * num_gpus * ceil_div(vocabulary, num_gpus) * width
