"""One training step on the tape: embedding, layers, loss and the way back.

Layers that are alike are run once at each end of their row; those between are taken as copies of the first, since what they keep is the
same and what is alive changes by a constant from one to the next.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from estimator.blocks.families import FAMILIES, Family, Frame
from estimator.blocks.layer import Layer, Surroundings
from estimator.dtypes import DType
from estimator.fused_loss import TILE_ROWS, chunked_loss, liger_chunk_rows, liger_loss, tiled_loss
from estimator.inventory import Inventory
from estimator.kernels import Kernel
from estimator.loss import label_logits, stock_loss
from estimator.modules import Modules
from estimator.operators import scale
from estimator.phases import Item, Phase
from estimator.recipe import Attention, Loss, Recipe, Training
from estimator.storage import StoredTensor
from estimator.tape import AccumulateGrad, Extent, Gradients, Held, Node, Parameter, Snapshot, Tape, Value
from estimator.units import allocated


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """What the batch's size decides about the program, beside the sizes of its tensors."""

    beyond_window: bool
    """Whether sequences are longer than the sliding window."""
    tile_rows: int | None = None
    """Tokens in a tile of TRL's loss once there are more of them."""
    chunk_rows: int = 0
    """Tokens in a chunk of Liger's loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The instants at which each phase can be largest, beside what is stored between steps."""

    peaks: Mapping[Phase, tuple[Snapshot, ...]]
    kernels: frozenset[Kernel] = frozenset()
    weights_growth_bytes: int = 0
    """What stored weights gain, once and for good, from types that the first forward pass gives them [bytes]."""


