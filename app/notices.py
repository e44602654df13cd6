"""Warnings for what users trip over: each a stable code and one plain sentence with the numbers of this very run."""

from collections.abc import Iterable

from app import left_out, machine
from app.answer import is_modelled
from app.answered import Answered, Rule
from app.versions import shown
from app.wording import times
from estimator.correction import MIN_RESIDUALS, carried, class_of, margin_without_interval, other_stack
from estimator.dtypes import DType
from estimator.estimate import Notice
from estimator.kernels import Kernel
from estimator.phases import Item
from estimator.recipe import Attention, ObjectiveKind, Trainer, Training
from estimator.storage import StoredTensor
from estimator.units import gib

# Share of the base weights that must stay unquantized before it is worth a sentence.
NOTEWORTHY_SHARE = 0.10
# Source: bitsandbytes, optim/optimizer.py, get_state_buffer.
MIN_PAGED_ELEMENTS = 100_000

# Source: bitsandbytes 0.50, cuda_specs.py, CUDASpecs.has_imma.
_INT8_TENSOR_CORES = (7, 5)


def notices(answered: Answered) -> tuple[Notice, ...]:
    """The estimator's own notices, then those of the border, each code once unless it names different fields."""
    own = tuple(answered.estimate.notices)
    return own + tuple(
        Notice(code=code, message=message) for rule, code in (*left_out.RULES, *machine.RULES, *RULES) for message in rule(answered)
    )


def _bytes(tensors: Iterable[StoredTensor]) -> int:
    return sum(tensor.allocated_bytes for tensor in tensors)


def _num_elements(tensors: Iterable[StoredTensor]) -> int:
    return sum(tensor.num_elements * tensor.num_copies for tensor in tensors)


def _no_bfloat16(a: Answered) -> Iterable[str]:
    capability = a.card.compute_capability if a.card is not None else None
    if a.card is None or capability is None or capability >= (8, 0):
        return
    uses = [
        (name, instead)
        for name, dtype, instead in (
            ("dtype", a.recipe.dtype, _other_weights(a)),
            ("bf16", a.recipe.training.autocast_dtype if a.recipe.training else None, "fp16=True"),
            ("bnb_4bit_compute_dtype", _compute_type(a), 'bnb_4bit_compute_dtype="float16"'),
        )
        if dtype is DType.BFLOAT16
    ]
    if uses:
        names, others = zip(*uses, strict=True)
        yield (
            f"{a.card.name} has compute capability {capability[0]}.{capability[1]} and bfloat16 needs 8.0: {', '.join(names)} would be "
            f"emulated slowly or refused; use {', '.join(others)} instead."
        )


def _compute_type(a: Answered) -> DType | None:
    """In which 4-bit weights are multiplied; LLM.int8 has no choice."""
    quantization = a.recipe.quantization
    return quantization.compute_dtype if quantization is not None and quantization.kind.is_4bit else None


def _other_weights(a: Answered) -> str:
    if a.recipe.training is None or a.recipe.adapter is not None:
        return 'dtype="float16"'
    return 'dtype="float32" (weights loaded in float32, since trained ones in float16 are refused by the GradScaler)'


def _scaled_gradients(a: Answered) -> Iterable[str]:
    """Source: torch, amp/grad_scaler.py, _unscale_grads_; for bfloat16 ATen/native/cuda/AmpKernels.cu, pytorch issue 127176."""
    training = a.recipe.training
    if training is None or training.autocast_dtype is not DType.FLOAT16:
        return
    half = [t for t in a.stored if t.trainable and t.dtype.is_half]
    if not half:
        return
    names = " and ".join(sorted({t.dtype.value for t in half}))
    number = sum(t.num_copies for t in half)
    error = "Attempting to unscale FP16 gradients" if any(t.dtype is DType.FLOAT16 for t in half) else "not implemented for 'BFloat16'"
    extra = gib(2 * _num_elements(half))
    yield (
        f"fp16=True scales the loss, and the GradScaler refuses 16-bit gradients ({error!r}): {number:,} trained "
        f"tensors are {names}, so that the first step would fail; trained weights have to be float32, here {extra} more for the weights "
        "alone, beside gradients and optimizer states in float32."
    )


