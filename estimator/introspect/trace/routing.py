"""Which experts a router is taken to choose, where a program's sizes depend on it."""

from enum import StrEnum

import torch


class Routing(StrEnum):
    """How tokens are spread over experts."""

    BALANCED = "balanced"
    """Every expert is chosen as often as any other."""
    WORST = "worst"
    """All tokens choose the same experts: one expert at a time works on the whole batch."""

    def choice(self, shape: torch.Size, k: int) -> torch.Tensor:
        """Indices as `topk` gives them.

        Args:
            shape: of the scores, experts last.
            k: experts per token.
        """
        *rows, num_experts = shape
        chosen = torch.arange(k).expand(*rows, k)
        if self is Routing.WORST:
            return chosen.clone()
        tokens = torch.arange(torch.Size(rows).numel()).view(*rows, 1)
        return (tokens * k + chosen) % num_experts
