"""One training step on the tape: embedding, layers, loss and the way back; or the two passes of generation.

Layers that are alike are run once at each end of their row; those between are taken as copies of the first, since what they keep is the
same and what is alive changes by a constant from one to the next.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from estimator.blocks.families import FAMILIES, Family, Frame
from estimator.blocks.layer import Layer, Surroundings
from estimator.dtypes import DType
from estimator.extent import Extent, Snapshot
from estimator.fused_loss import Head, chunked_loss, liger_loss, tiled_loss
from estimator.inventory import Inventory
from estimator.kernels import Kernel
from estimator.kv_cache import KEYS, Span, Spans, decode_spans, layer_types, num_keys, prefill_spans
from estimator.log import Log
from estimator.loss import head_logits, label_logits, stock_loss
from estimator.modules import Modules
from estimator.operators import cast, scale
from estimator.phases import Item, Phase
from estimator.recipe import Attention, CacheKind, Loss, Recipe, Trainer
from estimator.repetition import IrregularError, repeated, sample
from estimator.schedule import MicroBatch, Schedule, told_apart
from estimator.scoring import Rows, rows_of
from estimator.storage import StoredTensor
from estimator.tape import AccumulateGrad, Gradients, Held, Node, Tape, Value
from estimator.units import allocated


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """What the batch's size decides about the program, beside the sizes of its tensors."""

    beyond_window: bool
    """Whether sequences are longer than the sliding window, in training."""
    rows: Rows = field(default_factory=Rows)
    """The passes of a fused loss."""
    prefill: Spans | None = None
    """How far caches reach while the prompt is read."""
    decode: Spans | None = None
    """The same for one new token; None where generation ends with the prompt."""
    one_sequence: bool = False
    """Whether the batch is one sequence, where that spares copies; see `copies_of_several`."""
    few_rows: bool = False
    """Whether one token of each sequence makes so few rows that 4-bit weights are not unpacked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The instants at which each phase can be largest, beside what is stored between steps."""

    peaks: Mapping[Phase, tuple[Snapshot, ...]]
    kernels: frozenset[Kernel] = frozenset()
    weights_growth_bytes: int = 0
    """What stored weights gain, once and for good, from types that the first forward pass gives them [bytes]."""
    schedule: Schedule | None = None
    """Every allocation, where a trace saw it; the tape's is made when asked for, see `schedule_step`."""


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
    keeps_layer_inputs: bool = False,
) -> Program:
    """Run forward, loss and backward of one micro-batch.

    Args:
        keeps_layer_inputs: see `Tape.keeps_layer_inputs`.

    Raises:
        KeyError: if the family is not known; callers ask `FAMILIES` first.
    """
    step = _Step(inventory, recipe, stored, regime, cuda_kernels, names, keeps_layer_inputs=keeps_layer_inputs)
    step.run()
    return _program(step, stored)


def schedule_step(inventory: Inventory, recipe: Recipe, stored: tuple[StoredTensor, ...], regime: Regime) -> Schedule:
    """The step of every layer, with what is made and released, one storage after the other. Layers that repeat are run a few times.

    Raises:
        as `run_step`.
    """
    training = recipe.training
    assert training is not None
    first = replace(recipe, training=replace(training, gradient_accumulation_steps=1))
    begun = _micro_batch(inventory, first, stored, regime)
    if training.gradient_accumulation_steps == 1:
        return Schedule(first=begun, later=begun)
    return Schedule(first=begun, later=_micro_batch(inventory, recipe, stored, regime))


