"""Why a step cannot be traced."""

from estimator.introspect.errors import BuildError


class NotTraceableError(BuildError):
    """The program needs what a trace does not have: values of weights or activations, or a library that is not at hand."""

    def __init__(self, message: str) -> None:
        super().__init__("not_traceable", message)


class NeedsValuesError(NotTraceableError):
    """The program reads, or sizes a tensor by, a value that depends on weights or activations."""


class RefusedError(NotTraceableError):
    """A library refuses the recipe; so it would on a card."""


class LoopOverTokensError(NotTraceableError):
    """A module runs as many operations as there are tokens: it can be traced, but not at any length in reasonable time."""