def _written_out(a: Answered) -> Iterable[str]:
    """Source: see `estimator.attention.scaled_dot_product`."""
    recipe = a.recipe
    heads = a.number("num_attention_heads", "n_head")
    if Kernel.WRITTEN_OUT not in a.estimate.kernels or heads is None:
        return
    training, inference = recipe.training, recipe.inference
    batch, length = training.shape if training else (inference.batch_size, inference.prompt_length) if inference else (0, 0)
    major, minor = recipe.compute_capability
    if recipe.compute_capability < (8, 0):
        why = f"compute capability {major}.{minor} has no flash attention"
    elif not recipe.dtype.is_half and not _autocasts(training):
        why = f"flash attention does not take {recipe.dtype.value}"
    else:
        why = "flash attention does not take these heads"
    yield (
        f"{why}, and the other kernel of sdpa takes no grouped key/value heads: attention is written out, and each float32 tensor of "
        f"scores takes {heads} heads × {batch:,} × {length:,}² × 4 B = {gib(4 * heads * batch * length * length)} while a layer runs."
    )


def _int8_inputs(a: Answered) -> Iterable[str]:
    """Source: bitsandbytes, autograd/_functions.py, MatMul8bitLt.forward (`ctx.tensors`); torch, utils/checkpoint.py, _checkpoint_hook."""
    if a.with_reentry is None:
        return
    saved = a.estimate.peak.allocated_bytes - a.with_reentry.peak.allocated_bytes
    if saved > 0:
        yield (
            "layers of LLM.int8 keep their inputs where non-reentrant checkpointing cannot drop them, through the whole step: "
            f'gradient_checkpointing_kwargs={{"use_reentrant": True}} peaks {gib(saved)} lower.'
        )


def _int8_without_tensor_cores(a: Answered) -> Iterable[str]:
    """Source: bitsandbytes 0.50, diagnostics/cuda.py, _print_cuda_diagnostics ("Only slow 8-bit matmul
    is supported for your GPU"); README (compute capability 6.0 at least, 7.5 recommended); backends/cuda/ops.py, _int8_linear_matmul_impl
    (float32 where cuBLASLt has no algorithm)."""
    quantization = a.recipe.quantization
    capability = a.card.compute_capability if a.card is not None else None
    if quantization is None or quantization.kind.is_4bit or a.card is None or capability is None or capability >= _INT8_TENSOR_CORES:
        return
    largest = max((t.num_elements for t in a.base if t.quantization is not None), default=0)
    yield (
        f"{a.card.name} has compute capability {capability[0]}.{capability[1]}, and tensor cores multiply int8 from 7.5 on: bitsandbytes "
        "names its 8-bit product slow on such a card, and advises 4 bits where it fails. Where cuBLASLt has no algorithm for it, float32 "
        f"copies of weight and input are multiplied instead, {gib(4 * largest)} for the largest weight alone, which is not counted here."
    )


def _compute_dtype(a: Answered) -> Iterable[str]:
    quantization = a.recipe.quantization
    if quantization is None or not quantization.kind.is_4bit or quantization.compute_dtype is not DType.FLOAT32:
        return
    largest = max((t.num_elements for t in a.base if t.quantization is not None), default=0)
    yield (
        f"bnb_4bit_compute_dtype is float32, the library's default: the largest weight takes {gib(4 * largest)} when it is dequantized "
        f"instead of {gib(2 * largest)}, and layers multiply in 32 bit; bfloat16 (float16 before Ampere) is what guides mean."
    )


def _unquantized(a: Answered) -> Iterable[str]:
    if a.recipe.quantization is None:
        return
    rest, total = _bytes(a.unquantized), _bytes(a.base)
    if rest <= NOTEWORTHY_SHARE * total:
        return
    parts = []
    experts = _bytes(t for t in a.unquantized if "experts" in t.pattern)
    if experts > NOTEWORTHY_SHARE * rest:
        parts.append(f"experts {gib(experts)}")
    heads = tuple(f"{name}." for name in (a.inventory.input_embedding, a.inventory.output_embedding) if name)
    embeddings = _bytes(t for t in a.unquantized if heads and t.pattern.startswith(heads))
    if embeddings > NOTEWORTHY_SHARE * rest:
        parts.append(f"embedding and head {gib(embeddings)}")
    widths = " and ".join(sorted({str(8 * t.dtype.itemsize) for t in a.unquantized}))
    yield (
        f"{gib(rest)} of the {gib(total)} of base weights are not quantized and stay in {widths} bits"
        f"{': ' + ', '.join(parts) if parts else ''}; bitsandbytes replaces only linear layers."
    )


