"""A YAML of `accelerate config`.

Source: accelerate 1.15, commands/config/config_args.py, ClusterConfig, and commands/launch.py.
"""

from collections.abc import Mapping

from app.fields import names
from app.trainer_files import deepspeed
from app.trainer_files.fsdp import translate_fsdp
from app.trainer_files.translation import Keys
from estimator.errors import UnknownNameError

_TRAINER = "accelerate"
_INERT = names("""
    command_file commands compute_environment debug downcast_bf16 enable_cpu_affinity gpu_ids machine_rank main_process_ip
    main_process_port main_training_function mpirun_config num_machines rdzv_backend same_network tpu_env tpu_name tpu_use_cluster
    tpu_use_sudo tpu_vm tpu_zone
""")
_UNMODELLED = {
    "dynamo_backend": "compiled kernels keep and take other tensors than the operators they replace",
    "dynamo_config": "compiled kernels keep and take other tensors than the operators they replace",
    "fp8_config": "matrices are multiplied in FP8, from copies",
    "parallelism_config": "it spreads the model over several processes in more than one way",
}


def translate(keys: Keys, others: Mapping[str, Keys]) -> None:
    """Put a launcher's configuration into the request.

    Raises:
        RequestError: for a kind of run that is not modelled.
    """
    kind = keys.text("distributed_type") or "NO"
    keys.put("hardware.num_gpus", keys.integer("num_processes"), "num_processes")
    keys.refuse("use_cpu", "training on the host", "false")
    keys.refuse("megatron_lm_config", "Megatron-LM")
    launched, fsdp = keys.section("deepspeed_config"), keys.section("fsdp_config")
    match kind.upper():
        case "NO":
            keys.put("hardware.strategy", "single", "distributed_type")
        case "MULTI_GPU":
            keys.put("hardware.strategy", "ddp", "distributed_type")
        case "FSDP":
            translate_fsdp(fsdp, default_version=1)
        case "DEEPSPEED":
            _deepspeed(launched, others)
        case _:
            raise UnknownNameError.of(keys.named("distributed_type"), kind, ["NO", "MULTI_GPU", "FSDP", "DEEPSPEED"])
    _precision(keys)
    keys.rest(inert=_INERT, unmodelled=_UNMODELLED, trainer=_TRAINER, refuses_unknown=True)


def _precision(keys: Keys) -> None:
    """The launcher's precision is what the Trainer takes unless it is given one.

    Source: transformers 5.23, training_args.py, TrainingArguments.__post_init__ (ACCELERATE_MIXED_PRECISION).
    """
    keys.found.precision = keys.one_of("mixed_precision", ("no", "bf16", "fp16"))


def _deepspeed(keys: Keys, others: Mapping[str, Keys]) -> None:
    """Source: accelerate, utils/dataclasses.py, DeepSpeedPlugin.__post_init__."""
    file = keys.take("deepspeed_config_file")
    if file is not None:
        deepspeed.translate(deepspeed.named_file(keys, "deepspeed_config_file", file, others))
    else:
        stage = keys.integer("zero_stage", 2)
        if stage not in (0, 1, 2, 3):
            raise keys.error("zero_stage", stage, "0, 1, 2 or 3")
        keys.put("hardware.strategy", f"zero{stage}" if stage else "ddp", "zero_stage")
        for name in ("offload_optimizer", "offload_param"):
            device = keys.one_of(f"{name}_device", ("none", "cpu"))
            keys.put(f"hardware.deepspeed.zero_optimization.{name}.device", device, f"{name}_device")
        if keys.values.get("gradient_accumulation_steps") != "auto":
            steps = keys.integer("gradient_accumulation_steps")
            keys.put("training.gradient_accumulation_steps", steps, "gradient_accumulation_steps")
    inert = names("""
        deepspeed_exclusion_filter deepspeed_hostfile deepspeed_inclusion_filter deepspeed_moe_layer_cls_names
        deepspeed_multinode_launcher gradient_accumulation_steps gradient_clipping offload_optimizer_device offload_optimizer_nvme_path
        offload_param_device offload_param_nvme_path zero3_init_flag zero3_save_16bit_model zero_stage
    """)
    keys.rest(inert=inert, unmodelled={}, trainer="accelerate's deepspeed_config")
