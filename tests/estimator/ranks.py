"""Real runs of two ranks on the CPU (gloo): what DistributedDataParallel, fully_shard and
FullyShardedDataParallel hold.

Run as a module it plays one rank: `python -m tests.estimator.ranks WHAT RANK STORE OUTPUT`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NUM_RANKS = 2
# Odd sizes, so that rows do not divide by two.
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 264,
    "intermediate_size": 501,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 66,
    "vocab_size": 1001,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
RANK = 8
BUCKET_CAP_MB = 1
PROMPT = 8
BATCH = 3


def run(what: str, directory: Path) -> list[dict[str, Any]]:
    """Both ranks' records of one kind of run."""
    outputs = [directory / f"{what}-{rank}.json" for rank in range(NUM_RANKS)]
    commands = [
        [sys.executable, "-W", "ignore", "-m", __spec__.name, what, str(rank), str(directory / f"{what}-store"), str(output)]
        for rank, output in enumerate(outputs)
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands]
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return [json.loads(output.read_text(encoding="utf-8")) for output in outputs]


def _play(what: str, rank: int, store: str, output: Path) -> None:
    import torch
    from torch import distributed

    if what in ("zero", "tensor"):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(NUM_RANKS), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_RANKS)
    record = {"ddp": _ddp, "fsdp": _fsdp, "zero": _zero, "tensor": _tensor}[what]()
    output.write_text(json.dumps(record), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def _model(config: Mapping[str, Any], *, adapter: bool) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    return model


# Two ranks divide heads and the width of experts; the rest leaves one more for the first.
SLICED: Mapping[str, Mapping[str, Any]] = {
    "llama": {**CONFIG, "num_key_value_heads": 2},
    "mixtral": {
        **CONFIG,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 512,  # grouped products take multiples of 8
        "num_local_experts": 3,
    },
}


def _tensor() -> dict[str, Any]:
    """Slices of models loaded with `tp_plan="auto"`, and of their caches after a prompt."""
    return {name: _slices(config) for name, config in SLICED.items()}


def _slices(config: Mapping[str, Any]) -> dict[str, Any]:
    import tempfile

    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        # `save_pretrained` writes on the first rank only.
        whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
        whole.config.save_pretrained(directory)
        save_file(whole.state_dict(), Path(directory) / "model.safetensors", metadata={"format": "pt"})
        model: Any = AutoModelForCausalLM.from_pretrained(directory, tp_plan="auto", dtype=torch.bfloat16)
    with torch.no_grad():
        answer = model(input_ids=torch.ones((1, PROMPT), dtype=torch.long), use_cache=True, logits_to_keep=1)
        # gloo's own thread lets go of what it has sent when it comes to it: on a busy machine late, so the least of several counts
        gathered = min(_peak_of_head(model.lm_head) for _ in range(5))
    layer = answer.past_key_values.layers[0]
    return {
        "shapes": {name: list(p.to_local().shape if hasattr(p, "to_local") else p.shape) for name, p in model.named_parameters()},
        "keys": list(layer.keys.shape),
        "logits": list(answer.logits.shape),
        "head": gathered,
    }


def _peak_of_head(head: Any) -> int:
    """The most that the head's forward pass of one position holds beside its weight and its input [bytes]."""
    import torch

    from tests.oracle.live import LiveStorages

    hidden = torch.randn((BATCH, 1, CONFIG["hidden_size"]), dtype=torch.bfloat16)
    live = LiveStorages(granularity_bytes=1)
    live.know([hidden, head.weight.to_local()], "known")
    with live:
        peak = live.begin("head")
        head(hidden)
    return peak.num_bytes


def _step(model: Any) -> None:
    import torch

    ids = torch.randint(0, CONFIG["vocab_size"], (1, 8))
    model(input_ids=ids, labels=ids).loss.backward()


def _ddp() -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    found = {}
    for name, adapter, finds_unused, cap in (
        ("full", False, False, None),
        ("full, unused looked for", False, True, None),
        ("full, small buckets", False, False, BUCKET_CAP_MB),
        ("adapter, unused looked for", True, True, None),
    ):
        options = {} if cap is None else {"bucket_cap_mb": cap}
        model = DistributedDataParallel(_model(CONFIG, adapter=adapter), find_unused_parameters=finds_unused, **options)
        for _ in range(3):
            _step(model)
            model.zero_grad()
        data = model._get_ddp_logging_data()
        sizes = data.get("rebuilt_bucket_sizes") or data["bucket_sizes"]
        found[name] = [int(size) for size in sizes.split(",")]
    return found


def _fsdp() -> dict[str, Any]:
    return {"version 1": _fsdp1(), "version 2": _fsdp2()}


def _fsdp2() -> dict[str, Any]:
    return {
        f"{'tied' if tied else 'untied'}, {'adapter' if adapter else 'full'}": _sharded(
            {**CONFIG, "tie_word_embeddings": tied}, adapter=adapter
        )
        for tied in (False, True)
        for adapter in (False, True)
    }


def _plugin(version: int, **options: Any) -> Any:
    """accelerate's, as the Trainer makes it."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        mixed_precision_policy="bf16",
        cpu_ram_efficient_loading=False,
        **options,
    )


def _sharded(config: Mapping[str, Any], *, adapter: bool) -> dict[str, Any]:
    from types import SimpleNamespace

    import torch
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    plugin = _plugin(2)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16", is_main_process=False, device=torch.device("cpu")
    )
    model = fsdp2_prepare_model(accelerator, _model(config, adapter=adapter))
    buffers: dict[str, list[int]] = {}

    def watch(kind: str, owner: Any) -> None:
        allocate = owner.allocate

        def watched(self: Any, size: Any, *, dtype: Any, device: Any) -> Any:
            tensor = allocate(self, size, dtype=dtype, device=device)
            buffers.setdefault(kind, []).append(tensor.nbytes)
            return tensor

        owner.allocate = watched

    kept = {kind: getattr(collectives, kind).allocate for kind in ("DefaultAllGather", "DefaultReduceScatter")}
    for kind in kept:
        watch(kind, getattr(collectives, kind))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False)
    try:
        _step(model)
    finally:
        for kind, allocate in kept.items():
            getattr(collectives, kind).allocate = allocate
    optimizer.step()
    states = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
    groups = [group for state in dict.fromkeys(states) for group in state._fsdp_param_groups]
    shards, gradients = {}, {}
    for group in dict.fromkeys(groups):
        for parameter in group.fsdp_params:
            name = parameter._param_fqn
            shards[name] = [parameter._sharded_param_data.nbytes, parameter.sharded_param.to_local().numel()]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = [parameter.grad.to_local().nbytes, parameter.grad.to_local().untyped_storage().nbytes()]
    state_bytes = sum(
        getattr(value, "to_local", lambda v=value: v)().nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if key != "step"
    )
    return {"shards": shards, "gradients": gradients, "states": state_bytes, "buffers": buffers}


# Options of FSDP1 beside those of transformers, by the name of a run: how it shards, when it gathers, whether parameters are kept.
FLAT: Mapping[str, Mapping[str, Any]] = {
    "untied, full": {},
    "untied, full, ahead": {"backward_prefetch": "BACKWARD_PRE"},
    "untied, full, after": {"backward_prefetch": "BACKWARD_POST", "use_orig_params": False},
    "untied, full, kept": {"sharding_strategy": "SHARD_GRAD_OP"},
    "tied, full": {"use_orig_params": False},
    "untied, adapter": {},
    "untied, adapter, ahead": {"backward_prefetch": "BACKWARD_PRE"},
    "tied, adapter, kept": {"sharding_strategy": "SHARD_GRAD_OP", "use_orig_params": False},
    "untied, full, ahead, reentrant": {"backward_prefetch": "BACKWARD_PRE"},
    "untied, adapter, ahead, reentrant": {"backward_prefetch": "BACKWARD_PRE"},
}


def _fsdp1() -> dict[str, Any]:
    return {
        name: _flattened(
            {**CONFIG, "tie_word_embeddings": name.startswith("tied")},
            adapter="adapter" in name,
            reentrant="reentrant" in name,
            options=options,
        )
        for name, options in FLAT.items()
    }


def _checkpoint_units(model: Any) -> list[list[int]]:
    """Puts a reentrant checkpoint around FSDP's unit of every layer, as LlamaModel.forward of transformers 4.51 does.

    Returns:
        A list that grows by two numbers whenever a layer is run again: of those run again before it, how many inputs are still there, and
        how many of these with a gradient.
    """
    import weakref
    from functools import partial

    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.utils.checkpoint import checkpoint

    again: list[Any] = []
    found: list[list[int]] = []

    def around(forward: Any, hidden: Any, **others: Any) -> Any:
        def run(x: Any) -> Any:
            if torch.is_grad_enabled():
                alive = [tensor for reference in again if (tensor := reference()) is not None]
                found.append([len(alive), sum(tensor.grad is not None for tensor in alive)])
                again.append(weakref.ref(x))
            return forward(x, **others)

        return checkpoint(run, hidden, use_reentrant=True)

    for unit in FullyShardedDataParallel.fsdp_modules(model):
        if type(unit.module).__name__ == "LlamaDecoderLayer":
            unit.forward = partial(around, unit.forward)
    return found


def _flattened(config: Mapping[str, Any], *, adapter: bool, reentrant: bool, options: Mapping[str, Any]) -> dict[str, Any]:
    from types import SimpleNamespace

    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel, _flat_param, _runtime_utils

    plugin = _plugin(1, **{"use_orig_params": True, **options})
    model = _model(config, adapter=adapter)
    if adapter:  # transformers, distributed/fsdp.py, update_fsdp_plugin_peft
        plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
        model.enable_input_require_grads()
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin, dynamo_plugin=SimpleNamespace(backend="NO")),
        distributed_type=DistributedType.FSDP,
        mixed_precision="bf16",
        device=torch.device("cpu"),
        is_main_process=False,
        is_fsdp2=False,
        multi_device=False,
        native_amp=False,
        parallelism_config=None,
        fp8_backend=None,
        delayed_fp8_autocast=False,
        verify_device_map=lambda model: False,
        _models=[None],
    )
    model = Accelerator.prepare_model(accelerator, model, device_placement=False)
    again = _checkpoint_units(model) if reentrant else []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False)

    def step() -> None:
        again.clear()
        ids = torch.randint(0, config["vocab_size"], (1, 8))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=not reentrant).loss  # a cache would hold graphs of layers run again
        peaks.append(gathered[0])
        loss.backward()

    gathered, reduced = [0], []
    peaks: list[int] = []
    step()  # the second step is that of all others
    optimizer.zero_grad()
    peaks = [0]
    kept = _flat_param._alloc_storage, _flat_param._free_storage, _runtime_utils._get_reduce_scatter_tensors

    def alloc(tensor: Any, size: Any) -> None:
        before = tensor.untyped_storage().size()
        kept[0](tensor, size)
        gathered[0] += tensor.untyped_storage().size() - before
        peaks[-1] = max(peaks[-1], gathered[0])

    def free(tensor: Any) -> None:
        gathered[0] -= tensor.untyped_storage().size()
        kept[1](tensor)

    def reduce(state: Any, gradient: Any) -> Any:
        reduced.append([gradient.nbytes, gradient.dtype.itemsize])
        return kept[2](state, gradient)

    _flat_param._alloc_storage, _flat_param._free_storage, _runtime_utils._get_reduce_scatter_tensors = alloc, free, reduce
    try:
        step()
    finally:
        _flat_param._alloc_storage, _flat_param._free_storage, _runtime_utils._get_reduce_scatter_tensors = kept
    optimizer.step()
    flat = [m._flat_param for m in FullyShardedDataParallel.fsdp_modules(model) if m._has_params]
    parameters = [p for p in model.parameters() if p.requires_grad]
    return {
        "shards": sorted(p.nbytes for p in flat),
        "gradients": sorted(p.grad.nbytes for p in flat if p.grad is not None),
        "trained": sorted(p.numel() for p in parameters if p.numel()),
        "states": sum(v.nbytes for state in optimizer.state.values() for key, v in state.items() if key != "step"),
        "reduced": sorted(reduced),
        "peaks": peaks,
        "left": gathered[0],
        "again": again,
    }


REDUCE_BUCKET_SIZE, PERSISTENCE_THRESHOLD = 200_000, 1000


def _zero() -> dict[str, Any]:
    return {
        f"{stage}, {'adapter' if adapter else 'full'}": _partitioned(stage, adapter=adapter)
        for stage in (2, 3)
        for adapter in (False, True)
    }


def _partitioned(stage: int, *, adapter: bool) -> dict[str, Any]:
    import deepspeed
    import torch

    # An operator for shared memory that would be compiled; gloo does without.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
    model = _model(CONFIG, adapter=adapter)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    spared = [p for name, p in named if "bias" in name or "norm" in name]
    groups = [{"params": [p for _, p in named if all(p is not s for s in spared)]}, {"params": spared}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-3)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": REDUCE_BUCKET_SIZE,
            "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
        },
    }
    engine, zero, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids = torch.randint(0, CONFIG["vocab_size"], (1, 8))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    if stage == 3:
        gradients = zero.grad_partitions_flat_buffer.nbytes
        flat, master = zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat
        frozen = sum(p.ds_tensor.nbytes for p in model.parameters() if not p.requires_grad)
    else:
        gradients = sum(g.nbytes for group in zero.averaged_gradients.values() for g in group)
        flat, master = zero.bit16_groups_flat, zero.single_partition_of_fp32_groups
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    engine.step()
    states = sum(v.nbytes for state in zero.optimizer.state.values() for key, v in state.items() if key != "step")
    return {
        "gradients": gradients,
        "flat": sorted(t.nbytes for t in flat),
        "master": sorted(t.nbytes for t in master),
        "states": states,
        "frozen": frozen,
    }


if __name__ == "__main__":
    _play(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
