"""The command line: one question, one answer, and an exit code that scripts can read."""

import atexit
import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from estimator.errors import RequestError, VramplanError

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_DOES_NOT_FIT = 3

Json = dict[str, Any]  # as in app.answer, which imports what no `--help` should wait for
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def estimate(
    model: str | None,
    request: str | None,
    as_json: bool,
    options: Json,
    corrections: Annotated[Path | None, typer.Option(help="file of `calibrate fit`: scales what is not exact")] = None,
) -> None:
    """How much memory a run takes, in each phase."""
    from app.corrections import using
    from app.service import answer

    with nullcontext() if corrections is None else using(corrections):
        result = answer(_payload(model, request, options))
    if as_json:
        _print_json(result)
    else:
        from app.terminal import print_estimate

        print_estimate(_console(), result)
    if result["fit"] is not None and result["fit"]["verdict"] == "does_not_fit":
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def plan(
    model: str | None,
    request: str | None,
    as_json: bool,
    options: Json,
    write: Annotated[
        tuple[str, str],
        typer.Option(metavar="KIND OUT", help="write the plan: trl (YAML, or a script where OUT ends in .py), axolotl, llamafactory, …"),
    ] = ("", ""),
) -> None:
    """The largest batch or length that fits the card, or what is missing; without a card, which cards fit."""
    _plan(_payload(model, request, options), as_json, write, options.get("files", []))


def which(model: str | None, request: str | None, as_json: bool, options: Json) -> None:
    """Which cards fit, with the best batch on each and its price."""
    payload = _payload(model, request, options)
    hardware = payload.get("hardware")
    if isinstance(hardware, dict):
        payload["hardware"] = {name: value for name, value in hardware.items() if name not in ("gpu", "capacity_gib", "nvidia_smi")}
    _plan(payload, as_json)


def _plan(payload: Json, as_json: bool, write: tuple[str, str] = ("", ""), files: Sequence[Json] = ()) -> None:
    from app.plan import plan as make_plan

    result = make_plan(payload)
    if as_json:
        _print_json(result)
    else:
        from app.terminal import print_plan, print_which

        (print_plan if result["gpus"] is None else print_which)(_console(), result)
    if write[0] and result["plan"] is not None:
        _write_plan(payload, result["plan"], *write, files)
    if result["plan"] is None and not any(row["verdict"] == "fits" for row in result["gpus"] or ()):
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _write_plan(payload: Json, found: Json, kind: str, out: str, files: Sequence[Json]) -> None:
    """The plan as a file; 3 if its trainer makes a run of it that does not fit."""
    from app.shortfall import payload_of
    from app.trainer_files.writing import written
    from app.wording import written_sentence

    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length")
    planned = payload_of(payload, {f"training.{name}": found[name] for name in names})
    file = written(planned, kind, out, files)
    _write(Path(out), file.text.encode())
    print(written_sentence(out, file.rendered()), file=sys.stderr)
    if file.fits is False:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def check(
    model: str | None,
    request: str | None,
    as_json: bool,
    options: Json,
    strict: Annotated[bool, typer.Option("--strict", help="what is tight counts as not fitting")] = False,
) -> None:
    """Whether a run fits its card, for scripts: one line, exit code 0 or 3."""
    from app.check import check as run_check
    from app.wording import check_sentence

    result = run_check(_payload(model, request, options))
    if as_json:
        _print_json(result)
    else:
        print(check_sentence(result))
        for message in result["refused"]:
            print(f"but: {message}", file=sys.stderr)
    if result["verdict"] == "does_not_fit" or (strict and result["verdict"] != "fits"):
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def sweep(
    model: str | None,
    request: str | None,
    as_json: bool,
    options: Json,
    batches: Annotated[str | None, typer.Option(help="micro-batches: 1..16, or 1,2,4")] = None,
    lengths: Annotated[str | None, typer.Option(help="lengths: 512..8192:512, or 1024,2048")] = None,
    ranks: Annotated[str | None, typer.Option(help="ranks of the adapter: 8,16")] = None,
    confirm: Annotated[bool, typer.Option(help="replay the allocator for the largest batch of the first lengths")] = True,
    csv: Annotated[Path | None, typer.Option(help="write every point as a table")] = None,
    svg: Annotated[Path | None, typer.Option(help="write a picture, with the largest batch that fits at each length")] = None,
) -> None:
    """Memory over micro-batches, lengths and ranks."""
    from app.options import merged
    from app.sweep import answer_sweep, csv_of, svg_of
    from app.sweep import sweep as run_sweep

    axes = {"per_device_train_batch_size": batches, "max_length": lengths, "r": ranks}
    given = {name: value for name, value in axes.items() if value is not None}
    more = ({"sweep": given} if given else {}) | ({} if confirm else {"confirm": False})
    found = run_sweep(_payload(model, request, merged(options, more)))
    if csv is not None:
        _write(csv, csv_of(found).encode())
    if svg is not None:
        _write(svg, svg_of(found).encode())
    if as_json:
        _print_json(answer_sweep(found))
    else:
        from app.terminal import print_sweep

        print_sweep(_console(), answer_sweep(found))


