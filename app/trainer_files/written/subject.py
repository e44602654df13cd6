"""The run to write, with every default resolved."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.request import InlineModel, Request
from estimator.dtypes import DType
from estimator.errors import RequestError
from estimator.parallelism.options import Strategy
from estimator.recipe import Adapter, Loss, ObjectiveKind, Quantization, Recipe, Training

# What no formula asks for; the user's own stands above them.
LEARNING_RATE = {True: 2e-4, False: 1e-5}
PLACEHOLDER = "YOUR_DATASET"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A training run."""

    model: str
    revision: str | None
    request: Request
    recipe: Recipe
    lora_alpha: int
    """Of the request, or twice the rank: it has no bearing on memory."""

    @staticmethod
    def of(request: Request, recipe: Recipe, payload: Mapping[str, Any]) -> "Subject":
        """The run of a request.

        Raises:
            RequestError: if it is none that can be written.
        """
        if isinstance(request.model, InlineModel):
            raise RequestError("model: a run is written with the id of its model, not with a config; accepted: a Hub id", field="model")
        if recipe.training is None:
            raise RequestError("training: only training runs are written", field="training")
        if recipe.training.objective.kind is not ObjectiveKind.SFT:
            raise RequestError(f"task.kind: {recipe.training.objective.kind.value!r} is not written; accepted: sft", field="task.kind")
        peft = payload.get("peft")
        alpha = peft.get("lora_alpha") if isinstance(peft, Mapping) else None
        rank = recipe.adapter.r if recipe.adapter is not None else 0
        return Subject(
            model=request.model,
            revision=request.revision,
            request=request,
            recipe=recipe,
            lora_alpha=alpha if isinstance(alpha, int) and not isinstance(alpha, bool) else 2 * rank,
        )

    @property
    def training(self) -> Training:
        assert self.recipe.training is not None
        return self.recipe.training

    @property
    def adapter(self) -> Adapter | None:
        return self.recipe.adapter

    @property
    def quantization(self) -> Quantization | None:
        return self.recipe.quantization

    @property
    def precision(self) -> tuple[bool, bool]:
        """`bf16` and `fp16`."""
        dtype = self.training.autocast_dtype
        return dtype is DType.BFLOAT16, dtype is DType.FLOAT16

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATE[self.adapter is not None]

    @property
    def target_modules(self) -> list[str] | str:
        """Names, `all-linear` or a pattern.

        Raises:
            RequestError: where PEFT's table decides.
        """
        assert self.adapter is not None
        modules = self.adapter.target_modules
        if modules is None:
            raise RequestError("peft.target_modules: is needed to write a run; accepted: names, or all-linear", field="peft.target_modules")
        return modules if isinstance(modules, str) else list(modules)

    def refuse(self, format_: str, **fields: tuple[object, object]) -> None:
        """Refuse what a format has no words for.

        Args:
            format_: as messages name it.
            fields: by its path (`__` for dots): what the run has, and the one value that the format stands for.

        Raises:
            RequestError: if the two differ.
        """
        for name, (value, only) in fields.items():
            if value != only:
                path = name.replace("__", ".")
                raise RequestError(f"{path}: {value!r} cannot be written for {format_}; accepted: {only!r}", field=path)

    def refuse_adapter(self, format_: str) -> None:
        """Refuse what only a LoraConfig has words for."""
        adapter = self.adapter
        if adapter is not None:
            self.refuse(
                format_,
                peft__exclude_modules=(adapter.exclude_modules, None),
                peft__bias=(adapter.bias, "none"),
                peft__lora_bias=(adapter.lora_bias, False),
                peft__trainable_token_indices=(adapter.trainable_token_indices, ()),
            )

    def refuse_training(self, format_: str, *, losses: tuple[Loss, ...]) -> None:
        """Refuse losses and placements that a format does not have."""
        if self.training.loss not in losses:
            accepted = ", ".join(loss.value for loss in losses)
            raise RequestError(
                f"trainer: the loss of this run, {self.training.loss.value}, cannot be written for {format_}; accepted: {accepted}; "
                "trainer: transformers has the first",
                field="trainer",
            )
        self.refuse(
            format_,
            training__gradient_checkpointing_kwargs__every_n_layers=(self.training.checkpoint_every_n_layers, 1),
            hardware__strategy=(self.recipe.parallel.strategy is Strategy.DEVICE_MAP, False),
        )