def _upcast(a: Answered) -> Iterable[str]:
    if not a.recipe.prepare_for_kbit_training or not a.recipe.dtype.is_half:
        return
    upcast = [t for t in a.unquantized if t.dtype is DType.FLOAT32]
    extra = 2 * _num_elements(upcast)
    if extra:
        yield (
            f"prepare_model_for_kbit_training turns the {_num_elements(upcast):,} parameters that are not quantized into float32: "
            f"{gib(extra)} more than {a.recipe.dtype.value}, and 32-bit activations follow from it."
        )


def _above_lora(a: Answered) -> Iterable[str]:
    if a.without_quantization is None:
        return
    quantized, plain = a.estimate.peak.allocated_bytes, a.without_quantization.peak.allocated_bytes
    if quantized > plain:
        yield (
            f"the quantized run peaks at {gib(quantized)}, above the {gib(plain)} of the same LoRA run with a plain bfloat16 base: "
            "what is upcast, stays unquantized or is kept by quantized layers outweighs what quantization saves."
        )


def _loaded_in_float32(a: Answered) -> Iterable[str]:
    recipe = a.recipe
    asked = a.request.dtype
    if recipe.dtype is not DType.FLOAT32 or asked not in (None, "auto"):
        return
    extra = gib(2 * _num_elements(t for t in a.base if t.dtype is DType.FLOAT32))
    if asked is None and recipe.trainer is Trainer.TRL and recipe.training and recipe.stack.sft_loads_ids_in_float32:
        yield (
            f"dtype is not given: SFTTrainer of TRL {shown(recipe.stack.trl)} loads a model id in float32, {extra} more than "
            'bfloat16; pass a loaded model or model_init_kwargs={"dtype": "bfloat16"}.'
        )
        return
    how = 'dtype is "auto"' if asked == "auto" else "dtype is not given"
    if asked is None and not recipe.stack.loads_checkpoint_dtype_by_default:
        why = f"transformers {shown(recipe.stack.transformers)} loads float32 then, whatever the checkpoint holds"
    elif a.inventory.checkpoint_dtype is None:
        yield (
            f"{how}, and the config names no type: transformers would take that of the checkpoint's weights, which is not known here. "
            f'float32 is assumed, an upper bound: {extra} more than with dtype="bfloat16". Give dtype.'
        )
        return
    else:
        why = "the checkpoint's own type is float32"
    yield f'{how}: {why}, {extra} more than with dtype="bfloat16".'


def _nvidia_smi(a: Answered) -> Iterable[str]:
    device, allocated = a.estimate.device_bytes, a.estimate.peak.allocated_bytes
    if is_modelled(a.estimate) and device > allocated:
        yield (
            f"nvidia-smi will show about {gib(device)}, {gib(device - allocated)} more than torch.cuda.max_memory_allocated(): "
            "segments that the allocator keeps, the CUDA context and libraries."
        )


def _under_pressure(a: Answered) -> Iterable[str]:
    holding = a.estimate.holding.get()
    if holding.without_pressure_bytes > holding.device_bytes:
        when = f"{times(retries)} in every step, which takes time" if (retries := holding.num_alloc_retries) else "in the first steps"
        yield (
            f"with room for all that the allocator would cache the run holds {gib(holding.without_pressure_bytes)}: here it fits only "
            f"because the cache is given back to make room (num_alloc_retries), {when}, and again wherever lengths vary; "
            "expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF may spare it."
        )


def _merge(a: Answered) -> Iterable[str]:
    quantization = a.recipe.quantization
    if quantization is None or a.recipe.adapter is None:
        return
    bits = "4-bit" if quantization.kind.is_4bit else "8-bit"
    yield (
        f"the adapter cannot be merged into {bits} weights in place without rounding it away: merging needs the base model in 16 bits, "
        f"{gib(2 * a.inventory.num_parameters)} (on the CPU will do)."
    )


def _paging(a: Answered) -> Iterable[str]:
    if a.recipe.training is None or not a.recipe.training.optimizer.startswith("paged_"):
        return
    trained = [t for t in a.stored if t.trainable]
    small = sum(t.num_copies for t in trained if t.num_elements < MIN_PAGED_ELEMENTS)
    total = sum(t.num_copies for t in trained)
    kept = a.peak_bytes(Item.ACTIVATIONS, Item.CHECKPOINTS, Item.LOGITS, Item.TEMPORARY)
    yield (
        f"paging moves optimizer states only, here {gib(a.estimate.paged_bytes)}, and only of tensors with at least "
        f"{MIN_PAGED_ELEMENTS:,} elements ({small:,} of {total:,} trained tensors are smaller); activations and logits, here up to "
        f"{gib(kept)}, are never paged and can still run out."
    )