def _micro_batch(inventory: Inventory, recipe: Recipe, stored: tuple[StoredTensor, ...], regime: Regime) -> MicroBatch:
    step = _Step(inventory, recipe, stored, regime, True, False, log=Log())
    picked = sample(tuple(step.kinds.values()))
    if picked is not None and len(step.kinds) == inventory.num_layers:
        step.kinds = {index: step.kinds[index] for index in picked.layers}
        log, kept = _logged(step)
        sizes, kinds = told_apart(log.sizes)
        with suppress(IrregularError):
            found = repeated(log, kinds, picked, kept)
            return MicroBatch.made_of(sizes, found.kinds, found.events, backward=found.backward, kept=found.kept)
        step = _Step(inventory, recipe, stored, regime, True, False, log=Log())
    log, kept = _logged(step)
    return MicroBatch.of(log.sizes, log.events, backward=log.backward, kept=kept)


def _logged(step: "_Step") -> tuple[Log, list[int]]:
    """What happened in a step, and which storages stay after it."""
    log = step.tape.log
    assert log is not None
    step.run()
    gradients = [v.storage for v in step.tape.gradients.values() if v.storage is not None]
    return log, [storage.number for storage in gradients if storage.item is Item.GRADIENTS]


def run_generation(
    inventory: Inventory,
    recipe: Recipe,
    stored: tuple[StoredTensor, ...],
    regime: Regime,
    *,
    cuda_kernels: bool = True,
    names: bool = False,
) -> Program:
    """Run the prompt through the model and take the first token from the last position's logits; then one token more.

    The second pass has S = 1; K stands for the keys it looks at (`Regime.decode`), and in the first pass for the length of a static cache.

    Source: transformers, generation/utils.py, _sample.
    """
    step = _Step(inventory, recipe, stored, regime, cuda_kernels, names, spans=regime.prefill)
    step.prefill()
    peaks = dict(step.tape.peaks)
    if regime.decode is not None:
        following = _Step(inventory, recipe, stored, regime, cuda_kernels, names, spans=regime.decode, rows=step.rows)
        following.decode()
        peaks |= following.tape.peaks
    return replace(_program(step, stored), peaks={phase: tuple(kept) for phase, kept in peaks.items()})


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


TokenRows = tuple[tuple[Extent, DType], ...]
"""One token's keys and values in one layer."""


