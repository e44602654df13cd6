"""Settings of the service, each an environment variable that starts with `VRAMPLAN_`."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app import corrections, prices
from estimator.errors import FieldError, RequestError
from estimator.sources import cache, hub, lookup

PREFIX = "VRAMPLAN_"
Seconds = Annotated[float, Field(gt=0, le=3600)]
# Share of the letters of two names that agree, from which one may be meant for the other: a letter or a word too few, not another word.
_NEAR = 0.7
Names = Annotated[tuple[str, ...], NoDecode]


class Configuration(BaseSettings):
    """How the service runs. Lists are separated by commas."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True, env_ignore_empty=True)

    database_url: Annotated[
        str, Field(description="SQLAlchemy URL of the state; `none` keeps no state. Default: SQLite in the cache folder")
    ] = ""
    allowed_hosts: Annotated[
        Names, Field(description="names the service may be asked under; `vramplan serve` on a loopback address takes its own")
    ] = ("*",)
    rate_limit: Annotated[str, Field(description="requests of one address; several limits separated by `;`; `none` for no limit")] = (
        "300/minute"
    )
    rate_limit_storage: Annotated[
        str, Field(description="where the counts are kept: `memory://` (each process for itself) or `redis://…` (needs `vramplan[redis]`)")
    ] = "memory://"
    max_concurrent: Annotated[
        int,
        Field(
            ge=1,
            le=10000,
            description="requests worked on or waiting in one process; more get 503. An eighth is the most of each kind that may wait: for "
            "the Hub, for a build or a trace, for the database, for a parser of files, and three kinds of plans; the last is for the rest",
        ),
    ] = 128
    threads: Annotated[
        int,
        Field(
            ge=1,
            le=256,
            description="threads for estimates of bundled models, as many for what waits for the Hub, for a build or a trace, for the "
            "database, and for a parser of files, and beside the first three half as many for plans and sweeps: 6.5 times this in all",
        ),
    ] = 8
    max_plans: Annotated[
        int,
        Field(
            ge=1,
            le=1000,
            description="plans, checks, lists of cards and sweeps of bundled models worked on or waiting in one process, and as many of "
            "those that wait for the Hub, and of those for a build or a trace, but an eighth of `VRAMPLAN_MAX_CONCURRENT` at most; more "
            "get 503",
        ),
    ] = 16
    max_waiting_inspections: Annotated[
        int, Field(ge=0, le=1000, description="requests that wait for the process that builds models; others get 503")
    ] = 4
    request_timeout_seconds: Annotated[Seconds, Field(description="after which an answer is given up with 503")] = 120.0
    body_timeout_seconds: Annotated[Seconds, Field(description="in which a request's body has to arrive")] = 10.0
    shutdown_timeout_seconds: Annotated[Seconds, Field(description="for requests under way when the service is told to end")] = 20.0
    hub_endpoint: Annotated[str, Field(description="address of the Hub. Default: `HF_ENDPOINT`, else https://huggingface.co")] = ""
    hub_timeout_seconds: Annotated[Seconds, Field(description="for everything that one question asks of the Hub")] = hub.DEADLINE_SECONDS
    hub_fresh_seconds: Annotated[float, Field(ge=0, description="for which a public config is not asked for again")] = lookup.FRESH_SECONDS
    hub_stale_seconds: Annotated[float, Field(ge=0, description="for which it stands in while the Hub does not answer")] = (
        lookup.STALE_SECONDS
    )
    hub_file_hosts: Annotated[Names, Field(description="hosts the Hub may redirect to for the headers of safetensors files")] = (
        lookup.FILE_HOSTS
    )
    hub_use_own_token: Annotated[
        bool,
        Field(description="whether `HF_TOKEN` opens gated and private models for everyone who asks this service; off but for private use"),
    ] = False
    corrections_seconds: Annotated[
        Seconds, Field(description="after which a process looks anew which corrections are in force, and answers by them")
    ] = 5.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="of the log on standard error")] = "info"
    log_format: Annotated[Literal["json", "text"], Field(description="of the log on standard error")] = "json"
    metrics: Annotated[bool, Field(description="whether `/metrics` answers")] = True
    traces: Annotated[bool, Field(description="whether spans go to OpenTelemetry (needs `vramplan[otel]`; `OTEL_…` say where to)")] = False

    @field_validator("allowed_hosts", "hub_file_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("hub_endpoint")
    @classmethod
    def _is_address(cls, value: str) -> str:
        if value and not hub.is_address(value):
            raise PydanticCustomError("address", hub.ACCEPTED_ADDRESSES)
        return value

    @classmethod
    def of_environment(cls) -> "Configuration":
        """The settings of this process's environment.

        Raises:
            RequestError: naming each variable that cannot be read, its value and what is accepted.
        """
        try:
            found = cls()
        except ValidationError as error:
            names = [(f"{PREFIX}{str(one['loc'][0]).upper()}", one) for one in error.errors()]
            errors = [FieldError(field=name, message=f"{name}: {_told(one['input'])!r}: {one['msg']}") for name, one in names]
            raise RequestError("; ".join(one.message for one in errors), errors=errors) from None
        if not found.hub_endpoint:
            hub.endpoint_in_use()
        return found

    @property
    def long_threads(self) -> int:
        """Threads for plans and sweeps of one need."""
        return max(1, self.threads // 2)

    @property
    def connections(self) -> int:
        """To the database at most: of its own threads, of those that wait for the Hub and the builder, for single runs and for plans, whose
        caches it holds, and of two that follow the corrections and tell whether it answers.
        """
        return 3 * self.threads + 2 * self.long_threads + 2

    @property
    def max_waiting(self) -> int:
        """Calls of one need that are under way or waiting. Seven sets of threads have that limit: from 8 requests on, all of them together
        leave places at the door for what needs nothing.
        """
        return max(1, self.max_concurrent // 8)

    @property
    def database(self) -> str | None:
        """Where the state is; None for no state."""
        if self.database_url == "none":
            return None
        return self.database_url or f"sqlite:///{cache.default_directory() / 'vramplan.sqlite3'}"


def _told(value: object) -> object:
    return hub.without_credentials(value) if isinstance(value, str) else value


def unknown_names(environment: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each variable that is named like a setting and is none. Its value may be somebody's secret, and is not told."""
    settings = {f"{PREFIX}{name.upper()}" for name in Configuration.model_fields}  # are read whatever the case
    exact = {cache.VARIABLE, corrections.VARIABLE, prices.VARIABLE}
    short = [name.removeprefix(PREFIX) for name in sorted(settings | exact)]  # what all begin with makes none of them nearer
    for name in sorted(environment):
        if name.upper().startswith(PREFIX) and name.upper() not in settings and name not in exact:
            nearest = get_close_matches(name.upper().removeprefix(PREFIX), short, n=1, cutoff=_NEAR)
            yield f"{name} is set and is no setting" + "".join(f"; the nearest that is one: {PREFIX}{one}" for one in nearest)


def documented() -> str:
    """The table of all settings, as the README has it."""
    lines = ["| variable | default | what it is |", "|---|---|---|"]
    for name, field in Configuration.model_fields.items():
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = str(default).lower() if isinstance(default, bool) else f"{default:g}" if isinstance(default, float) else str(default)
        lines.append(f"| `{PREFIX}{name.upper()}` | {f'`{shown}`' if shown else ''} | {field.description} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(documented())
