"""What can go wrong inside the inspecting process; it crosses the pipe as (kind, message)."""


class BuildError(Exception):
    """transformers could not build the model.

    `kind` is `unknown_model_type`, `config`, `class` or `build`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
