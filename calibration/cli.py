"""`vramplan calibrate …`: measuring on a GPU of one's own."""

from pathlib import Path
from typing import Annotated

import orjson
import typer
import yaml
from rich.console import Console
from rich.markup import escape

from calibration.case import Case
from calibration.models import config_of
from calibration.record import Figures, Outcome, Record, RecordFile
from calibration.runner import DEFAULT_TIMEOUT_SECONDS, Device, NoDeviceError, Runner
from estimator.errors import RequestError, VramplanError
from estimator.units import gib

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Measure what a card really does.")


@app.callback()
def calibrate() -> None:
    """Measure what a card really does."""


@app.command()
def run(
    request: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="A request as `vramplan estimate --request` reads it.")],
    out: Annotated[Path, typer.Option(help="JSONL file that the record is appended to.")],
    device: Annotated[Device, typer.Option(help="cpu is a dry run: the step runs, nothing is measured.")] = Device.CUDA,
    gpu: Annotated[int, typer.Option(min=0, help="Index of the card.")] = 0,
    batch_size: Annotated[int | None, typer.Option("--per-device-train-batch-size", min=1, help="Instead of the request's.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Instead of the request's.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which the case is killed.")] = DEFAULT_TIMEOUT_SECONDS,
    again: Annotated[bool, typer.Option("--again", help="Measure even if the file has an answer for this case.")] = False,
) -> None:
    """Run one case in a fresh process and append its record."""
    console, errors = Console(), Console(stderr=True)
    runner = Runner(device=device, gpu=gpu, timeout_seconds=timeout)
    records = RecordFile(out)
    try:
        case = read_case(request, batch_size=batch_size, max_length=max_length)
        if not again and records.has(case, runner.kind):
            console.print(f"{escape(str(out))} has this case already ({case.hash}); --again measures it once more")
            return
        record = runner.run(case)
        records.append(record)
    except (NoDeviceError, VramplanError, ValueError, OSError) as error:
        errors.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    show(record, console)
    if record.outcome in (Outcome.FAILED, Outcome.TIMEOUT):
        errors.print(f"[red]error:[/red] {escape(record.error or record.outcome)}", soft_wrap=True)
        raise typer.Exit(1)


def read_case(path: Path, *, batch_size: int | None = None, max_length: int | None = None) -> Case:
    """The case in a request file.

    Raises:
        VramplanError: if the file is no request, has no single run in it, or its model is not known.
    """
    text = path.read_text()
    try:
        request = orjson.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (orjson.JSONDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from error
    if not isinstance(request, dict):
        raise RequestError(f"{path}: a request is an object with the field 'model'; got {type(request).__name__}")
    training = request.get("training")
    if isinstance(training, dict):
        given = {"per_device_train_batch_size": batch_size, "max_length": max_length}
        request = {**request, "training": {**training, **{name: value for name, value in given.items() if value is not None}}}
    return Case.from_request(request, config_of(request))


def show(record: Record, console: Console) -> None:
    """One line on what came out, and the phases when something was measured."""
    if record.figures is None:
        console.print(f"{record.kind}: {record.outcome}, {record.provenance.duration_seconds:.1f} s")
        return
    environment = record.environment
    console.print(f"{record.kind} on {escape(environment.gpu or '?') if environment else '?'}: {record.outcome}")
    for name, num_bytes in _lines(record.figures).items():
        if num_bytes is not None:
            console.print(f"  {name:<24}{gib(num_bytes):>12}")
    if record.contaminated:
        console.print("[yellow]others used the card meanwhile: the record is marked and enters no fit[/yellow]")


def _lines(figures: Figures) -> dict[str, int | None]:
    phases: dict[str, int | None] = {f"{name} peak": peak.allocated_bytes for name, peak in figures.phases.items()}
    return {
        "context": figures.context_bytes,
        "loaded": figures.loaded_bytes,
        "steady state": figures.steady_state_bytes,
        **phases,
        "peak allocated": figures.peak_allocated_bytes,
        "peak reserved": figures.peak_reserved_bytes,
        "device": figures.device_bytes,
    }
