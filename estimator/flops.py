"""Floating-point operations of a training step: every matrix product of it, and in which passes it is run.

Counted as torch counts them: a multiplication and its addition are two; attention over all pairs of positions, also where a causal kernel
leaves half of them out; element by element work is none.

Legend: B micro-batch, S sequence length, T = B·S tokens, K inner and N outer width of a product, a heads, d head size, E experts, k experts
per token, r rank.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache

from estimator.adapters import TRANSPOSED_EXPERTS
from estimator.dtypes import DType
from estimator.errors import RequestError
from estimator.inventory import Inventory, ModuleKind
from estimator.kv_cache import layer_types
from estimator.patterns import leaf, parent
from estimator.recipe import Attention, Loss, ObjectiveKind, Recipe
from estimator.scoring import scored_positions
from estimator.static_memory import stored_tensors
from estimator.step import layer_tensors
from estimator.storage import StoredTensor

_PRODUCT = 2  # a multiplication and an addition

# Where in its layer a module stands: what its input depends on. By the last part of the module's name, over the families of transformers.
_ATTENTION_INPUTS = {
    **dict.fromkeys(("q_proj", "q_a_proj", "q_b_proj", "query"), "q"),
    **dict.fromkeys(("k_proj", "key"), "k"),
    **dict.fromkeys(("v_proj", "value"), "v"),
    **dict.fromkeys(("kv_a_proj_with_mqa", "kv_b_proj", "kv_proj"), "kv"),
    **dict.fromkeys(("qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "att_proj", "qkv"), "qkv"),
}
_ATTENTION_OUTPUTS = frozenset({"o_proj", "out_proj", "dense", "attn_out", "wo"})
_MLP_OUTPUTS = frozenset({"down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "ff_out", "output_linear"})
# Experts that are all run for every token, with zeros for those not chosen. Source: transformers, models/llama4/modeling_llama4.py,
# Llama4TextMoe.forward.
_ALL_RUN = frozenset({"Llama4TextExperts"})
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_topk")
_PARALLEL_TYPES = frozenset({"cohere", "cohere2", "codegen", "gptj", "phi"})
# Norms and dropout behind the last product of a layer keep something, so that recomputation goes on to them.
_CLOSING_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_ffw_layernorm", "ffn_norm")
_CLOSING_DROPOUTS = ("resid_pdrop", "hidden_dropout", "residual_dropout", "dropout")


class Pass(StrEnum):
    """What a product is run for."""

    FORWARD = "forward"
    RECOMPUTE = "recompute"  # the forward pass again, by gradient checkpointing or a fused loss
    INPUT_GRADIENTS = "input_gradients"
    WEIGHT_GRADIENTS = "weight_gradients"


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One kind of matrix product, (M, K) × (K, N), and how often each pass of a micro-batch runs it."""

    name: str
    """Of the weight, without numbers."""
    inner: int
    outer: int
    rows_per_token: Fraction = Fraction(1)
    """Rows that go through it for one token: experts see a share of them."""
    fixed_rows: int = 0
    """Rows whatever the batch, in place of tokens: products of weights with weights."""
    num_weights: int = 1
    """Weights that one run goes through: the experts of a stack."""
    dtype: DType
    """What its factors are computed in."""
    packed_bytes: int = 0
    """Storage of a quantized weight, which is unpacked at every run but for weight gradients [bytes]."""
    runs: Mapping[Pass, int]

    def rows(self, tokens: int) -> Fraction | int:
        """M; a fraction only where there is a share, since fractions are slow."""
        if self.fixed_rows:
            return self.fixed_rows
        share = self.rows_per_token
        return tokens * share.numerator if share.denominator == 1 else tokens * share

    def flops(self, tokens: int) -> Fraction | int:
        """Of one run: 2·M·K·N [FLOP]."""
        return _PRODUCT * self.rows(tokens) * self.inner * self.outer


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCore:
    """Scores and their use with the values, of all heads of some layers."""

    window: int | None
    """Positions a query looks back at, where that is limited."""
    num_heads: int
    key_dim: int
    value_dim: int
    flash: bool
    """Whether one kernel does all of it, so that the backward pass computes the scores again."""
    causal: bool
    """Whether the kernel leaves out what the causal mask hides."""
    dtype: DType
    """What its factors are computed in."""
    runs: Mapping[Pass, int]
    """Layers that run it; of the backward pass `INPUT_GRADIENTS`, products counted one by one in `backward_products`."""
    backward_products: Mapping[str, int]
    """Layers that need the gradient of `q`, `k`, `v` and of the `weights` that softmax gave."""

    def forward_flops(self, batch: int, length: int) -> int:
        """Of one layer: 2·B·a·S²·(d_k + d_v) [FLOP].

        Source: torch, utils/flop_counter.py, sdpa_flop_count.
        """
        return _PRODUCT * batch * self.num_heads * length * length * (self.key_dim + self.value_dim)

    def backward_flops(self, batch: int, length: int) -> int:
        """Of all layers [FLOP].

        Source: torch, utils/flop_counter.py, sdpa_backward_flop_count, for one kernel; autograd's two products for each one else.
        """
        pair = _PRODUCT * batch * self.num_heads * length * length
        need = self.backward_products
        along_keys = need["q"] + need["k"] + (self.runs[Pass.INPUT_GRADIENTS] if self.flash else 0)
        return pair * (along_keys * self.key_dim + (need["v"] + need["weights"]) * self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProgram:
    """The products of one micro-batch, whatever its size."""

    products: tuple[Product, ...]
    attention: tuple[AttentionCore, ...]
    head: tuple[Product, ...]
    """Of the output layer, over the positions whose logits are made."""
    unmodelled_mixers: int
    """Layers that mix positions by something else than attention: only their projections are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFlops:
    """FLOPs of one micro-batch by pass."""

    by_pass: Mapping[Pass, int]
    attention: int
    """Of them in scores and their use, projections left out."""
    head: int
    """Of them in the output layer."""

    @property
    def total(self) -> int:
        """What the card executes, by torch's count [FLOP]."""
        return sum(self.by_pass.values())

    @property
    def model(self) -> int:
        """Without what is computed a second time: what model FLOPs utilisation is about [FLOP]."""
        return self.total - self.by_pass[Pass.RECOMPUTE]

    @property
    def forward(self) -> int:
        return self.by_pass[Pass.FORWARD]

    @property
    def backward(self) -> int:
        """All that runs after the loss, recomputation included [FLOP]."""
        return self.total - self.forward


def step_flops(inventory: Inventory, recipe: Recipe) -> StepFlops:
    """FLOPs of one micro-batch's forward and backward pass.

    Raises:
        RequestError: if the recipe trains nothing, for something else than next tokens, or the config does not say how heads are cut.
    """
    training = recipe.training
    if training is None:
        raise RequestError("training: a step's FLOPs are those of training; give TrainingArguments", field="training")
    program = step_program(inventory, recipe)
    rows, length = training.shape
    tokens = rows * length
    sums: dict[Pass, Fraction | int] = dict.fromkeys(Pass, 0)
    for product in program.products:
        for which, number in product.runs.items():
            sums[which] += number * product.flops(tokens)
    head: Fraction | int = 0
    for product in program.head:
        for which, number in product.runs.items():
            in_head = number * product.flops(head_positions(recipe))
            sums[which] += in_head
            head += in_head
    attention = 0
    for core in program.attention:
        batch, span = (training.micro_batch_size, training.sequence_length) if training.flattened else (rows, length)
        for which in (Pass.FORWARD, Pass.RECOMPUTE):
            flops = core.runs[which] * core.forward_flops(batch, span)
            sums[which] += flops
            attention += flops
        sums[Pass.INPUT_GRADIENTS] += core.backward_flops(batch, span)
        attention += core.backward_flops(batch, span)
    return StepFlops(by_pass={which: math.floor(number) for which, number in sums.items()}, attention=attention, head=math.floor(head))


def head_positions(recipe: Recipe) -> int:
    """Positions whose logits are made: all with transformers' loss and Liger's, those with a label with TRL's own [tokens]."""
    training = recipe.training
    assert training is not None
    if training.loss in (Loss.TRL_CHUNKED, Loss.TRL_TILED):
        return scored_positions(training)
    rows, length = training.shape
    return rows * length


def step_program(inventory: Inventory, recipe: Recipe) -> StepProgram:
    """Which products a micro-batch runs, and in which passes; recipes that differ in sizes alone share one result.

    Raises:
        RequestError: if the recipe trains nothing, or for something else than next tokens.
    """
    training = recipe.training
    if training is None:
        raise RequestError("training: a step's FLOPs are those of training; give TrainingArguments", field="training")
    if training.objective.kind is not ObjectiveKind.SFT:
        raise RequestError(
            f"task.kind: the FLOPs of {training.objective.kind.value!r} are not modelled; accepted: 'sft'", field="task.kind"
        )
    if inventory.config.get("is_encoder_decoder"):
        raise RequestError(f"model: the FLOPs of {inventory.model_class}, an encoder with a decoder, are not modelled", field="model")
    if inventory.layers_prefix is None or inventory.output_embedding is None:
        raise RequestError(f"model: the layers or the head of {inventory.model_class} are not known", field="model")
    plain = replace(training, micro_batch_size=1, sequence_length=2, gradient_accumulation_steps=1, flattened=False)
    return _program(inventory, replace(on_any_card(recipe), training=plain))


def on_any_card(recipe: Recipe) -> Recipe:
    """The recipe with no more of its card than decides which kernels run."""
    return replace(recipe, num_multiprocessors=1, compute_capability=(8, 0) if recipe.compute_capability >= (8, 0) else (7, 0))


@lru_cache(maxsize=256)
def _program(inventory: Inventory, recipe: Recipe) -> StepProgram:
    return _Walk(inventory, recipe).program()


class _Walk:
    """From the embedding to the head, with what asks for a gradient at each place."""

    def __init__(self, inventory: Inventory, recipe: Recipe) -> None:
        assert recipe.training is not None
        self.inventory = inventory
        self.recipe = recipe
        self.training = recipe.training
        self.config = inventory.config
        self.layers, self.outside = layer_tensors(inventory, stored_tensors(inventory, recipe))
        self.types = layer_types(inventory)
        self.products: dict[tuple[object, ...], Product] = {}
        self.cores: dict[tuple[object, ...], AttentionCore] = {}
        self.unmodelled_mixers = 0

    def program(self) -> StepProgram:
        hidden = self._embedding_asks()
        for index in range(self.inventory.num_layers):
            hidden = self._layer(index, hidden)
        return StepProgram(
            products=(*self.products.values(), *self._around(hidden)),
            attention=tuple(self.cores.values()),
            head=tuple(self._head(hidden or self._final_norm_asks())),
            unmodelled_mixers=self.unmodelled_mixers,
        )

    def _embedding_asks(self) -> bool:
        """Whether the first layer's input asks for a gradient: a trained embedding, or PEFT's hook under checkpointing.

        Source: transformers, modeling_utils.py, enable_input_require_grads.
        """
        name = self.inventory.input_embedding or ""
        trained = any(t.trainable and (t.pattern.startswith(f"{name}.")) for t in self.outside.values())
        return trained or (self.recipe.adapter is not None and self.training.gradient_checkpointing)

    def _final_norm_asks(self) -> bool:
        decoder = (self.inventory.layers_prefix or "").rpartition(".")[0]
        return any(t.trainable and t.pattern.startswith(f"{decoder}.") for t in self.outside.values())

    # -- one layer ------------------------------------------------------------------------------------------------------------------

    def _layer(self, index: int, hidden: bool) -> bool:
        tensors = self.layers[index]
        weights = {name: t for name, t in tensors.items() if self._multiplies(name, t)}
        trained_modules = {_owner(name) for name, t in tensors.items() if t.trainable}
        inner_asks = any(t.trainable and not self._is_matrix(name, t) for name, t in tensors.items() if ".lora_" not in name)
        entering = hidden or inner_asks

        asks_of_part = dict.fromkeys(("q", "k", "v"), False)
        attends = False
        for name in weights:
            part = _ATTENTION_INPUTS.get(_last(name))
            if part is not None:
                attends = True
                for letter in part:
                    asks_of_part[letter] |= entering or _owner(name) in trained_modules
        attended = any(asks_of_part.values())
        after_attention = entering or attended or any(_last(n) in _ATTENTION_OUTPUTS and _owner(n) in trained_modules for n in weights)
        into_mlp = entering if self._is_parallel() else after_attention
        leaving = entering or bool(trained_modules)

        recomputes = self._is_checkpointed(index) and leaving
        names = list(weights)
        last = self._skipped(tensors, names) if recomputes else None
        for name, weight in weights.items():
            asks = self._asks(name, entering, attended, into_mlp, leaving, trained_modules)
            self._module(name, weight, tensors, asks=asks, recomputes=recomputes, is_last=name == last)
        if attends:
            self._core(index, asks_of_part, recomputes)
        elif not any(_last(name) in _MLP_OUTPUTS for name in weights) or self.types[index] not in ("full_attention", "sliding_attention"):
            self.unmodelled_mixers += 1
        return leaving

    def _asks(self, name: str, entering: bool, attended: bool, into_mlp: bool, leaving: bool, trained: set[str]) -> bool:
        """Whether the input of a module asks for a gradient."""
        last = _last(name)
        if last in _ATTENTION_INPUTS:
            first = last.replace("_b_", "_a_")
            return entering or (first != last and any(owner.rpartition(".")[2].startswith(first) for owner in trained))
        if last in _MLP_OUTPUTS or _is_expert_output(name):
            return into_mlp or any(
                owner.rpartition(".")[0] == _owner(name).rpartition(".")[0] for owner in trained if owner != _owner(name)
            )
        if last in _ATTENTION_OUTPUTS and "mlp" not in name:
            return attended
        return into_mlp

    def _is_parallel(self) -> bool:
        """Whether attention and MLP have the layer's input in common."""
        config = self.config
        return bool(config.get("parallel_attn") or config.get("use_parallel_residual")) or self.inventory.model_type in _PARALLEL_TYPES

    def _is_checkpointed(self, index: int) -> bool:
        return self.training.gradient_checkpointing and index % self.training.checkpoint_every_n_layers == 0

    def _skipped(self, tensors: Mapping[str, StoredTensor], names: list[str]) -> str | None:
        """The module whose product is not run again: nothing behind it is kept, and recomputation stops at the last kept tensor.

        Source: torch, utils/checkpoint.py, set_checkpoint_early_stop; reentrant checkpoints run the whole layer.
        """
        if self.training.use_reentrant or not names:
            return None
        if any(name.startswith(norm) for name in tensors for norm in _CLOSING_NORMS):
            return None
        if any(isinstance(p := self.config.get(name), float | int) and p > 0 for name in _CLOSING_DROPOUTS):
            return None
        outputs = [name for name in names if _last(name) in _MLP_OUTPUTS]
        if any("experts" in name for name in names):
            # The sum over a token's experts keeps its weights; shared experts come after it, unless a gate follows them.
            outputs = [name for name in outputs if ".shared_experts." in f".{name}"]
        return outputs[-1] if outputs else None

    # -- products -------------------------------------------------------------------------------------------------------------------

    def _is_matrix(self, name: str, tensor: StoredTensor) -> bool:
        return len(tensor.shape) in (2, 3) and (leaf(name) == "weight" or "experts" in name)

    def _multiplies(self, name: str, tensor: StoredTensor) -> bool:
        """Whether it is a factor of a matrix product of its own: no adapter, no bias, no convolution over time."""
        if ".lora_" in name or ".modules_to_save." in name or (not tensor.dtype.is_floating_point and tensor.quantization is None):
            return False
        if "experts" in name and len(tensor.shape) == 3:
            return True
        if leaf(name) != "weight" or len(tensor.shape) != 2:
            return False
        is_router = any(word in tensor.module_class for word in ("Router", "Gate"))
        return tensor.module_kind in (ModuleKind.LINEAR, ModuleKind.CONV1D) or is_router or tensor.module_class.endswith("Linear")

    def _module(
        self, name: str, weight: StoredTensor, tensors: Mapping[str, StoredTensor], *, asks: bool, recomputes: bool, is_last: bool
    ) -> None:
        owner = _owner(name)
        saved = tensors.get(f"{owner}.modules_to_save.{leaf(name)}")
        if saved is not None:
            weight = saved
        adapter = f"{owner}.lora_A.weight" if f"{owner}.lora_A.weight" in tensors else f"{name}.lora_A.weight"
        a, b = tensors.get(adapter), tensors.get(adapter.replace("lora_A", "lora_B"))
        folds = a is not None and adapter.startswith(f"{name}.")
        inner, outer, share, copies = self._shape(name, weight)
        computed = self._dtype(weight)
        again = 1 if recomputes else 0
        self._add(
            Product(
                name=name,
                inner=inner,
                outer=outer,
                rows_per_token=share,
                num_weights=weight.shape[0] if len(weight.shape) == 3 else 1,
                dtype=computed,
                packed_bytes=weight.raw_bytes if weight.quantization is not None else 0,
                runs=_runs(copies, 1, again - (is_last and a is None), asks, weight.trainable or folds),
            )
        )
        if a is None or b is None:
            return
        rank = a.shape[0]
        if folds:
            # B·A is multiplied out; that of a stack of experts, r columns for each, once more when the parametrization is registered.
            # Source: peft, tuners/lora/layer.py, ParamWrapper._activate_lora; torch, nn/utils/parametrize.py.
            experts, times = (weight.shape[0], 2) if len(weight.shape) == 3 else (1, 1)
            runs = _runs(experts, times, times * again, True, True)
            kind = self._dtype(a)
            self._add(Product(name=adapter, inner=rank // experts, outer=inner, fixed_rows=outer, dtype=kind, runs=runs))
            return
        first = Product(name=adapter, inner=inner, outer=rank, rows_per_token=share, dtype=self._dtype(a), runs={})
        second = replace(first, name=adapter.replace("lora_A", "lora_B"), inner=rank, outer=outer)
        self._add(replace(first, runs=_runs(copies, 1, again, asks, True)))
        self._add(replace(second, runs=_runs(copies, 1, again - is_last, True, True)))
        if self.recipe.adapter is not None and self.recipe.adapter.use_dora:
            # B·A of the norm, from an identity matrix. Source: peft, tuners/lora/dora.py, DoraLinearLayer.get_lora_weight.
            runs = _runs(copies, 1, again, False, False)
            self._add(replace(first, name=f"{adapter}.norm", fixed_rows=inner, runs=runs))
            self._add(replace(second, name=f"{adapter}.norm.B", fixed_rows=inner, runs=runs))

    def _shape(self, name: str, weight: StoredTensor) -> tuple[int, int, Fraction, int]:
        """K, N, rows for each token, and copies in one layer."""
        if len(weight.shape) == 3:
            experts, first, second = weight.shape
            all_run = weight.module_class in _ALL_RUN
            inner, outer = (first, second) if weight.module_class in TRANSPOSED_EXPERTS or all_run else (second, first)
            return inner, outer, Fraction(experts if all_run else self._experts_per_token()), 1
        first, second = weight.shape
        inner, outer = (first, second) if weight.module_kind is ModuleKind.CONV1D else (second, first)
        if ".experts.{}" in name:
            experts = len(weight.indices[1])
            return inner, outer, Fraction(self._experts_per_token(), experts), experts
        return inner, outer, Fraction(1), 1

    def _experts_per_token(self) -> int:
        found = next((number for name in _EXPERTS_PER_TOKEN if (number := _integer(self.config, name))), None)
        if found is None:
            raise RequestError("model: its config does not say how many experts a token goes through", field="model")
        return found

    def _dtype(self, weight: StoredTensor) -> DType:
        """What autocast, the compute type of bitsandbytes or else the weight's own type computes in."""
        if self.training.autocast_dtype is not None:
            return self.training.autocast_dtype
        quantization = self.recipe.quantization
        if weight.quantization is not None and quantization is not None:
            return quantization.compute_dtype if quantization.kind.is_4bit else DType.FLOAT16
        return weight.dtype

    def _add(self, product: Product) -> None:
        key = (product.name, product.inner, product.outer, product.rows_per_token, product.fixed_rows, product.dtype, product.packed_bytes)
        known = self.products.get(key)
        runs = product.runs if known is None else {which: known.runs[which] + product.runs[which] for which in Pass}
        self.products[key] = replace(product, runs=runs)

    # -- attention, head and the rest -----------------------------------------------------------------------------------------------

    def _core(self, index: int, asks: Mapping[str, bool], recomputes: bool) -> None:
        config = self.config
        head_dim = _integer(config, "head_dim") or _required(config, "hidden_size") // _required(config, "num_attention_heads")
        nope, rope = _integer(config, "qk_nope_head_dim"), _integer(config, "qk_rope_head_dim")
        key_dim = nope + rope if nope and rope else head_dim
        value_dim = (_integer(config, "v_head_dim") if nope else None) or head_dim
        window = _integer(config, "sliding_window") if self.types[index] == "sliding_attention" else None
        flash = self._is_one_kernel(key_dim, value_dim)
        backward = {letter: int(asks[letter]) for letter in "qkv"} | {"weights": int(asks["q"] or asks["k"])}
        if flash:  # one kernel gives all three gradients
            backward = dict.fromkeys(backward, int(any(asks.values())))
        runs = {
            Pass.FORWARD: 1,
            Pass.RECOMPUTE: int(recomputes),
            Pass.INPUT_GRADIENTS: int(any(asks.values())),
            Pass.WEIGHT_GRADIENTS: 0,
        }
        key = (window,)
        known = self.cores.get(key)
        if known is not None:
            runs = {which: runs[which] + known.runs[which] for which in Pass}
            backward = {name: backward[name] + known.backward_products[name] for name in backward}
        self.cores[key] = AttentionCore(
            window=window,
            num_heads=_required(config, "num_attention_heads"),
            key_dim=key_dim,
            value_dim=value_dim,
            flash=flash,
            causal=flash and not self.training.padded,
            dtype=self._attention_dtype(flash),
            runs=runs,
            backward_products=backward,
        )

    def _is_one_kernel(self, key_dim: int, value_dim: int) -> bool:
        """As `attention.scaled_dot_product` chooses: sdpa writes grouped heads out where flash attention does not take them."""
        recipe = self.recipe
        if recipe.attention is not Attention.SDPA:
            return recipe.attention is not Attention.EAGER
        heads = _required(self.config, "num_attention_heads")
        grouped = (_integer(self.config, "num_key_value_heads") or heads) < heads
        half = (self.training.autocast_dtype or recipe.dtype).is_half
        fits_flash = half and recipe.compute_capability >= (8, 0) and key_dim == value_dim <= 256
        return fits_flash or not grouped or self.training.padded

    def _attention_dtype(self, flash: bool) -> DType:
        """Source: torch, ATen/native/transformers/attention.cpp, _scaled_dot_product_attention_math: in float32."""
        if self.recipe.attention is Attention.SDPA and not flash:
            return DType.FLOAT32
        return self.training.autocast_dtype or self.recipe.dtype

    def _head(self, hidden: bool) -> Iterator[Product]:
        name = f"{self.inventory.output_embedding}.weight"
        row = next((row for row in self.inventory.rows if row.pattern == name), None)
        if row is None:
            return
        saved = self.outside.get(f"{self.inventory.output_embedding}.modules_to_save.weight")
        stored = saved or self.outside.get(name) or self.outside.get(row.tied_to or "")
        assert stored is not None, name
        outer, inner = row.shape
        loss = self.training.loss
        # Source: trl, kernels/chunked_logprob.py, and sft_trainer.py for the chunks before: both compute logits again; Liger does not.
        again = int(loss in (Loss.TRL_TILED, Loss.TRL_CHUNKED) and (hidden or stored.trainable))
        plain = Product(name=name, inner=inner, outer=outer, dtype=self._dtype(stored), runs=_runs(1, 1, again, hidden, stored.trainable))
        if stored.quantization is not None:
            plain = replace(plain, packed_bytes=stored.raw_bytes)
        yield plain
        a = self.outside.get(f"{self.inventory.output_embedding}.lora_A.weight")
        if a is not None:
            first = replace(plain, name=a.pattern, inner=inner, outer=a.shape[0], dtype=self._dtype(a), packed_bytes=0)
            yield replace(first, runs=_runs(1, 1, again, hidden, True))
            yield replace(first, inner=a.shape[0], outer=outer, runs=_runs(1, 1, again, True, True))

    def _around(self, hidden: bool) -> Iterator[Product]:
        """Linear layers of the decoder outside its layers, the head left out: projections of narrow embeddings."""
        decoder = (self.inventory.layers_prefix or "").rpartition(".")[0]
        for name, weight in self.outside.items():
            in_decoder = name.startswith(f"{decoder}.") and weight.module_kind is ModuleKind.LINEAR
            if in_decoder and self._multiplies(name, weight) and parent(name) != self.inventory.output_embedding and not weight.indices:
                inner, outer, share, _ = self._shape(name, weight)
                runs = _runs(1, 1, 0, hidden, weight.trainable)
                yield Product(name=name, inner=inner, outer=outer, rows_per_token=share, dtype=self._dtype(weight), runs=runs)


def _runs(copies: int, forward: int, again: int, inputs: bool, weights: bool) -> Mapping[Pass, int]:
    return {
        Pass.FORWARD: copies * forward,
        Pass.RECOMPUTE: copies * max(again, 0),
        Pass.INPUT_GRADIENTS: copies * inputs,
        Pass.WEIGHT_GRADIENTS: copies * weights,
    }


def _owner(name: str) -> str:
    """The module of a weight, an adapter or a trained copy; a fused parameter is its own."""
    for mark in (".lora_", ".modules_to_save.", ".trainable_tokens"):
        name = name.partition(mark)[0] if mark in name else name
    return parent(name) if leaf(name) in ("weight", "bias") else name


def _last(name: str) -> str:
    """The module's own name; GPT-2's `c_proj` closes the attention and the MLP."""
    owner = _owner(name)
    last = owner.rpartition(".")[2]
    return ("down_proj" if "mlp" in owner else "o_proj") if last == "c_proj" else last


def _is_expert_output(name: str) -> bool:
    return "experts" in name and _last(name) in ("down_proj", "w2")


def _integer(config: Mapping[str, object], name: str) -> int | None:
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _required(config: Mapping[str, object], name: str) -> int:
    value = _integer(config, name)
    if value is None:
        raise RequestError(f"model: its config does not say {name}, so that its attention cannot be counted", field="model")
    return value
