"""`vramplan calibrate …`: measuring on a GPU of one's own, and what follows from it."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from app import caps as capped
from app.calibrate_terminal import method_of, named, show, show_comparison, show_proofs
from app.prediction import predict
from app.request_file import read_request
from app.terminal import escape
from calibration import campaign as campaigns
from calibration import on_ray, on_slurm, schedule
from calibration.accuracy import compare_all
from calibration.caps import proofs
from calibration.card import card_id, card_name, processes, used_bytes
from calibration.case import Case
from calibration.comparison import Comparison, rows_of
from calibration.comparison import compare as compared
from calibration.models import config_of
from calibration.record import CONTAMINATION_LIMIT_BYTES, Outcome, RecordFile, environment_here
from calibration.runner import DEFAULT_TIMEOUT_SECONDS, Device, NoDeviceError, Runner
from calibration.shards import Shard
from estimator.errors import RequestError, VramplanError
from estimator.fitted import dumped
from estimator.units import gib

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Measure what a card really does.")

_TRACED_WORKER = (sys.executable, "-m", "app.traced_case")
_LEAST_TIMEOUT_SECONDS = 120.0  # however small the budget of a campaign: libraries alone take a while to load
_BEFORE_CAPS = ("smoke", "terms", "models", "generate")
RecordFiles = Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="JSONL files of records.")]


class Weights(StrEnum):
    """What a measured model is filled with."""

    RANDOM = "random"
    HUB = "hub"


@app.callback()
def calibrate() -> None:
    """Measure what a card really does."""


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="JSONL file that records are appended to; what it has already is not run again.")],
    request: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="One case: a request as `vramplan estimate --request` reads it.")
    ] = None,
    campaign: Annotated[str | None, typer.Option(help=f"Many cases: {', '.join(campaigns.shipped())}, or the path of a YAML file.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Budget of a campaign, instead of its own.")] = None,
    device: Annotated[Device, typer.Option(help="cpu and trace are dry runs: nothing is measured.")] = Device.CUDA,
    gpu: Annotated[int, typer.Option(min=0, help="Index of the card.")] = 0,
    weights: Annotated[
        Weights, typer.Option(help="Of --request: random ones, made on the card, or those of the model on the Hub (HF_TOKEN where gated).")
    ] = Weights.RANDOM,
    snapshot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Of --request: file for the allocator's history, for pytorch.org/memory_viz.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--per-device-train-batch-size", min=1, help="Instead of the request's.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Instead of the request's.")] = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which a case is killed; with --weights hub the download counts.")
    ] = DEFAULT_TIMEOUT_SECONDS,
    again: Annotated[bool, typer.Option("--again", help="Measure even what the file has an answer for.")] = False,
    shard: Annotated[str | None, typer.Option(help="Of a campaign the share NUMBER/OF only, as several machines divide it.")] = None,
    ray: Annotated[str | None, typer.Option(help="Run on a Ray cluster: its address, auto, or local for one on this machine.")] = None,
) -> None:
    """Run one case or a campaign, each case in a fresh process, and append the records."""
    console = Console()
    with _errors():
        if (request is None) == (campaign is None):
            raise RequestError("give either --request or --campaign", field="request")
        if request is not None and (shard or ray):
            raise RequestError("--shard and --ray are for campaigns", field="shard" if shard else "ray")
        if campaign is not None and (snapshot or weights is Weights.HUB):
            raise RequestError("--snapshot and --weights hub are for a --request", field="snapshot" if snapshot else "weights")
        if snapshot is not None and device is not Device.CUDA:
            raise RequestError("--snapshot needs --device cuda; of a dry run `vramplan trace` writes one", field="snapshot")
        if weights is Weights.HUB and device is Device.TRACE:
            raise RequestError("--weights hub needs --device cuda or cpu; a trace has no weights", field="weights")
        runner = replace(_runner(device, gpu, timeout), snapshot=snapshot)
        records = RecordFile(out)
        if campaign is not None:
            share = Shard.parse(shard) if shard is not None else Shard(number=1, of=1)
            _warn_of_others(runner, console)
            _run_campaign(campaigns.read(campaign), runner, records, console, minutes=minutes, again=again, share=share, ray=ray)
            return
        assert request is not None
        case = read_case(request, batch_size=batch_size, max_length=max_length, from_hub=weights is Weights.HUB)
        if not again and records.has(case, runner.kind):
            console.print(f"{escape(str(out))} has this case already ({case.hash}); --again measures it once more")
            return
        _warn_of_others(runner, console)
        record = runner.run(case)
        records.append(record)
        show(record, console)
        if record.outcome in (Outcome.FAILED, Outcome.TIMEOUT):
            raise RequestError(record.error or record.outcome.value)


@app.command("campaigns")
def list_campaigns() -> None:
    """The campaigns that come with vramplan."""
    console = Console()
    with _errors():
        for name in campaigns.shipped():
            found = campaigns.read(name)
            console.print(f"[bold]{name}[/bold]  {len(found.cases())} cases, {found.budget_minutes:g} min: {escape(found.about)}")


@app.command()
def fit(
    files: RecordFiles,
    out: Annotated[Path | None, typer.Option(help="File for the corrections; printed where absent.")] = None,
) -> None:
    """Fit what is not exact to measured records, and say how well that predicts models it has not seen."""
    console = Console()
    with _errors():
        _fit(files, out, console)


@app.command()
def compare(files: RecordFiles) -> None:
    """Measured beside predicted, record by record, for the versions of each record."""
    with _errors():
        show_comparison(_comparison(files), Console())


@app.command()
def caps(
    out: Annotated[Path, typer.Option(help="JSONL file that records are appended to; what it has already is not run again.")],
    campaign: Annotated[str, typer.Option(help="What to run: a campaign with cards; its batches are the planner's.")] = "caps",
    cards: Annotated[str | None, typer.Option(help="Cards whose memory to imitate, by comma, instead of the campaign's.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Budget of runs, instead of the campaign's.")] = None,
    device: Annotated[Device, typer.Option(help="trace is a dry run: the allocator is simulated.")] = Device.CUDA,
    gpu: Annotated[int, typer.Option(min=0, help="Index of the card.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a case is killed.")] = DEFAULT_TIMEOUT_SECONDS,
) -> None:
    """Hold this card to the memory of smaller ones: the planner's batch must run there, and the next larger one should not."""
    with _errors():
        names = None if cards is None else [name.strip() for name in cards.split(",")]
        runner, console = _runner(device, gpu, timeout), Console()
        _warn_of_others(runner, console)
        _run_caps(campaigns.read(campaign), runner, RecordFile(out), console, cards=names, minutes=minutes)