def layer_tensors(inventory: Inventory, stored: tuple[StoredTensor, ...]) -> tuple[list[dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """Stored tensors by name relative to their layer, and those outside the layers by full name."""
    layers: list[dict[str, StoredTensor]] = [{} for _ in range(inventory.num_layers)]
    outside: dict[str, StoredTensor] = {}
    prefix = f"{inventory.layers_prefix}.{{}}."
    for tensor in stored:
        if tensor.pattern.startswith(prefix):
            relative = tensor.pattern[len(prefix) :]
            for index in tensor.indices[0]:
                layers[index][relative] = tensor
        else:
            outside[tensor.pattern] = tensor
    return layers, outside


def run_step(
    inventory: Inventory,
    recipe: Recipe,
    stored: tuple[StoredTensor, ...],
    regime: Regime,
    *,
    cuda_kernels: bool = True,
    names: bool = False,
) -> Program:
    """Run forward, loss and backward of one micro-batch.

    Raises:
        KeyError: if the family is not known; callers ask `FAMILIES` first.
    """
    step = _Step(inventory, recipe, stored, regime, cuda_kernels, names)
    step.run()
    return _program(step, stored)


def run_prefill(inventory: Inventory, recipe: Recipe, stored: tuple[StoredTensor, ...], regime: Regime, *, names: bool = False) -> Program:
    """Run the prompt through the model, keeping keys and values, and look at the last position's logits.

    Source: transformers, generation/utils.py, _sample: `logits_to_keep=1`, then a float32 copy of the last logits.
    """
    step = _Step(inventory, recipe, stored, regime, cuda_kernels=True, names=names)
    step.prefill()
    return _program(step, stored)


def _program(step: "_Step", stored: tuple[StoredTensor, ...]) -> Program:
    recast = step.tape.recast
    return Program(
        peaks={phase: tuple(kept) for phase, kept in step.tape.peaks.items()},
        kernels=frozenset(step.tape.kernels),
        weights_growth_bytes=sum(
            t.num_copies * (allocated(t.num_elements * recast[t.pattern].itemsize) - allocated(t.raw_bytes))
            for t in stored
            if t.pattern in recast
        ),
    )


class _Step:
    def __init__(
        self, inventory: Inventory, recipe: Recipe, stored: tuple[StoredTensor, ...], regime: Regime, cuda_kernels: bool, names: bool
    ) -> None:
        self.inventory = inventory
        self.recipe = recipe
        self.training = training = recipe.training
        self.regime = regime
        self.family: Family = FAMILIES[inventory.model_type]
        self.cache: list[Value] | None = None if training is not None else []
        """Keys and values of all layers, in inference."""
        hands_out = training is not None and recipe.stack.hands_out_key_values_in_training(inventory.model_type)
        self.handed_out: list[Value] | None = [] if hands_out else None
        """What the layers return beside the hidden states, held until the loss is there."""
        self.handed_out_by_copies: list[tuple[Held, int]] = []
        self.tape = Tape(
            autocast_dtype=training.autocast_dtype if training is not None else None,
            accumulating=training is not None and training.gradient_accumulation_steps > 1,
            cuda_kernels=cuda_kernels,
            names=names,
        )
        self.layers, self.outside = layer_tensors(inventory, stored)
        decoder = (inventory.layers_prefix or "").rpartition(".")[0]
        beside = {name.removeprefix(f"{decoder}."): tensor for name, tensor in self.outside.items()}
        padded = needs_mask(recipe)
        self.frame = Frame(
            tape=self.tape,
            modules=Modules(self.tape, "", beside, recipe),
            config=inventory.config,
            attention=recipe.attention,
            masked=padded,
            sliding_masked=padded or regime.beyond_window,
        )

    def run(self) -> None:
        tape = self.tape
        with tape.recording():
            loss = self._forward()
        tape.enter(Phase.BACKWARD)
        if isinstance(loss.node, Node):
            tape.backward(loss.node, tape.new(Extent(1), DType.FLOAT32))
        tape.note_peak()
        tape.phase = Phase.OPTIMIZER_STEP
        del loss

    def prefill(self) -> None:
        tape = self.tape
        tape.phase = Phase.PREFILL
        hidden = self.hidden_states()
        width = self.frame.width
        head = self.inventory.output_embedding
        assert head is not None
        last = Value(tape, Extent(width, 1, 0), hidden.dtype, hidden.storage)
        logits = label_logits(Modules(tape, "", self._head_tensors(head), self.recipe).linear(head, last))
        copy = tape.new(logits.extent, DType.FLOAT32, Item.LOGITS)
        tape.note_peak()
        del copy, logits, last, hidden

    def _forward(self) -> Value:
        """The model's forward under autocast; accelerate then turns the returned logits into float32.

        Source: accelerate, utils/operations.py, convert_outputs_to_fp32.
        """
        tape = self.tape
        with tape.autocasting():
            loss, logits = self._model()
        if tape.autocast_dtype is not None and logits is not None and logits.dtype is not DType.FLOAT32:
            converted = tape.new(logits.extent, DType.FLOAT32, Item.LOGITS)
            del converted
        self._drop_outputs()
        return loss

    def _drop_outputs(self) -> None:
        """The model's outputs go before the backward pass.

        Source: transformers, trainer.py, compute_loss.
        """
        if self.handed_out is not None:
            self.handed_out.clear()
        for (item, size), number in self.handed_out_by_copies:
            self.tape.shrink(item, size, number)

    def _model(self) -> tuple[Value, Value | None]:
        hidden = self.hidden_states()
        self.tape.enter(Phase.LOSS)
        return self._loss(hidden)

    def hidden_states(self) -> Value:
        """Embedding, layers and final norm."""
        frame, family = self.frame, self.family
        embedded = family.embed(frame)  # stays a local of the model's forward to its end
        self._require_input_gradients(embedded)
        if family.scales_embeddings:
            embedded = scale(embedded)
        positions = self.tape.new(Extent(1, 0, 1), DType.INT64)
        around = family.surround(frame, embedded)
        beside: list[Value] = []
        hidden = family.finish(frame, self._run_layers(family.enter(frame, embedded, beside), around))
        del embedded, around, positions, beside
        return hidden

    def _require_input_gradients(self, hidden: Value) -> None:
        """With adapters and checkpointing the embedding's output is made a leaf that asks for a gradient.

        Source: transformers, modeling_utils.py, enable_input_require_grads.
        """
        training = self.training
        if hidden.node is None and self.recipe.adapter is not None and training is not None and training.gradient_checkpointing:
            hidden.node = _InputGradient(self.tape, hidden)

    def _loss(self, hidden: Value) -> tuple[Value, Value | None]:
        config = self.inventory.config
        vocabulary = config["vocab_size"]
        head = self.inventory.output_embedding
        assert isinstance(vocabulary, int)
        assert head is not None
        modules = Modules(self.tape, "", self._head_tensors(head), self.recipe)
        assert self.training is not None
        if self.training.loss is not Loss.STOCK:
            return self._fused_loss(hidden, modules.parameter(f"{head}.weight"), vocabulary), None
        stack = self.recipe.stack
        loss, logits = stock_loss(
            modules,
            head,
            hidden,
            vocabulary,
            shifts_logits=stack.loss_shifts_logits,
            softcap=isinstance(config.get("final_logit_softcapping"), (int, float)),
            scaled=self.family.scales_logits,
            keeps_half=stack.loss_keeps_half_logits,
            upcasts=not stack.loss_leaves_half_logits(self.inventory.model_type),
        )
        return loss, logits

    def _fused_loss(self, hidden: Value, weight: Parameter, vocabulary: int) -> Value:
        assert self.training is not None
        width = self.frame.width
        match self.training.loss:
            case Loss.TRL_TILED:
                return tiled_loss(hidden, weight, width, self.regime.tile_rows)
            case Loss.TRL_CHUNKED:
                return chunked_loss(hidden, weight, width, vocabulary)
            case Loss.LIGER:
                return liger_loss(hidden, weight, width, self.regime.chunk_rows)
            case Loss.STOCK:
                raise AssertionError("the stock loss holds all logits")

    def _head_tensors(self, head: str) -> dict[str, StoredTensor]:
        """A tied head works on the embedding's weight."""
        tensors = dict(self.outside)
        if f"{head}.weight" not in tensors:
            tensors[f"{head}.weight"] = tensors[f"{self.inventory.input_embedding}.weight"]
        return tensors

    # -- layers ---------------------------------------------------------------------------------------------------------------------

    def _run_layers(self, hidden: Value, around: Surroundings) -> Value:
        kinds = [self._kind(i) for i in range(self.inventory.num_layers)]
        last = {kind: i for i, kind in enumerate(kinds)}
        seen: dict[object, _Copy] = {}
        for index, kind in enumerate(kinds):
            entry = (kind, hidden.dtype, hidden.requires_grad)
            if entry in seen and index != last[kind]:
                hidden = seen[entry].stand_in(self.tape, hidden)
                self.handed_out_by_copies += seen[entry].until_outputs_go
                continue
            before = Counter(self.tape.live)
            self.tape.take_stash()
            cached = set(self.tape.autocast_cache)
            num_handed_out = len(self.handed_out or ())
            hidden = self._run_layer(index, hidden, around)
            # The first layer is no model for the others: the embedding that enters it outlives it.
            if index > 0 and entry not in seen:
                seen[entry] = _Copy.of(self.tape, before, cached, self.layers[index], (self.handed_out or [])[num_handed_out:])
        return hidden

    def _kind(self, index: int) -> object:
        tensors = self.layers[index]
        signature = tuple((name, t.shape, t.dtype, t.trainable, t.quantization) for name, t in tensors.items())
        variant = self.family.variant(self.inventory.config, index)
        return signature, variant, self._layer_type(index), self._is_checkpointed(index)

    def _layer_type(self, index: int) -> str:
        types = self.inventory.config.get("layer_types")
        if isinstance(types, (list, tuple)) and index < len(types):
            return str(types[index])
        return "sliding_attention" if self.inventory.config.get("sliding_window") else "full_attention"

    def _is_checkpointed(self, index: int) -> bool:
        training = self.training
        return training is not None and training.gradient_checkpointing and index % training.checkpoint_every_n_layers == 0

    def _run_layer(self, index: int, hidden: Value, around: Surroundings) -> Value:
        layer = Layer(
            modules=Modules(self.tape, f"{self.inventory.layers_prefix}.{index}.", self.layers[index], self.recipe),
            config=self.inventory.config,
            index=index,
            model_type=self.inventory.model_type,
            attention=self.recipe.attention,
            layer_type=self._layer_type(index),
            cache=self.cache,
            handed_out=self.handed_out if self.tape.phase is Phase.FORWARD else None,
        )

        own = replace(around, others=())

        def function(x: Value) -> Value:
            return self.family.layer(layer, x, own)

        if self.training is not None and self._is_checkpointed(index):
            return self.tape.checkpoint(function, hidden, self.training.use_reentrant)
        return function(hidden)


class _InputGradient(AccumulateGrad):
    """The embedding's output as a leaf: its gradient stays until the graph goes."""

    __slots__ = ("variable",)

    def __init__(self, tape: Tape, hidden: Value) -> None:
        self.tape = tape
        self.name = "(input embeddings)"
        self.dtype = hidden.dtype
        self.count = hidden.extent.coefficient
        # torch's AccumulateGrad owns its variable.
        self.variable = hidden.view()

    def receive(self, gradient: Value) -> None:
        self.tape.gradients.setdefault(self.name, gradient)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copy:
    """What one layer adds to what is alive, so that its twins need not be run."""

    kept: tuple[tuple[Held, int], ...]
    """Alive after the layer and not before it."""
    until_graph_goes: tuple[tuple[Held, int], ...]
    """The part of it that the backward pass does not free."""
    until_autocast_ends: tuple[tuple[Held, int], ...]
    until_outputs_go: tuple[tuple[Held, int], ...]
    gradients: tuple[Extent, ...]

    @classmethod
    def of(
        cls,
        tape: Tape,
        before: Counter[Held],
        cached: set[str],
        tensors: Mapping[str, StoredTensor],
        handed_out: list[Value],
    ) -> "_Copy":
        kept = Counter(tape.live)
        kept.subtract(before)
        casts: Counter[Held] = Counter()
        for name in tape.autocast_cache.keys() - cached:
            storage = tape.autocast_cache[name].storage
            assert storage is not None
            if storage.item is Item.TEMPORARY:  # nobody saved it: biases, and everything in a checkpointed layer
                casts[storage.item, storage.size] += 1
        kept.subtract(casts)
        storages = [v.storage for v in handed_out if v.storage is not None]
        outputs = Counter((s.item, s.size) for s in storages if s.item is Item.TEMPORARY)
        kept.subtract(outputs)
        gradients = [Extent(t.num_elements * t.dtype.itemsize) for t in tensors.values() if t.trainable]
        return cls(
            kept=tuple((held, n) for held, n in kept.items() if n),
            until_graph_goes=tape.take_stash(),
            until_autocast_ends=tuple(casts.items()),
            until_outputs_go=tuple(outputs.items()),
            gradients=() if tape.accumulating else tuple(gradients),
        )

    def stand_in(self, tape: Tape, hidden: Value) -> Value:
        """Take the place of one more layer like this one."""
        for (item, size), number in self.kept:
            tape.grow(item, size, number)
        for (item, size), number in self.until_autocast_ends:
            tape.grow(item, size, number)
            tape.leaving_autocast.append((item, size, number))
        for (item, size), number in self.until_outputs_go:
            tape.grow(item, size, number)

        def backward(node: Node, gradient: Value) -> Gradients:
            stay = dict(self.until_graph_goes)
            for held, number in self.kept:
                tape.shrink(*held, number - stay.get(held, 0))
            for size in self.gradients:
                tape.grow(Item.GRADIENTS, size)
            return [gradient.view()]

        node = tape.node([hidden], backward)
        return Value(tape, hidden.extent, hidden.dtype, hidden.storage, node)


def needs_mask(recipe: Recipe) -> bool:
    """Whether attention needs a mask beyond the causal one: for padding, or to tell samples in one row apart where the kernel does not.

    Source: transformers, masking_utils.py, _preprocess_mask_arguments and find_packed_sequence_indices.
    """
    training = recipe.training
    if training is not None:
        by_kernel = recipe.attention in (Attention.FLASH_ATTENTION_2, Attention.FLASH_ATTENTION_3)
        return training.padded or (training.flattened and not by_kernel and recipe.stack.masks_packed_samples)
    return recipe.inference is not None and recipe.inference.padded


def regime_of(recipe: Recipe, inventory: Inventory) -> Regime:
    """Which pieces of the program the batch's size selects.

    Source: transformers, masking_utils.py, _ignore_causal_mask_sdpa: up to the window's length the causal flag alone is enough.
    """
    training, inference = recipe.training, recipe.inference
    length = training.shape[1] if training is not None else inference.prompt_length if inference is not None else 0
    window = inventory.config.get("sliding_window")
    return Regime(
        beyond_window=isinstance(window, int) and recipe.attention is Attention.SDPA and length >= window,
        tile_rows=_tile_rows(training),
        chunk_rows=_chunk_rows(training, inventory),
    )


def _tile_rows(training: Training | None) -> int | None:
    if training is None or training.loss is not Loss.TRL_TILED:
        return None
    return TILE_ROWS if training.micro_batch_size * training.sequence_length >= TILE_ROWS else None


def _chunk_rows(training: Training | None, inventory: Inventory) -> int:
    if training is None or training.loss is not Loss.LIGER:
        return 0
    vocabulary, width = inventory.config["vocab_size"], inventory.config["hidden_size"]
    assert isinstance(vocabulary, int)
    assert isinstance(width, int)
    return liger_chunk_rows(training.micro_batch_size * training.sequence_length, vocabulary, width)
