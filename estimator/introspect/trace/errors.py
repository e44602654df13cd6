"""Why a step cannot be traced."""


class NotTraceableError(Exception):
    """The program needs what a trace does not have: values of weights or activations, or a library that is not at hand. The message says
    which."""
