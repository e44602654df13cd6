"""An inventory as transformers 4 had it: experts as modules of their own, routers as linear layers.

transformers 5 fuses the experts of a layer into two parameters, which bitsandbytes leaves alone; under 4 the same recipe quantized them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from estimator.inventory import Inventory, ModuleKind, TensorRow


@dataclass(frozen=True, slots=True, kw_only=True)
class _Experts:
    """How transformers 4 named the parts of an MoE block."""

    block: tuple[str, str]
    """Name of the block's module in 5 and in 4."""
    gate_up: tuple[str, ...]
    """One module for each half of `gate_up_proj` where experts were modules; one parameter where they were fused already."""
    down: str
    fused: bool = False
    router: tuple[str, str] | None = None
    """Name of the router in 5 and in 4, where it became a linear layer going back; None where it is the same parameter in both."""


_W = ("w1", "w3")
_GATE_UP = ("gate_proj", "up_proj")
_MIXTRAL = _Experts(block=("mlp", "block_sparse_moe"), gate_up=_W, down="w2", router=("gate", "gate"))
_QWEN = _Experts(block=("mlp", "mlp"), gate_up=_GATE_UP, down="down_proj", router=("gate", "gate"))
_DEEPSEEK = _Experts(block=("mlp", "mlp"), gate_up=_GATE_UP, down="down_proj")
_GRANITE = _Experts(
    block=("block_sparse_moe", "block_sparse_moe"),
    gate_up=("input_linear.weight",),
    down="output_linear.weight",
    fused=True,
    router=("router", "router.layer"),
)

# By model_type. What is not listed was the same in 4 (gpt-oss, Llama 4, JetMoE, Qwen3-VL-MoE) or did not exist there.
# Source: transformers 4.57.1, the modeling file of each model type; names agree with conversion_mapping.py of transformers 5.
_STYLES = {
    "mixtral": _MIXTRAL,
    "minimax": _MIXTRAL,
    "phimoe": replace(_MIXTRAL, router=("router", "gate")),
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "qwen3_next": _QWEN,
    "olmoe": _QWEN,
    "flex_olmo": _QWEN,
    "ernie4_5_moe": _QWEN,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": _DEEPSEEK,
    "dots1": _DEEPSEEK,
    "hunyuan_v1_moe": _DEEPSEEK,
    "longcat_flash": _DEEPSEEK,
    "jamba": _Experts(block=("feed_forward", "feed_forward"), gate_up=_GATE_UP, down="down_proj", router=("router", "router")),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "aria_text": _Experts(
        block=("mlp", "mlp"), gate_up=("experts.fc1.weight",), down="experts.fc2.weight", fused=True, router=("router", "router")
    ),
}


def unfuse_experts(inventory: Inventory) -> Inventory:
    """The same model as transformers 4 built it.

    Args:
        inventory: as transformers 5 builds it.

    Returns:
        an inventory with as many parameters, of which those of experts and routers belong to linear layers where they did in 4; the same
        object if nothing differs.
    """
    style = _STYLES.get(inventory.model_type)
    if style is None:
        return inventory
    num_experts = {row.module_pattern: row.shape[0] for row in inventory.rows if row.leaf == "down_proj" and len(row.shape) == 3}
    rows = tuple(old for row in inventory.rows for old in _unfused(row, style, num_experts))
    if rows == inventory.rows:
        return inventory
    return replace(inventory, rows=rows, content_hash=f"{inventory.content_hash}:unfused")


def _unfused(row: TensorRow, style: _Experts, num_experts: dict[str, int]) -> Iterator[TensorRow]:
    block = style.block[0]
    if row.module_pattern in num_experts and row.module_pattern.endswith(f".{block}.experts"):
        yield from _experts(row, style, num_experts[row.module_pattern])
    elif style.router is not None and row.pattern.endswith(f".{block}.{style.router[0]}.weight"):
        parent = _renamed(row.module_pattern.rpartition(".")[0], style)
        yield replace(row, pattern=f"{parent}.{style.router[1]}.weight", module_kind=ModuleKind.LINEAR, module_class="Linear")
    else:
        yield row


def _experts(row: TensorRow, style: _Experts, num_experts: int) -> Iterator[TensorRow]:
    """One fused parameter, (E, out, in), as E linear layers per projection, or under its former name where it was fused already."""
    names = style.gate_up if row.leaf == "gate_up_proj" else (style.down,)
    experts = _renamed(row.module_pattern, style)
    if style.fused:
        yield replace(row, pattern=f"{experts.rpartition('.')[0]}.{names[0]}")
        return
    # gate_up_proj may hold more experts than exist as modules: those that only pass their input on (LongCat) have no down projection.
    rows, columns = row.shape[1] // len(names), row.shape[2]
    for name in names:
        yield replace(
            row,
            pattern=f"{experts}.{{}}.{name}.weight",
            indices=(*row.indices, tuple(range(num_experts))),
            shape=(rows, columns),
            module_kind=ModuleKind.LINEAR,
            module_class="Linear",
        )


def _renamed(module_pattern: str, style: _Experts) -> str:
    new, old = style.block
    return ".".join(old if part == new else part for part in module_pattern.split("."))