@app.command("all")
def everything(
    folder: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for records.jsonl, corrections.json, report.html and its pictures.")
    ],
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Budget of each campaign, instead of its own.")] = None,
    device: Annotated[Device, typer.Option(help="trace is a dry run: nothing is measured, and nothing can be fitted.")] = Device.CUDA,
    gpu: Annotated[int, typer.Option(min=0, help="Index of the card.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a case is killed.")] = DEFAULT_TIMEOUT_SECONDS,
) -> None:
    """Everything on this card: all campaigns, the proof under caps, the fit, the report. Run again, it goes on where it ended.

    Exit code 1 where nothing works, and on a card where nothing could be fitted.
    """
    console = Console()
    with _errors():
        runner, records = _runner(device, gpu, timeout), RecordFile(folder / "records.jsonl")
        folder.mkdir(parents=True, exist_ok=True)
        _warn_of_others(runner, console)
        num_before = sum(1 for _ in records)
        for name in _BEFORE_CAPS:
            if name == "generate" and device is Device.TRACE:
                console.print("generate is left out: generation is not traced")
                continue
            share = Shard(number=1, of=1)
            left = _run_campaign(campaigns.read(name), runner, records, console, minutes=minutes, again=False, share=share, ray=None)
            if name == "smoke":
                _stop_if_nothing_works(records, num_before, runner)
                if left:
                    told = "; ".join(dict.fromkeys(map(method_of, left)))
                    console.print(f"[yellow]smoke's budget was over before it tried:[/yellow] {escape(told)}", highlight=False)
        try:
            _run_caps(campaigns.read("caps"), runner, records, console, cards=None, minutes=minutes)
        except (VramplanError, NoDeviceError) as error:
            console.print(f"[yellow]no proof under caps:[/yellow] {escape(str(error))}")
        unfitted: RequestError | None = None
        try:
            _fit([records.path], folder / "corrections.json", console)
        except RequestError as error:
            unfitted = error
            console.print(f"[yellow]{escape(error.message)}[/yellow]")
        _report([records.path], folder / "report.html", folder / "pictures", console, published=True)
        if unfitted is not None and device is Device.CUDA:
            raise RequestError(f"no corrections were written: {unfitted.message}") from unfitted


