"""What an optimizer takes of `optim_args`, which transformers reads as text.

Source: transformers 5.23, trainer_optimizer.py, the functions that make each optimizer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from estimator.errors import RequestError

FIELD = "training.optim_args"
Arguments = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """How a value is read, and what of it an optimizer accepts."""

    number: Callable[[str], float]
    is_accepted: Callable[[float], bool]
    accepted: str


def _truth(text: str) -> float:
    """Source: transformers, utils/generic.py, strtobool."""
    if text.lower() not in _TRUTHS:
        raise ValueError
    return 1


_TRUTHS = frozenset(("y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0"))
_ANY = _Reading(number=float, is_accepted=lambda _: True, accepted="a number")
_FROM_0 = _Reading(number=float, is_accepted=lambda n: n >= 0, accepted="a number from 0 on")
_DECAY = _Reading(number=float, is_accepted=lambda n: 0 <= n < 1, accepted="a number from 0 to below 1")
_WHOLE = _Reading(number=int, is_accepted=lambda _: True, accepted="a whole number")
_SWITCH = _Reading(number=_truth, is_accepted=lambda _: True, accepted="true or false")
_ADEMAMIX = {**dict.fromkeys(("beta1", "beta2", "beta3"), _DECAY), "alpha": _ANY, "eps": _FROM_0, "t_alpha": _WHOLE, "t_beta3": _WHOLE}
_TORCHAO = {"bf16_stochastic_round": _SWITCH}

# What each optimizer reads; transformers passes over other names. Source: torch 2.13, optim/sgd.py, adagrad.py and rmsprop.py, __init__;
# bitsandbytes 0.50, optim/optimizer.py, Optimizer2State.__init__.
_READ: Mapping[str, Mapping[str, _Reading]] = {
    "sgd": {"momentum": _FROM_0, "dampening": _ANY, "weight_decay": _FROM_0},
    "adagrad": dict.fromkeys(("lr_decay", "weight_decay", "eps"), _FROM_0),
    "rmsprop": dict.fromkeys(("momentum", "alpha", "eps", "weight_decay"), _FROM_0),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), _ADEMAMIX),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), _TORCHAO),
}
# Arguments that are handed on as text, on which the optimizer fails.
_AS_TEXT: Mapping[str, str] = {
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "block_size"),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), ""),
}


def check_arguments(name: str, arguments: Arguments) -> None:
    """Refuses what the library fails on.

    Args:
        name: a value of transformers' OptimizerNames.
        arguments: `optim_args`, parsed.

    Raises:
        RequestError: naming the argument, its value and what would be accepted.
    """
    if not arguments:
        return
    for key, value in arguments.items():
        if _AS_TEXT.get(name) in (key, ""):
            raise _error(key, value, f"transformers hands it to {name} as text, on which that fails; leave it out")
        reading = _READ.get(name, {}).get(key)
        if reading is not None and not _is_accepted(reading, value):
            raise _error(key, value, f"expected {reading.accepted}")
    if name == "sgd" and is_true(arguments, "nesterov") and not _allows_nesterov(arguments):
        raise _error("nesterov", arguments["nesterov"], "expected a momentum above 0 and no dampening beside it")


def number_of(arguments: Arguments, name: str) -> float:
    """A checked number; 0 if it is not given."""
    return float(arguments.get(name, "0"))


def is_true(arguments: Arguments, name: str) -> bool:
    """Whether a switch of torch's optimizers is on.

    Source: transformers, trainer_optimizer.py, _get_sgd and _get_rmsprop.
    """
    return arguments.get(name, "").lower() in ("true", "1", "yes")


def _allows_nesterov(arguments: Arguments) -> bool:
    return number_of(arguments, "momentum") > 0 and number_of(arguments, "dampening") == 0


def _is_accepted(reading: _Reading, value: str) -> bool:
    try:
        return reading.is_accepted(reading.number(value))
    except ValueError:
        return False


def _error(key: str, value: str, why: str) -> RequestError:
    return RequestError(f"{FIELD}: {key}={value[:80]!r} is not accepted; {why}", field=FIELD)
