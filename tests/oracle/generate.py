"""Runs transformers' own `generate` on a tiny model and reports what was alive while it read the prompt and while it wrote."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.utils import ModelOutput

from estimator.introspect.cuda_paths import cuda_paths
from tests.oracle.live import LiveStorages
from tests.oracle.models import Mode, build
from tests.oracle.run import Batch, PhasePeak, mode_of, warm_up, watched, worst


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One call of `generate`."""

    static_bytes: int
    """Weights, quantization state, buffers [bytes]."""
    input_bytes: int
    peaks: Mapping[str, PhasePeak]
    """`prefill`: from the call to the end of the first sampling; `decode`: what follows. Inputs and weights are not in `live_bytes`."""
    cache_bytes: tuple[int, ...] = field(repr=False)
    """Storage of keys and values after each forward pass [bytes]."""


def generate(
    family: str,
    mode: str | Mode,
    B: int,
    prompt: int,
    new: int,
    layers: int,
    *,
    cache: str = "dynamic",
    padded: bool = False,
    granularity_bytes: int = 1,
    log: bool = False,
    **options: Any,
) -> Generation:
    """`model.generate` of `new` tokens, greedily, after a prompt.

    Args:
        cache: `cache_implementation`.
        padded: whether the prompts carry padding, on the left.
        granularity_bytes: every storage is rounded up to it: 512 as CUDA's allocator counts [bytes].
        options: see `models.build`.
    """
    mode = mode_of(mode)
    with cuda_paths():
        whole, batch = build(family, mode, layers, **options).eval(), Batch.of(B, prompt, padded=padded)
        model: Any = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        warm_up(model, mode, batch)
        model.config.use_cache = True
        kept: list[int] = []
        with watched(model, batch, granularity_bytes=granularity_bytes, log=log) as live, _split(model, live, kept):
            live.begin("prefill")
            model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=new,
                do_sample=False,
                cache_implementation=cache,
                pad_token_id=0,
                eos_token_id=None,  # so that random weights do not end a sequence early
            )
            return Generation(
                static_bytes=live.known_bytes["static"],
                input_bytes=live.known_bytes["inputs"],
                peaks=worst(live),
                cache_bytes=tuple(kept),
            )


@contextmanager
def _split(model: Any, live: LiveStorages, kept: list[int]) -> Iterator[None]:
    """The second time that inputs are prepared, reading is over."""
    prepare = model.prepare_inputs_for_generation
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            live.begin("decode")
        return prepare(*args, **kwargs)

    def measure(module: nn.Module, args: Any, output: ModelOutput) -> None:
        kept.append(cache_bytes(output.past_key_values))

    model.prepare_inputs_for_generation = counted
    handle = model.register_forward_hook(measure)
    try:
        yield
    finally:
        handle.remove()
        del model.prepare_inputs_for_generation


def cache_bytes(cache: Cache) -> int:
    """Storages behind the keys and values of all layers [bytes, not rounded]."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)}
    return sum(storages.values())
