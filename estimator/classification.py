"""The config of a model whose vocabulary is replaced by the scores of a classification head."""

from collections.abc import Mapping
from typing import Any

from estimator.recipe import Objective

_CLASSIFYING = "AutoModelForSequenceClassification"


def with_head(config: Mapping[str, Any], objective: Objective) -> Mapping[str, Any]:
    """The config that `AutoModelForSequenceClassification.from_pretrained(…, num_labels=…)` makes of a causal language model's.

    A padding token is named, as trainers do: the class looks for the last token that is none.

    Source: transformers, modeling_layers.py, GenericForSequenceClassification; trl 1.16, trainer/reward_trainer.py, RewardTrainer.__init__.
    """
    if not objective.kind.is_classification:
        return config
    changed = dict(config)
    changed["architectures"] = [_CLASSIFYING]  # whatever the checkpoint names, the type of the config decides
    changed["num_labels"] = objective.num_labels
    if not isinstance(changed.get("pad_token_id"), int):
        changed["pad_token_id"] = 0
    return changed
