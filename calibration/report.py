"""What a worker hands back to the process that started it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from calibration.record import Environment, Figures


class WorkerReport(BaseModel):
    """The worker's last word, written to a file: standard output belongs to the libraries."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    outcome: Literal["ok", "oom", "failed", "refused"]
    """`refused`: the device is not there, so nothing was tried."""
    figures: Figures | None = None
    environment: Environment | None = None
    step_seconds: float | None = None
    error: str | None = None
