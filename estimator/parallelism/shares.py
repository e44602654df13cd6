"""Each strategy's share of one rank."""

from collections.abc import Callable, Mapping

from estimator.parallelism import ddp, fsdp, fsdp1, zero
from estimator.parallelism.options import Strategy
from estimator.parallelism.share import Share
from estimator.recipe import Recipe
from estimator.static_memory import StaticMemory


def _fsdp(recipe: Recipe, static: StaticMemory) -> Share:
    return fsdp1.share(recipe, static) if recipe.parallel.fsdp.version == 1 else fsdp.share(recipe, static)


_SHARES: Mapping[Strategy, Callable[[Recipe, StaticMemory], Share]] = {
    Strategy.DDP: ddp.share,
    Strategy.FSDP: _fsdp,
    Strategy.ZERO1: zero.share,
    Strategy.ZERO2: zero.share,
    Strategy.ZERO3: zero.share,
}


def share_of(recipe: Recipe, static: StaticMemory) -> Share:
    """What the rank that holds most has of the static memory; for strategies in which every rank runs the whole model.

    Raises:
        RequestError: if the libraries refuse the combination.
    """
    return _SHARES[recipe.parallel.strategy](recipe, static)