class _Step:
    def __init__(
        self,
        inventory: Inventory,
        recipe: Recipe,
        stored: tuple[StoredTensor, ...],
        regime: Regime,
        cuda_kernels: bool,
        names: bool,
        spans: Spans | None = None,
        rows: Mapping[object, TokenRows] | None = None,
        log: Log | None = None,
        keeps_layer_inputs: bool = False,
    ) -> None:
        self.inventory = inventory
        self.recipe = recipe
        self.training = training = recipe.training
        self.regime = regime
        self.family: Family = FAMILIES[inventory.model_type]
        self.spans = spans
        self.rows: dict[object, TokenRows] = dict(rows or {})
        """Keys and values by kind of layer, in inference."""
        self.caches: list[list[Value]] = [[] for _ in range(inventory.num_layers)]
        """Keys and values of all layers, in inference."""
        self.keeps_cache = keeps_cache(inventory, recipe)
        hands_out = training is not None and recipe.stack.hands_out_key_values_in_training(inventory.model_type)
        self.handed_out: list[Value] | None = [] if hands_out or self.keeps_cache else None
        """What the layers return beside the hidden states, held until the loss is there."""
        self.handed_out_by_copies: list[tuple[Held, int]] = []
        self.tape = Tape(
            autocast_dtype=training.autocast_dtype if training is not None else None,
            accumulating=training is not None and training.gradient_accumulation_steps > 1,
            cuda_kernels=cuda_kernels,
            names=names,
            training=training is not None,
            keeps_layer_inputs=keeps_layer_inputs,
            log=log,
        )
        self.tape.one_sequence = regime.one_sequence
        self.layer_types = layer_types(inventory)
        self.layers, self.outside = layer_tensors(inventory, stored)
        # Layers that lie on another card have no tensors here.
        self.kinds = {i: self._kind(i) for i in range(inventory.num_layers) if self.layers[i]}
        """Of the layers to run: those of one kind do the same."""
        decoder = (inventory.layers_prefix or "").rpartition(".")[0]
        beside = {name.removeprefix(f"{decoder}."): tensor for name, tensor in self.outside.items()}
        padded = needs_mask(recipe)
        self.frame = Frame(
            tape=self.tape,
            modules=Modules(self.tape, "", beside, recipe),
            config=inventory.config,
            attention=recipe.attention,
            masked=padded or (spans is not None and spans.masks_all),
            sliding_masked=padded or (regime.beyond_window if spans is None else spans.sliding_masked),
            padded=padded,
            spans=spans,
        )

    def run(self) -> None:
        tape = self.tape
        with tape.recording():
            loss = self._forward()
        tape.enter(Phase.BACKWARD)
        if isinstance(loss.node, Node):
            tape.backward(loss.node, tape.new(Extent(1), DType.FLOAT32))
        tape.note_peak()
        tape.hooked.clear()
        tape.phase = Phase.OPTIMIZER_STEP
        del loss

    def prefill(self) -> None:
        tape = self.tape
        tape.phase = Phase.PREFILL
        sampled = self.sampled_from([])
        tape.note_peak()
        del sampled

    def decode(self) -> None:
        """One token: around the model, `generate` holds the float32 logits it chose it from, and ids and positions of all tokens so far.

        Source: transformers, generation/utils.py, _sample (`next_token_logits` stays a local) and _update_model_kwargs_for_generation.
        """
        tape, spans = self.tape, self.spans
        assert spans is not None
        tape.phase = Phase.DECODE
        tape.few_rows = self.regime.few_rows
        for index, cache in enumerate(self.caches):
            if self.layers[index]:
                cache += self.cached_before(index, spans)
        keeps_earlier = self.recipe.stack.keeps_earlier_cache(self.inventory.model_type)
        earlier = [list(cache) for cache in self.caches] if keeps_earlier else []
        held = self.held_by_generate()
        sampled = self.sampled_from([tape.new(Extent(1, 1), DType.INT64)])
        tape.note_peak()
        del held, sampled, earlier

    def cached_before(self, index: int, spans: Spans) -> list[Value]:
        """A layer's keys and values of the tokens before."""
        before = self._span(index, spans).before
        assert before is not None
        return [self.tape.new(row.times(before), dtype, Item.KV_CACHE) for row, dtype in self.rows[self._kind(index)]]

    def held_by_generate(self) -> list[Value]:
        """Ids and positions of all tokens, the mask if there is padding, and what the last token was chosen from."""
        tape = self.tape
        held = [tape.new(Extent(1, 1).times(KEYS), DType.INT64) for _ in range(3 if self.frame.padded else 2)]
        held.append(tape.new(Extent(self._vocabulary, 1), DType.FLOAT32, Item.LOGITS))
        held.append(tape.new(Extent(1, 1), DType.INT64))
        return held

    def sampled_from(self, beside: list[Value]) -> Value:
        """The last position's logits and, when the model has returned, their float32 copy.

        Args:
            beside: what the model is given beside the ids.
        """
        tape = self.tape
        unfinished = tape.new(Extent(1, 1), DType.INT64)
        ids = tape.new(Extent(1, 1, 1), DType.INT64)
        logits = self._last_logits()
        beside.clear()
        del ids
        copy = tape.new(Extent(self._vocabulary, 1), DType.FLOAT32, Item.LOGITS)
        del unfinished, logits
        return copy

    def _last_logits(self) -> Value:
        hidden = self.hidden_states()
        head = self.inventory.output_embedding
        assert head is not None
        stack, model_type = self.recipe.stack, self.inventory.model_type
        read = hidden
        if not stack.reads_all_logits(model_type):
            read = Value(self.tape, Extent(self.frame.width, 1, 0), hidden.dtype, hidden.storage)
        logits = head_logits(
            Modules(self.tape, "", self._head_tensors(head), self.recipe),
            head,
            read,
            scaled=self.family.scales_logits,
            softcap=self._softcaps_logits,
        )
        return label_logits(cast(logits, DType.FLOAT32)) if stack.upcasts_all_logits(model_type) else logits

    @property
    def _vocabulary(self) -> int:
        vocabulary = self.inventory.config["vocab_size"]
        assert isinstance(vocabulary, int)
        return vocabulary

    @property
    def _softcaps_logits(self) -> bool:
        return isinstance(self.inventory.config.get("final_logit_softcapping"), (int, float))

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
        positions = self.tape.new(Extent(1, 0, 1), DType.INT64) if self.spans is None else None
        around = family.surround(frame, embedded)
        if self.recipe.stack.layers_make_rotations(self.inventory.model_type):
            around = around.without_rotations()
        beside: list[Value] = []
        hidden = family.finish(frame, self._run_layers(family.enter(frame, embedded, beside), around))
        del embedded, around, positions, beside
        return hidden

    def _require_input_gradients(self, hidden: Value) -> None:
        """With adapters and checkpointing the embedding's output is made a leaf that asks for a gradient.

        Source: transformers, modeling_utils.py, enable_input_require_grads.
        """
        training = self.training
        if hidden.node is not None or self.recipe.adapter is None or training is None:
            return
        if training.gradient_checkpointing or self._comes_from_another_card:
            hidden.node = _InputGradient(self.tape, hidden)

    @property
    def _comes_from_another_card(self) -> bool:
        """Whether the embedding lies elsewhere: what enters the first layer here has a graph behind it."""
        embedding = self.outside.get(f"{self.inventory.input_embedding}.weight")
        return embedding is not None and embedding.num_elements == 0

    def _loss(self, hidden: Value) -> tuple[Value, Value | None]:
        vocabulary = self._vocabulary
        head = self.inventory.output_embedding
        assert head is not None
        modules = Modules(self.tape, "", self._head_tensors(head), self.recipe)
        assert self.training is not None
        if self.training.loss is not Loss.STOCK:
            weight, bias = modules.parameter(f"{head}.weight"), modules.optional(f"{head}.bias")
            return self._fused_loss(hidden, Head(weight=weight, bias=bias, width=self.frame.width, vocabulary=vocabulary)), None
        stack = self.recipe.stack
        loss, logits = stock_loss(
            modules,
            head,
            hidden,
            vocabulary,
            shifts_logits=stack.loss_shifts_logits,
            softcap=self._softcaps_logits,
            scaled=self.family.scales_logits,
            keeps_half=stack.loss_keeps_half_logits,
            upcasts=not stack.loss_leaves_half_logits(self.inventory.model_type),
        )
        return loss, logits

    def _fused_loss(self, hidden: Value, head: Head) -> Value:
        assert self.training is not None
        in_pass = self.regime.rows.in_pass
        match self.training.loss:
            case Loss.TRL_TILED:
                return tiled_loss(hidden, head, in_pass)
            case Loss.TRL_CHUNKED:
                # TRL knows a factor by Cohere's name alone.
                scaled = self.inventory.config.get("logit_scale", 1.0) != 1.0
                return chunked_loss(hidden, head, in_pass, scaled=scaled, softcap=self._softcaps_logits)
            case Loss.LIGER:
                return liger_loss(hidden, head, in_pass)
            case Loss.STOCK:
                raise AssertionError("the stock loss holds all logits")

    def _head_tensors(self, head: str) -> dict[str, StoredTensor]:
        """A tied head works on the embedding's weight, and on its trained tokens.

        Source: peft, utils/other.py, set_additional_trainable_modules.
        """
        tensors = dict(self.outside)
        if f"{head}.weight" in tensors:
            return tensors
        embedding = self.inventory.input_embedding
        for leaf in ("weight", "trainable_tokens_delta"):
            if f"{embedding}.{leaf}" in tensors:
                tensors[f"{head}.{leaf}"] = tensors[f"{embedding}.{leaf}"]
        return tensors

    # -- layers ---------------------------------------------------------------------------------------------------------------------

    def _run_layers(self, hidden: Value, around: Surroundings) -> Value:
        kinds, log = self.kinds, self.tape.log
        last = {kind: i for i, kind in kinds.items()}
        first = min(kinds, default=0)
        seen: dict[object, _Copy] = {}
        for index, kind in kinds.items():
            entry = (kind, hidden.dtype, hidden.requires_grad)
            if log is not None:
                log.enter_layer(index, self.tape.sequence)
            elif entry in seen and index != last[kind]:
                self.caches[index].clear()
                hidden = seen[entry].stand_in(self.tape, hidden)
                self.handed_out_by_copies += seen[entry].until_outputs_go
                continue
            before = Counter(self.tape.live)
            self.tape.take_stash()
            cached = set(self.tape.autocast_cache)
            num_handed_out = len(self.handed_out or ())
            hidden = self._run_layer(index, hidden, around)
            if self.spans is not None and kind not in self.rows:
                self.rows[kind] = self._rows(index)
            # The first layer is no model for the others: the embedding that enters it outlives it.
            if log is None and index > first and entry not in seen:
                seen[entry] = _Copy.of(self.tape, before, cached, self.layers[index], (self.handed_out or [])[num_handed_out:])
        if log is not None:
            log.leave_layers(self.tape.sequence)
        return hidden

    def _kind(self, index: int) -> object:
        tensors = self.layers[index]
        signature = tuple((name, t.shape, t.dtype, t.trainable, t.quantization) for name, t in tensors.items())
        variant = self.family.variant(self.inventory.config, index)
        return signature, variant, self.layer_types[index], self._is_checkpointed(index)

    def _rows(self, index: int) -> TokenRows:
        """What the layer stored, for one token."""
        assert self.spans is not None
        stored = self._span(index, self.spans).stored
        return tuple((Extent(x.extent.scaled(1, stored.coefficient).coefficient, 1), x.dtype) for x in self.caches[index])

    def _span(self, index: int, spans: Spans) -> Span:
        return spans.sliding if self.layer_types[index] == "sliding_attention" else spans.full

    def _is_checkpointed(self, index: int) -> bool:
        training = self.training
        return training is not None and training.gradient_checkpointing and index % training.checkpoint_every_n_layers == 0

    def _run_layer(self, index: int, hidden: Value, around: Surroundings) -> Value:
        spans = self.spans
        layer = Layer(
            modules=Modules(self.tape, f"{self.inventory.layers_prefix}.{index}.", self.layers[index], self.recipe),
            config=self.inventory.config,
            index=index,
            model_type=self.inventory.model_type,
            attention=self.recipe.attention,
            layer_type=self.layer_types[index],
            span=None if spans is None else self._span(index, spans),
            cache=None if spans is None else self.caches[index],
            decoding=spans is not None and spans.decoding,
            compiled=spans is not None and spans.decoding and self.tape.cuda_kernels and compiles_decoding(self.recipe),
            handed_out=self.handed_out if self.tape.phase is Phase.FORWARD else None,
            keeps_cache=self.keeps_cache,
        )

        # A checkpointed layer holds on to its arguments: those of its own kind alone.
        own = around.of(is_sliding=layer.layer_type == "sliding_attention")

        def function(x: Value) -> Value:
            return self.family.layer(layer, x, own.in_layer())

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
        for held in [held for held, number in kept.items() if held[0] is Item.KV_CACHE and number < 0]:
            del kept[held]  # the keys that were there before: a twin's are freed by its caller
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
            if tape.keeps_layer_inputs and gradient.storage is not None:
                stay |= {held: number for held, number in self.kept if held[0] is Item.CHECKPOINTS}
                tape.grow(gradient.storage.item, gradient.storage.size)
            for held, number in self.kept:
                tape.shrink(*held, number - stay.get(held, 0))
            for size in self.gradients:
                tape.grow(Item.GRADIENTS, size)
            return [gradient.view()]

        node = tape.node([hidden], backward)
        return Value(tape, hidden.extent, hidden.dtype, hidden.storage, node)


