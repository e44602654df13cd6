"""DeepSpeed's JSON."""

from app.answer import Json
from app.trainer_files.written.subject import Subject
from estimator.errors import RequestError


def deepspeed(subject: Subject) -> Json:
    """The configuration; `auto` leaves to the Trainer what stands in its own arguments.

    Raises:
        RequestError: for a run without ZeRO.
    """
    parallel = subject.recipe.parallel
    stage, zero = parallel.strategy.zero_stage, parallel.zero
    if not stage:
        raise RequestError(
            f"hardware.strategy: {parallel.strategy.value!r} is none of DeepSpeed's; accepted: zero1, zero2, zero3",
            field="hardware.strategy",
        )
    options: Json = {
        "stage": stage,
        "offload_optimizer": {"device": "cpu" if zero.offload_optimizer else "none"},
        "contiguous_gradients": zero.contiguous_gradients,
        "reduce_bucket_size": zero.reduce_bucket_size,
        "allgather_bucket_size": zero.allgather_bucket_size,
    }
    if zero.overlap_comm is not None:
        options["overlap_comm"] = zero.overlap_comm
    if stage == 3:
        options |= {
            "offload_param": {"device": "cpu" if zero.offload_param else "none"},
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_max_live_parameters": zero.max_live_parameters,
            "stage3_param_persistence_threshold": zero.param_persistence_threshold,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": options,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
    }
