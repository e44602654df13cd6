"""How many positions get a probability, and in tiles of how many rows a fused loss goes through them.

Legend: B micro-batch, S sequence length, T = B·S tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from estimator.fused_loss import CHUNK_ROWS, TILE_ROWS, liger_chunk_rows
from estimator.recipe import Loss, Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The passes of a fused loss over the scored positions. It is the same program for all batches and lengths with the same value."""

    in_pass: int | None = None
    """Rows of one pass; None: all of them in one."""
    several: bool = False
    """Whether there is more than one pass."""


def scored_positions(training: Training) -> int:
    """Positions whose next token is scored in one micro-batch [tokens].

    The first token of a sequence is predicted by none. Labels are all valid: batches without padding are the largest.

    Source: trl 1.16, trainer/utils.py, add_fused_lm_head: `hidden_states[:, :-1]`, `labels[:, 1:]`.
    """
    objective = training.objective
    sequences = training.micro_batch_size * objective.sequences_per_example
    return sequences * max(training.sequence_length - max(objective.prompt_length, 1), 0)


def rows_of(training: Training, config: Mapping[str, Any]) -> Rows:
    """The passes that a batch's size brings about.

    Args:
        config: of the model; Liger's chunks depend on vocabulary and width.

    Source: as for `fused_loss`.
    """
    if training.loss is Loss.TRL_TILED:
        return _passes(scored_positions(training), TILE_ROWS)
    if training.loss is Loss.TRL_CHUNKED:
        return _passes(scored_positions(training), CHUNK_ROWS)
    if training.loss is Loss.LIGER:
        tokens = training.micro_batch_size * training.sequence_length
        return _passes(tokens, liger_chunk_rows(tokens, config["vocab_size"], config["hidden_size"]))
    return Rows()


def _passes(positions: int, rows: int) -> Rows:
    return Rows() if positions <= rows else Rows(in_pass=rows, several=True)
