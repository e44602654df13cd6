"""How a run is spread over cards, as the request gives it."""

from app.request import HardwareFields, Request
from estimator.errors import RequestError
from estimator.inventory import Inventory
from estimator.parallelism.options import BackwardPrefetch, Ddp, Fsdp, Parallel, Strategy, Zero

_FIELD = "hardware.strategy"


def resolve_parallel(request: Request, inventory: Inventory) -> Parallel:
    """Strategy and options, or a refusal of what the libraries would refuse.

    Raises:
        RequestError: if strategy, number of cards and run do not go together.
    """
    hardware = request.hardware
    if hardware is None:
        return Parallel()
    strategy = Strategy(hardware.strategy)
    if strategy is Strategy.SINGLE and hardware.num_gpus != 1:
        accepted = ", ".join(s.value for s in Strategy if s is not Strategy.SINGLE)
        raise RequestError(f"{_FIELD}: 'single' is for one GPU, not for {hardware.num_gpus}; accepted: {accepted}", field=_FIELD)
    if strategy.is_data_parallel and request.training is None:
        accepted = ", ".join(s.value for s in Strategy if not s.is_data_parallel)
        raise RequestError(f"{_FIELD}: {strategy.value!r} is for training; accepted for inference: {accepted}", field=_FIELD)
    if strategy is Strategy.TENSOR_PARALLEL:
        _check_tensor_parallel(request)
    stage = hardware.deepspeed.zero_optimization.stage
    if stage is not None and stage != strategy.zero_stage:
        field = "hardware.deepspeed.zero_optimization.stage"
        raise RequestError(f"{field}: {stage} is not what hardware.strategy {strategy.value!r} says; accepted: the same", field=field)
    ddp, fsdp = hardware.ddp, hardware.fsdp_config
    return Parallel(
        strategy=strategy,
        num_gpus=hardware.num_gpus,
        ddp=Ddp(
            bucket_cap_mb=ddp.bucket_cap_mb,
            find_unused_parameters=ddp.find_unused_parameters,
            gradient_as_bucket_view=ddp.gradient_as_bucket_view,
            static_graph=ddp.static_graph,
        ),
        zero=_zero(hardware, inventory),
        fsdp=Fsdp(
            version=fsdp.version,
            reshard_after_forward=fsdp.reshard_after_forward,
            offload_params=fsdp.cpu_offload,
            use_orig_params=fsdp.use_orig_params,
            backward_prefetch=BackwardPrefetch(fsdp.backward_prefetch),
        ),
    )


def _check_tensor_parallel(request: Request) -> None:
    """What is not modelled of it: a training step, and packed weights."""
    if request.training is not None:
        accepted = ", ".join(s.value for s in Strategy if s is not Strategy.TENSOR_PARALLEL)
        raise RequestError(f"{_FIELD}: 'tensor_parallel' is not modelled for training; accepted: {accepted}", field=_FIELD)
    if request.quantization is not None:
        raise RequestError(f"{_FIELD}: 'tensor_parallel' is not modelled with quantization; accepted: device_map", field=_FIELD)


def _zero(hardware: HardwareFields, inventory: Inventory) -> Zero:
    """`auto` stands for what the Trainer makes of the hidden size.

    Source: transformers, integrations/deepspeed.py, HfTrainerDeepSpeedConfig.trainer_config_finalize.
    """
    asked = hardware.deepspeed.zero_optimization
    hidden = inventory.config.get("hidden_size")
    width = hidden if isinstance(hidden, int) else 0

    def size(value: int | str, automatic: int) -> int:
        return value if isinstance(value, int) else automatic

    return Zero(
        offload_optimizer=asked.offload_optimizer.device == "cpu",
        offload_param=asked.offload_param.device == "cpu",
        reduce_bucket_size=size(asked.reduce_bucket_size, width * width),
        prefetch_bucket_size=size(asked.stage3_prefetch_bucket_size, int(0.9 * width * width)),
        max_live_parameters=size(asked.stage3_max_live_parameters, 1_000_000_000),
        param_persistence_threshold=size(asked.stage3_param_persistence_threshold, 10 * width),
        overlap_comm=asked.overlap_comm,
        contiguous_gradients=asked.contiguous_gradients,
    )
