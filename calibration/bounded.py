"""Published runs whose batches are known by their mean length alone: no figure to equal, but one that the estimate must not exceed.

The benchmark of PEFT pads every batch to its longest sample and publishes neither lengths nor peaks of single steps, but the mean over all
steps of `memory_reserved` right after the step, the number of samples and the number of tokens. A step's reserved memory is not below its
allocated peak, since nothing is given back between them; the peak is the largest of amounts that grow linearly with the length, hence
convex, so that the mean peak is not below the peak at the mean length; and padding only adds to the mean. The estimate of a batch of the
mean unpadded length, without padding, must therefore lie below the published mean. How far below says nothing.

Source: huggingface/peft, method_comparison/MetaMathQA/run.py, train (accelerator_memory_reserved_log, total_tokens, empty_cache after every
tenth step's reading).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from calibration.published import Row, stack_of
from estimator.dtypes import parse_dtype
from estimator.engine import estimate
from estimator.gpus import find_gpu
from estimator.recipe import Adapter, Attention, Recipe, Trainer, Training
from estimator.sources.resolve import resolve

# Before training starts the script reads what is reserved already, and takes it off: one segment of a small tensor.
# Source: huggingface/peft, method_comparison/MetaMathQA/utils.py, init_accelerator.
_TAKEN_OFF_BYTES = 2 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounded:
    """One run and its bound [bytes]."""

    row: Row
    mean_reserved: int
    predicted_peak: int
    """Allocated, for a batch of the mean length."""

    @property
    def holds(self) -> bool:
        return self.predicted_peak <= self.mean_reserved + _TAKEN_OFF_BYTES

    @property
    def share(self) -> float:
        """The estimate as a share of the published mean."""
        return self.predicted_peak / self.mean_reserved


def is_bounded(row: Row) -> bool:
    """Whether a row publishes what the bound is made of."""
    return "reserved_mean_bytes" in row.fields


def mean_length(row: Row) -> int:
    """Mean unpadded length [tokens], rounded down; the published count has one more token for every sample."""
    return int(row.fields["num_tokens"] // row.fields["num_samples"]) - 1


def recipe_of(row: Row) -> Recipe:
    """The run at its mean length: a plain loop of AdamW without autocast and checkpointing."""
    fields = row.fields
    rank = fields.get("rank")
    adapter = None
    if rank is not None:
        adapter = Adapter(r=rank, target_modules=tuple(fields["targets"].split(",")), use_dora=fields["method"] == "dora")
    return Recipe(
        dtype=parse_dtype(fields["weight_dtype"]),
        attention=Attention.SDPA,
        adapter=adapter,
        trainer=Trainer.TRANSFORMERS,
        training=Training(
            micro_batch_size=fields["batch"], sequence_length=mean_length(row), optimizer="adamw_torch", gradient_checkpointing=False
        ),
        compute_capability=find_gpu("l40s").compute_capability,
        stack=stack_of(row.versions),
    )


def bounds(published: Iterable[Row]) -> tuple[Bounded, ...]:
    """Every row that has a bound, beside its estimate."""
    return tuple(
        Bounded(
            row=row,
            mean_reserved=row.fields["reserved_mean_bytes"],
            predicted_peak=estimate(resolve(row.fields["model"]).inventory, recipe_of(row)).peak.allocated_bytes,
        )
        for row in published
        if is_bounded(row)
    )