def _stop_if_nothing_works(records: RecordFile, num_before: int, runner: Runner) -> None:
    """Rather than let hours of cases fail for one reason.

    Args:
        records: all there are, of other machines too.
        num_before: how many of them there were before this run.
        runner: of this run.

    Raises:
        RequestError: with that reason.
    """
    seen = list(records)[num_before:]
    if seen and not schedule.answered(records, runner.kind, _key(runner)):
        raise RequestError(f"no case came to its end, so nothing else is tried: {(seen[-1].error or '')[-1000:]}")


def _run_caps(
    campaign: campaigns.Campaign,
    runner: Runner,
    records: RecordFile,
    console: Console,
    *,
    cards: Sequence[str] | None,
    minutes: float | None,
) -> None:
    at_hand = capped.card_at_hand(runner)
    smaller = capped.smaller_cards(campaign.cards if cards is None else cards, at_hand)
    wanted = capped.trials(campaign.cases(), smaller, at_hand)
    budget = 60 * (minutes if minutes is not None else campaign.budget_minutes)
    for step in capped.run(wanted, _bounded(runner, budget), records, budget_seconds=budget):
        case, card = step.record.case, step.record.provenance.cap_card
        told = ", ".join(proof.policy for proof in step.proofs if proof.planned == case.batch_size) or "beside them"
        console.print(f"{card}: {named(case)} ({told}): {step.record.outcome}", highlight=False)
    show_proofs(proofs([one for one in records if one.kind is runner.kind]), runner.kind, console)


def _fit(files: Sequence[Path], out: Path | None, console: Console) -> None:
    """Writes or prints what records determine.

    Raises:
        RequestError: if that is nothing.
    """
    comparison = _comparison(files)
    if not comparison.corrections.groups:
        raise RequestError(f"nothing can be fitted: {comparison.why_nothing}")
    text = dumped(comparison.corrections)
    if out is None:
        print(text)
        return
    out.write_text(text + "\n", encoding="utf-8")
    show_comparison(comparison, console)
    console.print(f"written: {escape(str(out))} ({comparison.corrections.version})")


@app.command()
def submit(
    campaign: Annotated[str, typer.Option(help="Its name, or the path of a YAML file that the nodes see.")],
    folder: Annotated[Path, typer.Option(file_okay=False, help="Folder that all nodes see, for records and logs.")],
    jobs: Annotated[int, typer.Option(min=1, max=10_000, help="Into how many jobs the campaign is divided, a card each.")] = 4,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Budget of each job, instead of the campaign's.")] = None,
    cluster: Annotated[str | None, typer.Option(help="slurm, or local for processes on this machine.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm's.")] = None,
    device: Annotated[Device, typer.Option(help="cpu and trace are dry runs: nothing is measured.")] = Device.CUDA,
) -> None:
    """Divide a campaign into jobs of a Slurm cluster (submitit); `merge` puts their records together."""
    with _errors():
        declared = campaigns.read(campaign)
        submitted = on_slurm.submit(
            campaign,
            folder,
            num_jobs=jobs,
            minutes=minutes if minutes is not None else declared.budget_minutes,
            arguments=["--device", device.value],
            cluster=cluster,
            gpus=1 if device is Device.CUDA else 0,
            options={"slurm_partition": partition} if partition is not None else None,
        )
        console = Console()
        console.print(f"submitted: {', '.join(str(job.job_id) for job in submitted)}", highlight=False)
        console.print(f"then: vramplan calibrate merge {escape(str(folder))}/records-*.jsonl --out records.jsonl", highlight=False)


