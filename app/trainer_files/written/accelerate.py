"""The YAML of `accelerate launch --config_file`."""

from app.answer import Json
from app.trainer_files.written.subject import Subject
from estimator.errors import RequestError
from estimator.parallelism.options import Fsdp, Strategy

_KINDS = {Strategy.SINGLE: "NO", Strategy.DDP: "MULTI_GPU", Strategy.FSDP: "FSDP"}


def accelerate(subject: Subject) -> Json:
    """The launcher's configuration.

    Raises:
        RequestError: for layers placed on cards by one process, which no launcher starts.
    """
    parallel = subject.recipe.parallel
    strategy, zero = parallel.strategy, parallel.zero
    if strategy is Strategy.DEVICE_MAP:
        raise RequestError(
            "hardware.strategy: 'device_map' is one process, which no launcher starts; accepted: single, ddp, zero1, zero2, zero3, fsdp",
            field="hardware.strategy",
        )
    bf16, fp16 = subject.precision
    config: Json = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _KINDS.get(strategy, "DEEPSPEED"),
        "mixed_precision": "bf16" if bf16 else "fp16" if fp16 else "no",
        "num_machines": 1,
        "num_processes": parallel.num_gpus,
        "machine_rank": 0,
        "main_training_function": "main",
        "use_cpu": False,
    }
    if strategy is Strategy.FSDP:
        options = parallel.fsdp
        config["fsdp_config"] = {
            "fsdp_version": options.version,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            **{f"fsdp_{name}": value for name, value in fsdp_options(options).items()},
            "fsdp_offload_params": options.offload_params,
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        }
    if strategy.zero_stage:
        config["deepspeed_config"] = {
            "zero_stage": strategy.zero_stage,
            "offload_optimizer_device": "cpu" if zero.offload_optimizer else "none",
            "offload_param_device": "cpu" if zero.offload_param else "none",
            "gradient_accumulation_steps": subject.training.gradient_accumulation_steps,
            "zero3_init_flag": strategy.zero_stage == 3,
        }
    return config


def fsdp_options(options: Fsdp) -> Json:
    """What is sharded and when, in the words of its version."""
    if options.version == 2:
        return {"reshard_after_forward": options.reshard_after_forward}
    return {
        "sharding_strategy": "FULL_SHARD" if options.reshard_after_forward else "SHARD_GRAD_OP",
        "backward_prefetch": options.backward_prefetch.value,
        "use_orig_params": options.use_orig_params,
        "sync_module_states": True,
    }
