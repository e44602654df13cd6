"""A JSON of DeepSpeed, as transformers' Trainer hands it on.

Source: deepspeed 0.19, runtime/config.py and runtime/zero/config.py; transformers 5.23, integrations/deepspeed.py,
HfTrainerDeepSpeedConfig.trainer_config_process.
"""

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from app.fields import names
from app.trainer_files.translation import Keys
from estimator.errors import RequestError

_TRAINER = "DeepSpeed"
_INERT = names("""
    activation_checkpointing aio checkpoint comms_logger communication_data_type csv_monitor dataloader_drop_last disable_allgather
    dump_state elasticity gradient_clipping gradient_predivide_factor memory_breakdown monitor_config prescale_gradients
    scheduler steps_per_print tensorboard train_batch_size wall_clock_breakdown wandb zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer flops_profiler
""")
_UNMODELLED = {
    "amp": "Apex keeps float32 master copies of its own",
    "autotuning": "the configuration is changed while it runs",
    "compile": "compiled kernels keep and take other tensors than the operators they replace",
    "compression_training": "weights are compressed in training",
    "data_efficiency": "samples are shortened",
    "data_types": "gradients are accumulated in a type of their own",
    "curriculum_learning": "samples are shortened",
    "hybrid_engine": "it generates beside training",
    "pipeline": "layers are spread over several processes",
    "sparse_attention": "attention is sparse",
    "tensor_parallel": "layers are cut over several processes",
}
_INERT_OF_ZERO = names("""
    allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm cpu_offload_use_pin_memory elastic_checkpoint
    enable_sanity_checks gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
    log_trace_cache_warnings max_reuse_distance memory_efficient_linear model_persistence_threshold module_granularity_threshold
    override_module_apply parameter_alignment pipeline_loading_checkpoint reduce_scatter round_robin_gradients
    save_muon_momentum_buffer_in_memory stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
    stage3_max_reuse_distance stage3_use_all_reduce_for_fetch_params sub_group_size use_all_reduce_for_fetch_params
    use_multi_rank_bucket_allreduce
""")
_INERT_OF_OFFLOADING = names("buffer_count buffer_size fast_init max_in_cpu nvme_path pin_memory pipeline pipeline_read pipeline_write")
_INERT_OF_PRECISION = names("""
    auto_cast check_grad_overflow consecutive_hysteresis hysteresis
    immediate_grad_update initial_scale_power loss_scale loss_scale_window min_loss_scale
""")
_UNMODELLED_OF_PRECISION = dict.fromkeys(
    ("bf16_master_weights_and_grads", "bf16_optimizer_states"), "master weights or states are bfloat16"
)
_UNMODELLED_OF_ZERO = {
    "mics_shard_size": "parameters are shared out within groups",
    "zero_hpz_partition_size": "a second copy of the parts is kept",
    "zero_quantized_gradients": "gradients are quantized on their way",
    "zero_quantized_nontrainable_weights": "frozen weights are quantized on their way",
    "zero_quantized_weights": "weights are quantized on their way",
    "zenflow": "a part of the update runs on the host",
}
_DEFAULTS_OF_ZERO = {"mics_shard_size": -1, "zero_hpz_partition_size": 1}
_SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_param_persistence_threshold")
# Deprecated spellings.
_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
_AUTO = "auto"
# Source: deepspeed, runtime/engine.py, DeepSpeedEngine._configure_basic_optimizer: FusedAdam, or DeepSpeedCPUAdam where it is offloaded.
_ADAM = {"adam": "adamw_torch_fused", "adamw": "adamw_torch_fused"}


def read_named(keys: Keys, key: str, others: Mapping[str, Keys]) -> None:
    """Translate what a training file names under a key: the content itself, or the path of a file that is given too.

    Raises:
        RequestError: if no such file is given.
    """
    value = keys.take(key)
    if value is None or value == "":
        return
    if isinstance(value, Mapping):
        translate(keys.section(key))
        return
    translate(named_file(keys, key, value, others))