def compiles_decoding(recipe: Recipe) -> bool:
    """Whether `generate` compiles the passes of one token on its own, on CUDA.

    Source: transformers, generation/utils.py, _valid_auto_compile_criteria; quantizers/base.py, HfQuantizer.is_compileable.
    """
    inference = recipe.inference
    static = inference is not None and inference.cache is CacheKind.STATIC
    return static and recipe.stack.compiles_static_decoding and recipe.quantization is None


def keeps_cache(inventory: Inventory, recipe: Recipe) -> bool:
    """Whether keys and values are stored in training too, since nobody tells the decoder otherwise."""
    training = recipe.training
    if training is None or training.gradient_checkpointing or inventory.config.get("use_cache") is False:
        return False
    root, is_composite = (inventory.config.get(name) for name in ("root_model_type", "is_composite"))
    by_trl = recipe.trainer is Trainer.TRL
    return recipe.stack.keeps_cache_in_training(inventory.model_type, str(root), is_composite=bool(is_composite), by_trl=by_trl)


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
    """Which pieces of a training step the batch's size selects.

    Source: transformers, masking_utils.py, _ignore_causal_mask_sdpa: up to the window's length the causal flag alone is enough.
    """
    training = recipe.training
    length = training.shape[1] if training is not None else 0
    window = inventory.config.get("sliding_window")
    return Regime(
        beyond_window=isinstance(window, int) and recipe.attention is Attention.SDPA and length >= window,
        rows=Rows() if training is None else rows_of(training, inventory.config),
        one_sequence=training is not None and training.shape[0] == 1 and copies_of_several(recipe, inventory),
    )