def trace(
    model: str | None,
    request: str | None,
    as_json: bool,
    options: Json,
    svg: Annotated[Path | None, typer.Option(help="write memory over time as a picture")] = None,
    snapshot: Annotated[Path | None, typer.Option(help="write a pickle that pytorch.org/memory_viz opens")] = None,
    all_layers: Annotated[bool, typer.Option(help="run every layer, instead of a few of each kind")] = False,
) -> None:
    """Every allocation of a training step, seen in the libraries' own code on tensors without content."""
    from app.trace import answer_trace, snapshot_of, svg_of
    from app.trace import trace as run_trace

    run = run_trace(_payload(model, request, options), all_layers=all_layers)
    if svg is not None:
        _write(svg, svg_of(run).encode())
    if snapshot is not None:
        _write(snapshot, snapshot_of(run))
    if as_json:
        _print_json(answer_trace(run))
    else:
        from app.terminal import print_trace

        print_trace(_console(), answer_trace(run))


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror}") from None


def models(text: Annotated[str | None, typer.Argument(help="part of an id or type")] = None, as_json: AsJson = False) -> None:
    """The models that are answered for without a network."""
    from app.catalogue import list_models

    found = list_models(text)
    if as_json:
        _print_json(found)
    else:
        from app.terminal import print_models

        print_models(_console(), found)


def gpus(
    text: Annotated[str, typer.Option("--filter", help="24GB..80GB, 1..8, bf16, sm80, ..$2, a provider, a card: any of it")] = "",
    bf16: Annotated[bool, typer.Option(help="native bfloat16 only")] = False,
    provider: Annotated[str | None, typer.Option(help="offered there")] = None,
    sort: Annotated[str, typer.Option(help="catalogue, memory, price or bandwidth")] = "catalogue",
    refresh_prices: Annotated[bool, typer.Option("--refresh-prices", help="fetch offers through gpuhunt first")] = False,
    out: Annotated[Path | None, typer.Option(help="with --refresh-prices: the file to write")] = None,
    as_json: AsJson = False,
) -> None:
    """The GPUs that are known by name, and where they are offered."""
    from app.catalogue import list_gpus
    from app.prices import current, refresh, report
    from estimator.gpu_filter import GpuFilter

    if refresh_prices:
        print(report(refresh(out)), file=sys.stderr)
        if out is not None:
            return
    found = list_gpus(GpuFilter.of(text=text, bf16=bf16, provider=provider, book=current()), sort)
    if as_json:
        _print_json(found)
    else:
        from app.terminal import print_gpus

        print_gpus(_console(), found)


