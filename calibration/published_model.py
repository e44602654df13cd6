"""The model of a published run as its script and its version of transformers had it."""

from dataclasses import replace
from types import MappingProxyType

from calibration.published import Run
from estimator.dtypes import DType
from estimator.inventory import Inventory, ModuleKind, TensorRole, TensorRow
from estimator.sources.resolve import resolve


def inventory_of(run: Run) -> Inventory:
    """The model of a run: its vocabulary resized as the script did, with the buffers that its version of transformers had."""
    model = resolve(run.config if run.config is not None else run.model).inventory
    if run.vocab_size is not None:
        model = with_vocabulary(model, run.vocab_size)
    return with_rotary_caches(model, run.recipe.dtype) if run.has_rotary_caches else model


def with_vocabulary(inventory: Inventory, size: int) -> Inventory:
    """The same model after `resize_token_embeddings(size)`.

    Source: transformers, modeling_utils.py, PreTrainedModel.resize_token_embeddings.
    """
    modules = {inventory.input_embedding, inventory.output_embedding}

    def resized(row: TensorRow) -> TensorRow:
        return replace(row, shape=(size, *row.shape[1:])) if row.module_pattern in modules else row

    return replace(
        inventory,
        rows=tuple(resized(row) for row in inventory.rows),
        config=MappingProxyType({**inventory.config, "vocab_size": size}),
        content_hash=f"{inventory.content_hash}/vocab_size={size}",
    )


def with_rotary_caches(inventory: Inventory, dtype: DType) -> Inventory:
    """The same model with cos and sin of all positions as buffers of every layer's attention, in the type of the load.

    Source: transformers 4.39.3, models/mistral/modeling_mistral.py, MistralRotaryEmbedding._set_cos_sin_cache; 4.35.2,
    models/llama/modeling_llama.py, LlamaRotaryEmbedding._set_cos_sin_cache.
    """
    config = inventory.config
    head_dim = config.get("head_dim") or int(str(config["hidden_size"])) // int(str(config["num_attention_heads"]))
    shape = (int(str(config["max_position_embeddings"])), int(str(head_dim)))

    def cache(name: str) -> TensorRow:
        return TensorRow(
            pattern=f"{inventory.layers_prefix}.{{}}.self_attn.rotary_emb.{name}",
            indices=(tuple(range(inventory.num_layers)),),
            shape=shape,
            dtype=dtype,
            role=TensorRole.NONPERSISTENT_BUFFER,
            module_kind=ModuleKind.OTHER,
            module_class="RotaryEmbedding",
        )

    return replace(
        inventory,
        rows=(*inventory.rows, cache("cos_cached"), cache("sin_cached")),
        content_hash=f"{inventory.content_hash}/rotary_caches={dtype}",
    )
