"""The trainer's loop over fake tensors, watched from the first weight to the end of the last step."""

import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from estimator.fused_loss import TILE_COLUMNS
from estimator.introspect.cuda_paths import KERNELS, cuda_paths
from estimator.introspect.inventory import attention_tables
from estimator.introspect.trace import masks
from estimator.introspect.trace.attention import CudaAttention, flash_attention_forward, flash_kernel
from estimator.introspect.trace.errors import NeedsValuesError, NotTraceableError, RefusedError
from estimator.introspect.trace.experts import EXPERT_KERNELS
from estimator.introspect.trace.known import Values
from estimator.introspect.trace.model import TracedModel
from estimator.introspect.trace.objectives import Batch, Task, accelerated, task, tokens
from estimator.introspect.trace.routing import Routing
from estimator.introspect.trace.update import UPDATE_KERNELS, cuda_update, make_optimizer, tensors_of
from estimator.introspect.trace.watch import Watch
from estimator.phases import Item, Phase, Segment
from estimator.recipe import Loss, ObjectiveKind, Recipe
from estimator.scoring import Rows, rows_of
from estimator.timeline import Timeline

_REFERENCE = "ref_model."
_FLASH = ("flash_attention_2", "flash_attention_3")


def _never(_: object) -> bool:
    # a function and no mock, which would keep the tensors it was called with
    return False


@contextmanager
def cuda_program(attention: CudaAttention | None) -> Iterator[None]:
    """Everything that makes libraries take the paths they take on a card.

    Args:
        attention: of the card; None leaves it to the CPU's kernel, for comparison with a real run on the CPU.
    """
    with ExitStack() as stack:
        stack.enter_context(cuda_paths(attention=attention))
        for name in _FLASH:
            before = ALL_ATTENTION_FUNCTIONS._global_mapping.get(name)
            ALL_ATTENTION_FUNCTIONS._global_mapping[name] = flash_attention_forward
            stack.callback(ALL_ATTENTION_FUNCTIONS._global_mapping.__setitem__, name, before)
        for name, module in list(sys.modules.items()):
            # imported there only where flash-attn is installed
            if name.startswith("transformers.models.") and attention_tables(module):
                stack.enter_context(mock.patch.object(module, "_flash_attention_forward", flash_kernel, create=True))
        # transformers asks nothing of masks whose values a tracer does not have; these values are known, see `known`
        stack.enter_context(mock.patch.object(transformers.utils.import_utils, "is_fake_tensor", _never))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def run(
    model: TracedModel,
    recipe: Recipe,
    mode: FakeTensorMode,
    *,
    with_update: bool = True,
    num_steps: int = 1,
    values: Values | None = None,
    longest_loop: int | None = None,
    rows: Rows | None = None,
    reference: TracedModel | None = None,
    kinds: Sequence[int] | None = None,
) -> Timeline:
    """Watch whole optimizer steps.

    Args:
        values: told what the run looks at; routing is balanced if None.
        longest_loop: see `Watch.longest_loop`.
        rows: the passes of a fused loss; those of the recipe's size if None.
        reference: the second model of an objective that has one.
        kinds: of the layers, where a few stand for all: those of one kind are to be given tensors of the same shapes.
        with_update: whether the optimizer runs too.
        num_steps: optimizer steps; its states exist from the second on.

    Raises:
        NotTraceableError: if the program looks at what has no content, loops for longer, or layers of one kind are given tensors of other
            shapes, as where each is handed what the ones before it made.
    """
    assert recipe.training is not None
    config = model.base.config.get_text_config()
    if rows is None:
        rows = rows_of(recipe.training, config.to_dict())
    loop = _Loop(model, recipe, mode, values or Values(Routing.BALANCED), reference)
    loop.watch.longest_loop = longest_loop
    with loop.guarded(), task(model, recipe, rows, reference=reference) as work:
        loop.run(work, num_steps, with_update=with_update)
    if kinds is not None and len({(kind, loop.given.get(position)) for position, kind in enumerate(kinds)}) > len(set(kinds)):
        raise NotTraceableError("layers of one kind are given tensors of other shapes")
    is_tiled = recipe.training.loss is Loss.TRL_TILED
    return loop.watch.timeline(getattr(config, "vocab_size", None), TILE_COLUMNS if is_tiled else None)


def warm_up(model: TracedModel, recipe: Recipe, mode: FakeTensorMode) -> None:
    """One short forward pass, so that what happens once is over: biases cast in place to the type they are used in.

    Source: bitsandbytes, nn/modules.py, Linear4bit.forward.

    Raises:
        NotTraceableError: if the program looks at what has no content.
    """
    if recipe.quantization is not None:
        loop = _Loop(model, recipe, mode, Values(Routing.BALANCED))
        with loop.guarded(), mode, loop.watch, torch.no_grad():
            assert recipe.training is not None
            accelerated(model.whole.__call__, recipe.training)(input_ids=tokens(model, 1, 4))