def _nvidia_only(a: Answered) -> Iterable[str]:
    if a.recipe.quantization is not None and a.card is None:
        yield "bitsandbytes is made for NVIDIA GPUs first; on Apple Silicon quantize with MLX instead, which this answer does not describe."


def _kbit_checkpointing(a: Answered) -> Iterable[str]:
    training = a.recipe.training
    if a.recipe.prepare_for_kbit_training and a.recipe.quantization and training and not training.gradient_checkpointing:
        yield (
            "prepare_model_for_kbit_training turns gradient checkpointing on unless it is called with use_gradient_checkpointing=False; "
            "this answer is for the latter, as training.gradient_checkpointing says."
        )


def _assumed_capability(a: Answered) -> Iterable[str]:
    if a.card is None or a.card.compute_capability is None:
        major, minor = a.recipe.compute_capability
        yield f"no GPU is named: compute capability {major}.{minor} is assumed, which decides kernels and their workspaces."


def _beyond_positions(a: Answered) -> Iterable[str]:
    limit = a.inventory.num_positions
    inference = a.recipe.inference
    length = (
        a.recipe.training.sequence_length if a.recipe.training else inference.prompt_length + inference.max_new_tokens if inference else 0
    )
    if limit is not None and length > limit:
        yield f"the length {length:,} is beyond the model's max_position_embeddings of {limit:,}: it runs, but outside what was trained."


def _no_interval(a: Answered) -> Iterable[str]:
    runs = a.recipe.training is not None or a.recipe.inference is not None
    if runs and not a.has_interval and is_modelled(a.estimate):
        kind = class_of(a.recipe, a.estimate.kernels)
        margin = margin_without_interval()
        yield (
            f"there are fewer than {MIN_RESIDUALS} published measurements of this kind of run ({kind or 'inference'}) that set no "
            f"constant, too few for an interval: 'fits' asks for {100 * margin.share:.1f} % above the estimate, and what fits with less "
            f"is 'tight'. {margin.basis}."
        )


def _other_stack(a: Answered) -> Iterable[str]:
    other = other_stack(a.recipe, a.estimate.kernels) if a.has_interval else None
    if other is not None:
        yield (
            f"the measurements behind the interval were made with {other}: known changes are in the estimate, but the interval's 90 % are "
            f"not assured for these versions ({carried()})."
        )


def _checkpoint_quantization(a: Answered) -> Iterable[str]:
    own = a.inventory.config.get("quantization_config")
    method = own.get("quant_method") if isinstance(own, dict) else None
    if method not in (None, "bitsandbytes") and a.recipe.quantization is None and not a.inventory.is_stored:
        yield f"the checkpoint is stored quantized with {method}: this answer is for its weights dequantized to {a.recipe.dtype.value}."


def _flash_attention(a: Answered) -> Iterable[str]:
    recipe = a.recipe
    if recipe.attention not in (Attention.FLASH_ATTENTION_2, Attention.FLASH_ATTENTION_3):
        return
    if recipe.compute_capability < (8, 0):
        yield f"{recipe.attention.value} needs compute capability 8.0 and would fail on this card; sdpa works."
    elif not recipe.dtype.is_half and not _autocasts(recipe.training):
        yield f"{recipe.attention.value} works in float16 and bfloat16 only, and this run computes attention in {recipe.dtype.value}."


def _cudnn_attention(a: Answered) -> Iterable[str]:
    recipe, major = a.recipe, a.recipe.compute_capability[0]
    fused = {Kernel.FLASH, Kernel.MEMORY_EFFICIENT} & a.estimate.kernels
    by_cudnn = recipe.attention is Attention.SDPA and major in (9, 10) and recipe.stack.prefers_cudnn_attention
    if recipe.training is not None and fused and by_cudnn:
        yield (
            f"on compute capability {major} torch hands sdpa to cuDNN where it can. What that keeps for the backward pass is what is "
            f"counted here; the workspace of its backward kernels is not public, and that of {min(fused).value} stands for it. "
            "TORCH_CUDNN_SDPA_DEPRIORITIZED=1 takes torch's own kernels."
        )


