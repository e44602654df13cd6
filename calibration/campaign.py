"""A campaign: a declared grid of cases, read from YAML."""

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from calibration.case import Case, JsonObject
from calibration.models import config_of
from calibration.record import package_version
from estimator.errors import RequestError, UnknownNameError

_SHIPPED = Path(__file__).with_name("campaigns")
# Under these names configs hold their number of layers.
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


class Grid(BaseModel):
    """Requests that differ in a few fields: every combination of the values in `vary`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    request: JsonObject = {}
    """Fields that all cases share, as in a request."""
    vary: dict[str, list[JsonValue]] = {}
    """Dotted names of fields, each with the values it takes. A mapping as value is laid over what `request` holds there."""
    layers: list[int] | None = None
    """Numbers of layers to cut the model to, at its real widths; whole models where absent."""
    config: JsonObject = {}
    """Fields of the model's config with other values: few ids leave small logits, which do not hide what the layers take."""
    needs: list[str] = []
    """Packages without which the grid is left out."""

    @property
    def missing(self) -> tuple[str, ...]:
        """What it needs and this machine has not."""
        return tuple(name for name in self.needs if package_version(name) is None)


class Campaign(BaseModel):
    """What to measure, and the time it may take."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    about: str
    budget_minutes: float = Field(gt=0)
    num_steps: int = Field(default=2, ge=2, le=16)
    grids: list[Grid] = Field(min_length=1)
    cards: list[str] = []
    """Cards of the catalogue whose memory `calibrate caps` holds the cases to; the batch of its cases is the planner's."""

    def cases(self, find_config: Callable[[JsonObject], JsonObject] = config_of) -> tuple[Case, ...]:
        """All cases, each once.

        Args:
            find_config: gives the config of a request's model.

        Raises:
            VramplanError: naming the grid, if one of its requests is no case.
        """
        found: dict[str, Case] = {}
        for grid in self.grids:
            if grid.missing:
                continue
            try:
                for case in _cases(grid, self.num_steps, find_config):
                    found.setdefault(case.hash, case)
            except RequestError as error:
                raise RequestError(f"campaign {self.name}, grid {grid.name}: {error.message}", errors=error.errors) from error
        return tuple(found.values())


def shipped() -> tuple[str, ...]:
    """Names of the campaigns that come with vramplan."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.yaml")))


def read(name_or_path: str) -> Campaign:
    """A campaign that comes with vramplan, or one in a file.

    Raises:
        UnknownNameError: if there is neither.
        RequestError: naming the field, if the file is no campaign.
    """
    path = _SHIPPED / f"{name_or_path}.yaml" if name_or_path in shipped() else Path(name_or_path)
    if not path.is_file():
        raise UnknownNameError.of("campaign", name_or_path, (*shipped(), "the path of a YAML file"))
    try:
        return Campaign.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise RequestError(f"{path}: is not YAML: {error}", field="campaign") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"{path}: {place}: {first['msg']}; got {first['input']!r}", field=place) from error


def _cases(grid: Grid, num_steps: int, find_config: Callable[[JsonObject], JsonObject]) -> Iterator[Case]:
    for values in product(*grid.vary.values()):
        request = grid.request
        for name, value in zip(grid.vary, values, strict=True):
            request = _with(request, name.split("."), value)
        config = {**find_config(request), **grid.config}
        for cut in [config] if grid.layers is None else [with_layers(config, number) for number in grid.layers]:
            yield Case.from_request(request, cut).model_copy(update={"num_steps": num_steps})


def _with(fields: Mapping[str, JsonValue], path: list[str], value: JsonValue) -> JsonObject:
    """The fields with another value at a path; what lies on the way there is made if it is missing."""
    name, *rest = path
    inner = fields.get(name)
    if rest:
        return {**fields, name: _with(inner if isinstance(inner, dict) else {}, rest, value)}
    return {**fields, name: {**inner, **value} if isinstance(inner, dict) and isinstance(value, dict) else value}


def with_layers(config: JsonObject, number: int) -> JsonObject:
    """The config with fewer layers: what it lists layer by layer is cut too.

    Raises:
        RequestError: if the config does not say how many layers it has, or has fewer.
    """
    name = next((name for name in _LAYERS if isinstance(config.get(name), int)), None)
    if name is None:
        raise RequestError(f"layers: the config names its layers by none of {', '.join(_LAYERS)}", field="layers")
    whole = config[name]
    assert isinstance(whole, int)
    if not 1 <= number <= whole:
        raise RequestError(f"layers: {number} of {whole} layers; accepted are 1 to {whole}", field="layers")
    cut = {key: value[:number] if isinstance(value, list) and len(value) == whole else value for key, value in config.items()}
    return {**cut, name: number}
