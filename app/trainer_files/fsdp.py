"""FSDP's options, as accelerate and the trainers write them: with the prefix `fsdp_` or without.

Source: accelerate 1.15, utils/dataclasses.py, FullyShardedDataParallelPlugin, and commands/launch.py; transformers 5.23,
training_args.py, _process_fsdp_args; axolotl 0.19.0, utils/schemas/fsdp.py.
"""

from app.fields import names
from app.trainer_files.translation import Keys
from estimator.parallelism.options import BackwardPrefetch

_CONFIG = "hardware.fsdp_config"
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
# Source: accelerate, utils/constants.py, FSDP_SHARDING_STRATEGY and FSDP_BACKWARD_PREFETCH, counted from 1; the first strategy shards as
# reshard_after_forward: true does.
_RESHARDS = {"FULL_SHARD": True, "1": True, "SHARD_GRAD_OP": False, "2": False}
_PREFETCHES = {str(number): name.value for number, name in enumerate((BackwardPrefetch.PRE, BackwardPrefetch.POST), 1)}


def translate_fsdp(keys: Keys, *, version: object = None, default_version: int) -> None:
    """Put FSDP and its options into the request.

    Args:
        keys: of the mapping; empty ones leave all as it is by default.
        version: given beside the mapping.
        default_version: what the launcher takes where none is given.

    Raises:
        RequestError: for a value that is not known, or not modelled.
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
    number = str(default_version if given is None else given)
    if number not in ("1", "2"):
        raise plain.error("version", given, "1 or 2")
    plain.put("hardware.strategy", "fsdp", "version")
    plain.put(f"{_CONFIG}.version", int(number), "version")
    (_version_1 if number == "1" else _version_2)(plain)
    key = "offload_params" if "offload_params" in plain else "cpu_offload"
    if key in plain:
        plain.put(f"{_CONFIG}.cpu_offload", plain.flag(key), key)
    if plain.flag("activation_checkpointing"):
        # accelerate wraps the layers in non-reentrant checkpoints.
        # Source: accelerate, utils/fsdp_utils.py, fsdp2_apply_ac.
        plain.put("training.gradient_checkpointing", True, "activation_checkpointing")
        plain.put("training.gradient_checkpointing_kwargs.use_reentrant", False, "activation_checkpointing")
    policy = plain.text("auto_wrap_policy")
    if policy is not None and policy.upper() != "TRANSFORMER_BASED_WRAP":
        plain.not_modelled("auto_wrap_policy", f"{policy} makes other units than the layers that are counted")
    plain.rest(inert=_INERT, unmodelled=_UNMODELLED, trainer="FSDP")


def _version_1(plain: Keys) -> None:
    """FullyShardedDataParallel.

    accelerate takes the strategy from `sharding_strategy` and passes over `reshard_after_forward`.

    Source: accelerate 1.15, utils/dataclasses.py, FullyShardedDataParallelPlugin.__post_init__; accelerator.py, Accelerator.prepare_model.
    """
    if "sharding_strategy" in plain:
        given = plain.take("sharding_strategy")
        reshards = _RESHARDS.get(str(given).upper())
        if reshards is None:
            raise plain.error("sharding_strategy", given, "FULL_SHARD or SHARD_GRAD_OP; others are not modelled")
        plain.put(f"{_CONFIG}.reshard_after_forward", reshards, "sharding_strategy")
    elif "reshard_after_forward" in plain and str(plain.values["reshard_after_forward"]).upper() not in ("FULL_SHARD", "TRUE", "1"):
        plain.found.assumed.append(
            f"{plain.named('reshard_after_forward')}: in FSDP1 accelerate passes over it and takes FULL_SHARD; sharding_strategy would say "
            "otherwise."
        )
    plain.ignore("reshard_after_forward")
    if "use_orig_params" in plain:
        plain.put(f"{_CONFIG}.use_orig_params", plain.flag("use_orig_params"), "use_orig_params")
    for key in ("backward_prefetch", "backward_prefetch_policy"):
        if key in plain:
            name = str(plain.take(key)).upper()
            name = _PREFETCHES.get(name, name)
            if name not in set(BackwardPrefetch):
                raise plain.error(key, name, ", ".join(BackwardPrefetch))
            plain.put(f"{_CONFIG}.backward_prefetch", name, key)
    if plain.flag("forward_prefetch"):
        plain.not_modelled("forward_prefetch", "units are gathered ahead in the forward pass too")
    else:
        plain.ignore("forward_prefetch")


def _version_2(plain: Keys) -> None:
    """fully_shard."""
    if "reshard_after_forward" in plain:
        value = plain.take("reshard_after_forward")
        reshards = _RESHARDS.get(value.upper()) if isinstance(value, str) and value.lower() not in ("true", "false") else None
        plain.put(
            f"{_CONFIG}.reshard_after_forward",
            plain.flag("reshard_after_forward") if reshards is None else reshards,
            "reshard_after_forward",
        )