def _autocasts(training: Training | None) -> bool:
    return training is not None and training.autocast_dtype is not None


def _other_major(a: Answered) -> Iterable[str]:
    asked, inspected = shown(a.recipe.stack.transformers), a.inventory.transformers_version
    if asked.split(".")[0] != inspected.split(".")[0]:
        yield f"the parameter table was read from transformers {inspected}; known differences to {asked} are applied, unknown ones are not."


def _unknown_then(a: Answered) -> Iterable[str]:
    if (first := a.recipe.stack.lacks_until(a.inventory.model_type)) is not None:
        yield (
            f"transformers {shown(a.recipe.stack.transformers)} does not have {a.inventory.model_type}, which came with {shown(first)}: "
            "this is what later versions do, with what else is known of that one."
        )


def _own_code(a: Answered) -> Iterable[str]:
    if a.has_own_code and not a.inventory.is_stored:
        yield (
            f"the repository brings code of its own, which was not run: {a.inventory.model_class} of transformers "
            f"{a.inventory.transformers_version} stands for it."
        )


def _stored(a: Answered) -> Iterable[str]:
    checkpoint = a.checkpoint
    if checkpoint is None or not a.inventory.is_stored:
        return
    files = checkpoint.files
    told = f"the {files.num_tensors:,} tensors that the headers of its safetensors files list, {gib(files.stored_bytes)}"
    if checkpoint.method is not None:
        yield (
            f"the checkpoint is stored quantized with {checkpoint.method}: its weights are {told}, as stored. Kernels that pack them anew "
            "when loaded, and what dequantizing takes while the model runs, are not in it."
        )
    else:
        yield (
            f"transformers has no class for {a.inventory.model_class}, and the repository's own code is never run: its weights are {told}, "
            f"loaded in {a.recipe.dtype.value}. Buffers, tied weights and the step of its code are not known."
        )


def _stale(a: Answered) -> Iterable[str]:
    if a.is_stale:
        yield "the Hub does not answer: this is for the config that was kept from before, which may have changed since."


def _load_only(a: Answered) -> Iterable[str]:
    if a.recipe.training is None and a.recipe.inference is None:
        yield "neither training nor inference is given: the answer is for loading the weights alone."


def _generation(a: Answered) -> Iterable[str]:
    """Source: trl 1.16, trainer/grpo_trainer.py, GRPOTrainer._generate_single_turn."""
    training = a.recipe.training
    if training is not None and training.objective.kind is ObjectiveKind.GRPO:
        yield (
            "The phases are those of GRPO's training step. The generation before it is not among them: without vLLM its key/value cache "
            "lies on the same card, see `inference`; with vLLM in the same process, the memory given to vLLM."
        )


RULES: tuple[tuple[Rule, str], ...] = (
    (_load_only, "load_only"),
    (_own_code, "own_code_not_run"),
    (_stored, "sizes_from_headers"),
    (_stale, "stale_config"),
    (_no_bfloat16, "no_bfloat16"),
    (_scaled_gradients, "fp16_gradients_refused"),
    (_cudnn_attention, "cudnn_attention_assumed"),
    (_flash_attention, "flash_attention_unsupported"),
    (_written_out, "attention_written_out"),
    (_int8_inputs, "int8_keeps_inputs"),
    (_int8_without_tensor_cores, "int8_without_tensor_cores"),
    (_compute_dtype, "compute_dtype_float32"),
    (_unquantized, "weights_not_quantized"),
    (_upcast, "float32_upcast"),
    (_above_lora, "qlora_above_lora"),
    (_loaded_in_float32, "model_loaded_in_float32"),
    (_checkpoint_quantization, "checkpoint_quantization"),
    (_kbit_checkpointing, "kbit_checkpointing_default"),
    (_beyond_positions, "beyond_max_position_embeddings"),
    (_paging, "paging_is_partial"),
    (_merge, "merge_needs_dequantized_copy"),
    (_nvidia_only, "bitsandbytes_needs_nvidia"),
    (_nvidia_smi, "nvidia_smi_shows_more"),
    (_under_pressure, "cache_given_back"),
    (_assumed_capability, "compute_capability_assumed"),
    (_other_major, "other_transformers_major"),
    (_unknown_then, "model_newer_than_transformers"),
    (_generation, "generation_left_out"),
    (_no_interval, "interval_unavailable"),
    (_other_stack, "other_stack"),
)