def inspect(
    model: Annotated[str, typer.Argument(help="catalogue or Hub id, or path of a config.json")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
    as_json: AsJson = False,
) -> None:
    """Every tensor of a model, as transformers creates it."""
    from app.catalogue import inspect_model
    from app.options import model_argument

    found = inspect_model(model_argument(model), revision)
    if as_json:
        _print_json(found)
    else:
        from app.terminal import print_inspection

        print_inspection(_console(), found)


def serve(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=0, max=65535)] = 8000,
    workers: Annotated[int, typer.Option(help="processes that serve", min=1, max=256)] = 1,
) -> None:
    """Serve the page and the HTTP API."""
    from app.serving import serve_on

    serve_on(host, port, workers)


def calibrate(context: typer.Context) -> None:
    """Measure a run on this machine's GPU."""
    from app.calibrate import app as calibration

    calibration(args=context.args, prog_name="vramplan calibrate")


def state(context: typer.Context) -> None:
    """Keys, measurements and corrections of a service."""
    from app.administer import app as administration

    administration(args=context.args, prog_name="vramplan state")


_COMMANDS: Mapping[str, Callable[..., None]] = {
    command.__name__: command for command in (estimate, plan, which, check, sweep, trace, models, gpus, inspect, serve, calibrate, state)
}
_ASK = (estimate, plan, which, check, sweep, trace)
_PLAN = (plan, which)
_PASS_ON = (calibrate, state)
_LASTING = frozenset(("serve", "calibrate", "state"))


class _Commands(TyperGroup):
    """Builds a command when it is asked for: the dozens of options of all of them take longer than many an answer."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        # Of an unknown name the group looks among all of them for what was meant.
        for name in (cmd_name,) if cmd_name in _COMMANDS else _COMMANDS:
            if name not in self.commands:
                self.commands[name] = _built(name)
        return self.commands.get(cmd_name)


def _built(name: str) -> Any:
    command = _COMMANDS[name]
    alone = typer.Typer(add_completion=False)
    if command in _PASS_ON:
        settings = {"allow_extra_args": True, "ignore_unknown_options": True}
        alone.command(name, context_settings=settings, add_help_option=False)(command)
    elif command in _ASK:
        from app.options import OPTIONS, PLAN_OPTIONS, with_options

        alone.command(name)(with_options(command, *((PLAN_OPTIONS, OPTIONS) if command in _PLAN else (OPTIONS,))))
    else:
        alone.command(name)(command)
    return typer.main.get_command(alone)


cli = typer.Typer(
    name="vramplan",
    cls=_Commands,
    help="How much GPU memory a model needs to load, run or fine-tune, phase by phase.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@cli.callback()
def vramplan() -> None:
    """A group is one that has commands or this; its commands are those of `_Commands`."""


def main() -> None:
    """The console script."""
    if sys.argv[1:2] and sys.argv[1] not in _LASTING:
        _hurry()
    try:
        cli()
    except VramplanError as error:
        from app.redaction import redacted

        print(f"error: {redacted(error.message)}", file=sys.stderr)
        for field in error.errors:
            if field.message not in error.message:
                print(f"  {redacted(field.message)}", file=sys.stderr)
        sys.exit(EXIT_ERROR)


def _hurry() -> None:
    """For what is soon over: no garbage is collected, nothing is taken apart at the end, no plugins are looked for."""
    gc.disable()  # the collector would go through all that was imported
    atexit.register(gc.freeze)
    # pydantic goes through the metadata of every installed package for plugins.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


def _payload(model: str | None, request: str | None, options: Json) -> Json:
    """The request of a file, if one is given, with the options set on top."""
    from app.options import merged, model_argument
    from app.request_file import read_request

    payload = merged(read_request(request) if request is not None else {}, options)
    if "files" in payload:
        from app.trainer_files.opening import opened

        payload = opened(payload)
    if model is not None:
        payload["model"] = model_argument(model)
    if "trainer" in payload and "inference" not in payload:
        payload.setdefault("training", {})
    if "model" not in payload:
        raise typer.BadParameter("give MODEL, or a request with one by --request")
    return payload


def _print_json(value: Any) -> None:
    import orjson

    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


def _console() -> Any:
    from rich.console import Console

    return Console(emoji=False)
