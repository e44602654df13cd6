"""FSDP's options, as accelerate and the trainers write them: with the prefix `fsdp_` or without.

Source: accelerate 1.15, utils/dataclasses.py, FullyShardedDataParallelPlugin, and commands/launch.py; transformers 5.23,
training_args.py, _process_fsdp_args; axolotl 0.19.0, utils/schemas/fsdp.py.
"""

from app.fields import names
from app.trainer_files.translation import Keys

_INERT = names("""
    backward_prefetch backward_prefetch_policy cpu_offload_pin_memory cpu_ram_efficient_loading final_state_dict_type forward_prefetch
    limit_all_gathers min_num_params mixed_precision_policy state_dict_type sync_module_states transformer_layer_cls_to_wrap
    use_orig_params xla xla_fsdp_grad_ckpt xla_fsdp_settings xla_fsdp_v2
""")
_UNMODELLED = {
    "activation_checkpointing_offload": "inputs of checkpointed layers are moved to the host",
    "activation_cpu_offload": "activations are moved to the host",
    "ignored_modules": "modules are left out of the sharding",
    "sharding_strategy": "it belongs to version 1",
}
# Source: accelerate, utils/constants.py, FSDP_SHARDING_STRATEGY; the first shards as reshard_after_forward: true does.
_RESHARDS = {"FULL_SHARD": True, "SHARD_GRAD_OP": False}


def translate_fsdp(keys: Keys, *, version: object = None, default_version: int) -> None:
    """Put FSDP and its options into the request.

    Args:
        keys: of the mapping; empty ones leave all as it is by default.
        version: given beside the mapping.
        default_version: what the launcher takes where none is given.

    Raises:
        RequestError: for version 1, or a value that is not known.
    """
    if keys.taken:
        return  # given and pointed to
    keys.taken.update(keys.values)
    plain = Keys(
        file=keys.file,
        values={key.removeprefix("fsdp_"): value for key, value in keys.values.items()},
        found=keys.found,
        prefix=f"{keys.prefix}fsdp_" if any(key.startswith("fsdp_") for key in keys.values) else keys.prefix,
    )
    given = plain.take("version", version)
    if str(given if given is not None else default_version) != "2":
        absent = " (the default)" if given is None else ""
        raise plain.error("version", f"{given or default_version}{absent}", "2; FSDP1 is not modelled")
    plain.put("hardware.strategy", "fsdp", "version")
    plain.put("hardware.fsdp_config.version", 2, "version")
    if "reshard_after_forward" in plain:
        value = plain.take("reshard_after_forward")
        reshards = _RESHARDS.get(value.upper()) if isinstance(value, str) and value.lower() not in ("true", "false") else None
        plain.put(
            "hardware.fsdp_config.reshard_after_forward",
            plain.flag("reshard_after_forward") if reshards is None else reshards,
            "reshard_after_forward",
        )
    key = "offload_params" if "offload_params" in plain else "cpu_offload"
    if key in plain:
        plain.put("hardware.fsdp_config.cpu_offload", plain.flag(key), key)
    if plain.flag("activation_checkpointing"):
        # accelerate wraps the layers in non-reentrant checkpoints.
        # Source: accelerate, utils/fsdp_utils.py, fsdp2_apply_ac.
        plain.put("training.gradient_checkpointing", True, "activation_checkpointing")
        plain.put("training.gradient_checkpointing_kwargs.use_reentrant", False, "activation_checkpointing")
    policy = plain.text("auto_wrap_policy")
    if policy is not None and policy.upper() != "TRANSFORMER_BASED_WRAP":
        plain.not_modelled("auto_wrap_policy", f"{policy} makes other units than the layers that are counted")
    plain.rest(inert=_INERT, unmodelled=_UNMODELLED, trainer="FSDP")
