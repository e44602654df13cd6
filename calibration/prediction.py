"""What the estimator says of a case, as far as a measurement can be set beside it."""

from collections.abc import Callable
from dataclasses import dataclass

from calibration.case import Case
from calibration.record import Environment
from estimator.correction import class_of
from estimator.estimate import Estimate, PhaseEstimate
from estimator.fitted import Term, bytes_of, is_correctable
from estimator.phases import LOADED, Item, Phase
from estimator.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """An estimate for the versions and the card of one record; only of runs whose step is modelled."""

    recipe: Recipe
    estimate: Estimate

    @property
    def residual_class(self) -> str | None:
        """The class of runs that it belongs to."""
        return class_of(self.recipe, self.estimate.kernels)

    @property
    def loaded_bytes(self) -> int:
        """Allocated once model and adapters stand [bytes]."""
        load = self.phase(Phase.LOAD)
        return 0 if load is None else sum(bytes_of(load, item) for item in LOADED)

    @property
    def steady_state_bytes(self) -> int:
        assert self.estimate.steady_state_bytes is not None  # modelled
        return self.estimate.steady_state_bytes

    @property
    def workspace_bytes(self) -> int:
        """Of the steady state: what is modelled [bytes]."""
        return max(bytes_of(phase, Item.WORKSPACE) for phase in self.estimate.phases)

    def phase(self, phase: Phase) -> PhaseEstimate | None:
        return next((found for found in self.estimate.phases if found.phase is phase), None)

    def modelled_bytes(self, term: Term) -> int:
        """What the term comes to before any correction; 0 where the run does not show it [bytes]."""
        estimate = self.estimate
        match term:
            case Term.FORWARD_TEMPORARIES:
                return self._temporaries(Phase.FORWARD)
            case Term.BACKWARD_TEMPORARIES:
                return self._temporaries(Phase.BACKWARD)
            case Term.WORKSPACE:
                return self.workspace_bytes
            case Term.SLACK:
                return estimate.reserved_bytes - estimate.peak.allocated_bytes
            case Term.CONTEXT:
                return estimate.device_bytes - estimate.reserved_bytes - estimate.paged_bytes

    def _temporaries(self, phase: Phase) -> int:
        found = self.phase(phase)
        return (
            0
            if found is None
            else sum(item.num_bytes for item in found.items if is_correctable(item, found) and item.item is Item.TEMPORARY)
        )


Predict = Callable[[Case, Environment | None], Prediction]
"""Gives the prediction of a case on the card and for the versions of a record.

Raises:
    VramplanError: if the case cannot be answered for.
"""