def copies_of_several(recipe: Recipe, inventory: Inventory) -> bool:
    """Whether a pass copies what is only seen otherwise where there is one sequence: heads, for products of them one by one, and the
    logits without their last position.

    Attention is written out where it is asked for, and where sdpa finds no fused kernel: before compute capability 8.0, in float32, to
    which training without autocast can come from 16-bit weights too, and for Falcon's one key/value head under a mask.

    Source: torch, ATen/native/LinearAlgebra.cpp, matmul (expand, reshape and a batched product: the reshape is a view where heads alone
    are merged).
    """
    training = recipe.training
    if training is not None and training.loss is Loss.STOCK and recipe.stack.loss_shifts_logits:
        return True
    if recipe.attention is not Attention.SDPA:
        return recipe.attention is Attention.EAGER
    dtype = recipe.dtype if training is None else training.autocast_dtype or DType.FLOAT32
    return not dtype.is_half or recipe.compute_capability < (8, 0) or inventory.model_type == "falcon"


def generation_regimes(recipe: Recipe, inventory: Inventory) -> tuple[tuple[Regime, int], ...]:
    """The passes of one token in which most can be alive, the last and sometimes the first, each with the keys it looks at (K)."""
    inference = recipe.inference
    assert inference is not None
    prefill = prefill_spans(inventory, recipe, inference)
    passes = {first: num_keys(recipe, inference, first=first) for first in (True, False)}
    regimes = {
        first: Regime(
            beyond_window=False,
            prefill=prefill,
            decode=decode_spans(inventory, recipe, inference, first=first),
            few_rows=inference.batch_size <= recipe.stack.rows_of_fused_4bit,
            one_sequence=inference.batch_size == 1 and copies_of_several(recipe, inventory),
        )
        for first in passes
    }
    match inference.max_new_tokens:
        case 1:  # the prompt's last logits give it
            return ((replace(regimes[True], decode=None), passes[True]),)
        case 2:
            return ((regimes[True], passes[True]),)
        case _ if regimes[True] == regimes[False]:
            return ((regimes[False], passes[False]),)
        case _:
            return tuple((regimes[first], passes[first]) for first in (True, False))
