"""Why a step cannot be traced."""

from estimator.introspect.errors import BuildError


class NotTraceableError(BuildError):
    """The program needs what a trace does not have: values of weights or activations, or a library that is not at hand."""

    def __init__(self, message: str) -> None:
        super().__init__("not_traceable", message)
