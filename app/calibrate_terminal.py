"""What `vramplan calibrate` tells a terminal: records, proofs under caps, and measured beside predicted."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from app.terminal import escape
from calibration.caps import Proof
from calibration.caps import sentences as caps_sentences
from calibration.case import Case
from calibration.comparison import Comparison
from calibration.record import Figures, Kind, Outcome, Record
from estimator.units import gib


def show(record: Record, console: Console) -> None:
    """One line on what came out, and the phases when something was measured."""
    if record.outcome is Outcome.OK and record.error is not None:  # the run was good, what was to be kept of it was not
        console.print(f"[yellow]{escape(record.error)}[/yellow]")
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
        "by the driver": figures.nvml_process_bytes,
    }


def show_proofs(found: Sequence[Proof], kind: Kind, console: Console) -> None:
    """Every recommendation with what the runs under its cap showed, and all of a policy in a sentence."""
    table = Table("card", "case", "policy", "planned", "true maximum", "planned / maximum", "verdict", box=None, pad_edge=False)
    for proof in found:
        runs = proof.runs
        largest = f"{max(runs.ran, default=0)} or more" if runs.largest is None else str(runs.largest)
        share = "" if proof.tightness is None else f"{proof.tightness:.0%}"
        verdict = proof.verdict.value if proof.planned else "none fits"
        name = escape(proof.case.model or str(proof.case.config.get("model_type")))
        table.add_row(proof.card, f"{name} × {proof.case.sequence_length}", proof.policy, str(proof.planned), largest, share, verdict)
    console.print(table)
    for told in caps_sentences(found, kind):
        console.print(told, highlight=False)


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Row by row, the spreads of errors, and what no fit may hide."""
    if comparison.as_modelled:
        rows = Table("record", "measured", "predicted", "allocated", "device", box=None, pad_edge=False)
        for error in comparison.as_modelled:
            figures = error.row.record.figures
            assert figures is not None
            rows.add_row(
                named(error.row.record.case),
                gib(figures.peak_allocated_bytes or 0),
                gib(error.row.prediction.estimate.peak.allocated_bytes),
                f"{error.allocated:+.2%}",
                "" if error.device is None else f"{error.device:+.2%}",
            )
        console.print(rows)
        table = Table("errors", "rows", "median", "within 3 %", "most under", "most over", box=None, pad_edge=False)
        for one in comparison.spreads:
            table.add_row(
                one.name,
                str(one.num_rows),
                f"{one.median:.2%}",
                f"{one.share_within_3_percent:.0%}",
                f"{one.worst_under:+.2%}",
                f"{one.worst_over:+.2%}",
            )
        console.print(table)
    else:
        console.print(f"nothing to compare: {comparison.why_nothing}")
    if comparison.num_shared:
        console.print(f"[yellow]{comparison.num_shared} records of a card that others were using are neither compared nor fitted[/yellow]")
    if comparison.coverage is not None:
        console.print(f"90 % intervals from other models hold for {comparison.coverage:.0%} of the rows")
    for bug in comparison.bugs:
        told = f"{bug.term} is exact, measured {bug.measured_bytes:,} B, predicted {bug.predicted_bytes:,} B"
        console.print(f"[red]bug[/red] {escape(bug.model)}: {told}")
    for row in comparison.contradicted:
        console.print(f"[red]out of memory where the prediction fits[/red] {named(row.record.case)}")
    for missing in comparison.unpredicted:
        console.print(f"[yellow]not compared[/yellow] {named(missing.record.case)}: {escape(missing.reason[:200])}")


def named(case: Case) -> str:
    """Model, batch and length, safe to print."""
    return f"{escape(case.model or str(case.config.get('model_type')))} {case.batch_size} × {case.sequence_length}"


def method_of(case: Case) -> str:
    """By what cases of one model differ: `4 bit, trl, gradient checkpointing`."""
    quantization = case.request.get("quantization")
    given = quantization if isinstance(quantization, dict) else {}
    bits = "4 bit" if given.get("load_in_4bit") else "8 bit" if given.get("load_in_8bit") else "16 bit"
    return ", ".join([bits, case.trainer, *(["gradient checkpointing"] if case.training.get("gradient_checkpointing") else [])])