def named_file(keys: Keys, key: str, value: object, others: Mapping[str, Keys]) -> Keys:
    """The file that a key points to, by its path or else its last part.

    Raises:
        RequestError: if it is not given.
    """
    wanted = str(value)
    last = PurePosixPath(wanted).name
    found = others.get(wanted) or next((other for name, other in others.items() if PurePosixPath(name).name == last), None)
    if found is None:
        raise RequestError(
            f"{keys.named(key)}: {wanted[:80]!r} is not among the files that are given, and not found beside them; give it as another file",
            field=keys.named(key),
        )
    return found


def translate(keys: Keys) -> None:
    """Put a DeepSpeed configuration into the request; `auto` leaves a field to the trainer.

    Raises:
        RequestError: for what transformers or DeepSpeed would refuse, or what is not modelled.
    """
    if keys.taken:
        return  # given and pointed to
    zero = keys.section("zero_optimization")
    stage = 0 if "stage" not in zero else zero.integer("stage")
    if stage not in (0, 1, 2, 3):
        raise zero.error("stage", stage, "0, 1, 2 or 3")
    zero.put("hardware.strategy", f"zero{stage}" if stage else "ddp", "stage")
    if stage:
        zero.put("hardware.deepspeed.zero_optimization.stage", stage, "stage")
        _zero(zero)
    for key, path in (
        ("train_micro_batch_size_per_gpu", "training.per_device_train_batch_size"),
        ("gradient_accumulation_steps", "training.gradient_accumulation_steps"),
    ):
        if keys.take(key) != _AUTO:
            keys.put(path, keys.integer(key), key)
    for precision in ("bf16", "fp16"):
        section = keys.section(precision)
        if section.take("enabled", _AUTO) != _AUTO:
            section.put(f"training.{precision}", section.flag("enabled"), "enabled")
        section.rest(inert=_INERT_OF_PRECISION, unmodelled=_UNMODELLED_OF_PRECISION, trainer=_TRAINER)
    _optimizer(keys)
    keys.rest(inert=_INERT, unmodelled=_UNMODELLED, trainer=_TRAINER)


def _zero(zero: Keys) -> None:
    path = "hardware.deepspeed.zero_optimization"
    for key in ("offload_optimizer", "offload_param"):
        section = zero.section(key)
        device = section.one_of("device", ("none", "cpu"))
        section.put(f"{path}.{key}.device", device, "device")
        if section.values.get("ratio") == 1:
            section.ignore("ratio")
        section.rest(inert=_INERT_OF_OFFLOADING, unmodelled={"ratio": "a part of it stays on the card"}, trainer=_TRAINER)
    for key in _SIZES:
        for name in dict.fromkeys((key, key.removeprefix("stage3_"))):
            zero.put(f"{path}.{key}", _size(zero, name), name)
    for key, name in _OFFLOADS.items():
        if zero.flag(key):
            zero.put(f"{path}.{name}.device", "cpu", key)
    for key in ("overlap_comm", "contiguous_gradients"):
        if key in zero:
            zero.put(f"{path}.{key}", zero.flag(key), key)
    for key, default in _DEFAULTS_OF_ZERO.items():
        if zero.values.get(key) == default:
            zero.ignore(key)
    zero.rest(inert=_INERT_OF_ZERO, unmodelled=_UNMODELLED_OF_ZERO, trainer=_TRAINER)


def _size(zero: Keys, key: str) -> Any:
    """A number of elements, or `auto`; `5e8` is a float in JSON."""
    value = zero.take(key)
    if value is None or value == _AUTO:
        return value
    number = zero.number(key)
    if number is None or not math.isfinite(number) or number != int(number):
        raise zero.error(key, value, "a whole number, or auto")
    return int(number)


def _optimizer(keys: Keys) -> None:
    section = keys.section("optimizer")
    if not section.values:
        return
    name = section.text("type") or "adam"
    if name.lower() not in _ADAM:
        raise section.error("type", name, "Adam or AdamW")
    keys.found.assumed.append(
        f"{section.named('type')}: DeepSpeed makes the optimizer itself, {name} with float32 states, whatever `optim` the trainer is given."
    )
    keys.found.own_optimizer = _ADAM[name.lower()]
    section.ignore("params")