@app.command()
def merge(
    files: RecordFiles,
    out: Annotated[Path, typer.Option(help="The file that holds them all; what it has already stays.")],
) -> None:
    """Put records of several machines together, each once: merging again changes nothing."""
    with _errors():
        before = list(RecordFile(out))
        together = schedule.merged([before, *(RecordFile(path) for path in files)])
        part = out.with_name(f".{out.name}.part")
        part.unlink(missing_ok=True)
        whole = RecordFile(part)
        for record in together:
            whole.append(record)
        whole.path.replace(out) if together else out.touch()
        Console().print(f"{escape(str(out))}: {len(together)} records, {len(together) - len(before)} of them new", highlight=False)


@app.command()
def report(
    files: RecordFiles,
    out: Annotated[Path, typer.Option(help="The page: one HTML file that carries everything.")],
    svg: Annotated[Path | None, typer.Option(file_okay=False, help="Folder for the pictures as files, too.")] = None,
    published: Annotated[bool, typer.Option(help="Whether rows published by others stand beside the records.")] = True,
) -> None:
    """A page of predicted beside observed memory: scatter, terms, coverage, caps, worst cases, and what each row rests on."""
    with _errors():
        _report(files, out, svg, Console(), published=published)


def _report(files: Sequence[Path], out: Path, svg: Path | None, console: Console, *, published: bool) -> None:
    from app.calibration_page import report as page

    records = schedule.merged(RecordFile(path) for path in files)
    others, not_modelled = compare_all() if published else ((), ())
    today = datetime.now(UTC).date().isoformat()
    found = page(compared(*rows_of(records, predict), date=today), records, others, not_modelled, date=today)
    out.write_text(found.html, encoding="utf-8")
    if svg is not None:
        svg.mkdir(parents=True, exist_ok=True)
        for name, picture in found.pictures.items():
            (svg / f"{name}.svg").write_text(picture, encoding="utf-8")
    console.print(f"written: {escape(str(out))}", highlight=False)