class _Loop:
    def __init__(
        self, model: TracedModel, recipe: Recipe, mode: FakeTensorMode, values: Values, reference: TracedModel | None = None
    ) -> None:
        self.model = model
        self.reference = reference
        self.recipe = recipe
        self.mode = mode
        self.watch = Watch({**KERNELS, **UPDATE_KERNELS, **EXPERT_KERNELS, **masks.KERNELS}, values)
        self.trained = model.trained
        self.names = {id(module): name for name, module in model.base.named_modules()}
        if reference is not None:
            self.names |= {id(module): f"{_REFERENCE}{name}" for name, module in reference.base.named_modules()}
        self.optimizer: Any = None
        self.given: dict[int, tuple[torch.Size, ...]] = {}
        """Shapes of the tensors that each layer was first called with."""

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Whatever ends the program is told with the module that was running."""
        try:
            yield
        except (MemoryError, RefusedError):
            raise
        except NotTraceableError as error:
            raise type(error)(f"{self._where()}: {error.args[0]}") from error
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise NeedsValuesError(f"{self._where()}: sizes depend on values ({error})") from error
        except Exception as error:  # the border to a model's own code
            raise NotTraceableError(f"{self._where()}: {type(error).__name__}: {str(error)[:300]}") from error

    def _where(self) -> str:
        return self.watch.deepest or "outside the model"

    def run(self, work: Task, num_steps: int, *, with_update: bool) -> None:
        training = self.recipe.training
        assert training is not None
        watch = self.watch
        if with_update:
            self.optimizer = make_optimizer(self.model.whole, self.recipe)
        gc.disable()  # cycles must not be freed at moments of Python's choosing
        try:
            with self.mode, ExitStack() as stack:
                watch.begin(Phase.LOAD.value)
                if with_update:
                    stack.enter_context(cuda_update(self._paged))
                for name, tensor in self._stored():
                    watch.take_in(tensor, _stored_item(name, tensor), name)
                stack.enter_context(watch)
                for hook in self._hooks():
                    stack.callback(hook.remove)
                for _ in range(num_steps):
                    batches = [self._named(work.inputs()) for _ in range(training.gradient_accumulation_steps)]
                    for batch in batches:
                        self._micro_batch(work, batch, training.gradient_accumulation_steps)
                    if with_update:
                        self._update()
                    else:
                        watch.begin(Phase.OPTIMIZER_STEP.value)
                    for parameter in self.trained:
                        parameter.grad = None
        finally:
            gc.enable()

    def _stored(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.stored.items()
        if self.reference is not None:
            yield from ((f"{_REFERENCE}{name}", tensor) for name, tensor in self.reference.stored.items())

    def _named(self, batch: Batch) -> Batch:
        for name, tensor in batch.items():
            if isinstance(tensor, Tensor):
                self.watch.call(tensor, Item.ACTIVATIONS.value)
                self.watch.rename(tensor, name)
        return batch

    def _micro_batch(self, work: Task, batch: Batch, accumulation: int) -> None:
        self.watch.begin(Phase.FORWARD.value)
        value = work.loss(batch) / accumulation
        self.watch.settle()
        self.watch.begin(Phase.BACKWARD.value)
        value.backward()
        for parameter in self.trained:
            if parameter.grad is not None:
                self.watch.call(parameter.grad, Item.GRADIENTS.value)

    def _update(self) -> None:
        self.watch.begin(Phase.OPTIMIZER_STEP.value)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=True)
        with self.watch.host_scalars():
            self.optimizer.step()
        for states in self.optimizer.state.values():
            for state in states.values():
                for part in tensors_of(state):
                    self.watch.call(part, Item.OPTIMIZER_STATES.value)

    def _paged(self, *shape: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        with self.watch.elsewhere():
            tensor = torch.empty(shape, dtype=dtype)
        tensor.is_paged = True  # type: ignore[attr-defined]
        return tensor

    # -- where the program is -----------------------------------------------------------------------------------------------------------

    def _hooks(self) -> Iterator[Any]:
        watch = self.watch

        def enter(module: nn.Module, _: Any) -> None:
            watch.enter(self.names.get(id(module), ""))

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            watch.leave()
            if not watch.names and watch.phase == Phase.BACKWARD:
                watch.settle()

        yield nn.modules.module.register_module_forward_pre_hook(enter)
        yield nn.modules.module.register_module_forward_hook(leave, always_call=True)
        for model in filter(None, (self.model, self.reference)):
            for position, layer in enumerate(model.layers):
                yield layer.register_forward_pre_hook(self._layer_enters(position), with_kwargs=True)
                yield layer.register_forward_hook(self._layer_leaves(position))
        yield self._loss_begins()

    def _loss_begins(self) -> Any:
        """The loss begins with the head, or where there are no logits with the end of the layers; a reference's pass is no beginning."""

        def begin(*_: Any) -> None:
            if torch.is_grad_enabled() and self.watch.phase == Phase.FORWARD:
                self.watch.begin(Phase.LOSS.value)

        training = self.recipe.training
        assert training is not None
        head = self.model.base.get_output_embeddings()
        if training.loss is Loss.STOCK and training.objective.kind is ObjectiveKind.SFT and head is not None:
            return head.register_forward_pre_hook(begin)
        return self.model.base.base_model.register_forward_hook(begin)

    def _layer_enters(self, position: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.watch.mark(Segment.FORWARD, position)
            self.given.setdefault(position, tuple(x.shape for x in (*inputs, *named.values()) if isinstance(x, Tensor)))
            hidden = inputs[0] if inputs else named.get("hidden_states")
            if position == 0 and isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _: self.watch.mark(Segment.OUTSIDE))
            training = self.recipe.training
            if isinstance(hidden, Tensor) and training is not None and getattr(_, "gradient_checkpointing", False):
                self.watch.call(hidden, Item.CHECKPOINTS.value)

        return hook

    def _layer_leaves(self, position: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _: self.watch.mark(Segment.BACKWARD, position))
            if position == len(self.model.layers) - 1:
                self.watch.leave_layers()

        return hook


def _stored_item(name: str, tensor: Tensor) -> str:
    last = name.rpartition(".")[2]
    if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
        return Item.ADAPTER_WEIGHTS.value
    if last in ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "offset", "SCB"):
        return Item.QUANTIZATION_STATE.value
    return Item.WEIGHTS.value if isinstance(tensor, nn.Parameter) else Item.BUFFERS.value