@contextmanager
def _errors() -> Iterator[None]:
    """Whatever a user can be told ends in one line and exit code 1."""
    try:
        yield
    except (NoDeviceError, VramplanError, ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


def _warn_of_others(runner: Runner, console: Console) -> None:
    """Before time is spent: what others hold of the card, since records of a shared card enter no fit."""
    if runner.device is not Device.CUDA:
        return
    card = card_id(runner.gpu)
    used = used_bytes(card)
    if used is None or used <= CONTAMINATION_LIMIT_BYTES:
        return
    holders = (
        ", ".join(f"{one.name} (pid {one.pid})" for one in processes(card) or ()) or "whom the driver does not name; a desktop, perhaps"
    )
    console.print(
        f"[yellow]{gib(used)} of the card are in use by others: {escape(holders)}. Records are marked, and neither "
        "compared nor fitted: end them first (a desktop on the card counts too).[/yellow]"
    )


def _runner(device: Device, gpu: int, timeout: float) -> Runner:
    if device is Device.TRACE:
        return Runner(device=device, timeout_seconds=timeout, worker=_TRACED_WORKER)
    return Runner(device=device, gpu=gpu, timeout_seconds=timeout)


def _run_campaign(
    campaign: campaigns.Campaign,
    runner: Runner,
    records: RecordFile,
    console: Console,
    *,
    minutes: float | None,
    again: bool,
    share: Shard,
    ray: str | None,
) -> tuple[Case, ...]:
    """Runs what has no answer yet, and returns the cases that the budget did not reach, or that were lost on a cluster."""
    done = frozenset() if again else schedule.answered(records, runner.kind, None if ray is not None else _key(runner))
    budget = 60 * (minutes if minutes is not None else campaign.budget_minutes)
    runner = _bounded(runner, budget)
    for grid in campaign.grids:
        if grid.missing:
            console.print(f"grid {grid.name} is left out: it needs {', '.join(grid.missing)}")
    whole = campaign.cases()
    costs = _costs(whole)
    cases = share.take(whole, lambda case: costs[case.hash])
    waiting = schedule.pending(cases, done, lambda case: costs[case.hash])
    if len(waiting) < len(cases):
        console.print(f"{len(cases) - len(waiting)} of {len(cases)} cases are answered in {escape(str(records.path))} already")
    counts: Counter[Outcome] = Counter()
    reached: set[str] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, transient=True) as bar:

        def lost(case: Case, reason: str) -> None:
            bar.console.print(f"[yellow]lost[/yellow] {named(case)}: {escape(reason)}")

        task = bar.add_task(campaign.name, total=len(waiting), left="")
        common: dict[str, Any] = {
            "measure": runner.run,
            "records": records,
            "cost": lambda case: costs[case.hash],
            "budget_seconds": budget,
        }
        if ray is None:
            steps = schedule.run(waiting, **common)
        else:
            address = None if ray == "local" else ray
            steps = on_ray.run(waiting, **common, lost=lost, address=address, num_gpus=1 if runner.device is Device.CUDA else 0)
        for step in steps:
            counts[step.record.outcome] += 1
            reached.add(step.record.case_hash)
            bar.update(task, completed=step.num_done, left=f"about {step.remaining_seconds / 60:.0f} min left")
            if step.record.error and step.record.outcome is not Outcome.OOM:
                bar.console.print(f"[yellow]{step.record.outcome}[/yellow] {named(step.record.case)}: {escape(step.record.error[-300:])}")
    console.print(f"{campaign.name}: {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items())) or 'nothing run'}")
    left = tuple(case for case in waiting if case.hash not in reached)
    if left:
        console.print(f"{len(left)} cases are left; the same command goes on with them")
    return left


def _bounded(runner: Runner, budget_seconds: float) -> Runner:
    """The runner, with which a case that hangs does not cost several budgets."""
    return replace(runner, timeout_seconds=min(runner.timeout_seconds, max(_LEAST_TIMEOUT_SECONDS, budget_seconds)))


def _key(runner: Runner) -> tuple[str | None, ...]:
    """Of the environment that cases run in here."""
    return environment_here(gpu=card_name(card_id(runner.gpu)) if runner.device is Device.CUDA else None).key


def _costs(cases: Sequence[Case]) -> dict[str, float]:
    """How dear cases are, by hash: what each allocates; those that cannot be predicted come last [bytes]."""
    found = {case.hash: _cost(case) for case in cases}
    dearest = max((cost for cost in found.values() if cost is not None), default=0.0)
    return {name: dearest + 1 if cost is None else cost for name, cost in found.items()}


def _cost(case: Case) -> float | None:
    try:
        return float(predict(case, None).estimate.peak.allocated_bytes)
    except VramplanError:
        return None


def _comparison(files: Sequence[Path]) -> Comparison:
    records = schedule.merged(RecordFile(path) for path in files)
    return compared(*rows_of(records, predict))


def read_case(path: Path, *, batch_size: int | None = None, max_length: int | None = None, from_hub: bool = False) -> Case:
    """The case in a request file.

    Raises:
        VramplanError: if the file is no request, has no single run in it, or its model is not known.
    """
    request = read_request(str(path))
    training = request.get("training")
    if isinstance(training, dict):
        given = {"per_device_train_batch_size": batch_size, "max_length": max_length}
        request = {**request, "training": {**training, **{name: value for name, value in given.items() if value is not None}}}
    case = Case.from_request(request, config_of(request))
    return case.with_hub_weights(request.get("revision")) if from_hub else case
