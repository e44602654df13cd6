"""Answers as people read them in a terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.markup import escape as without_markup
from rich.table import Table
from rich.text import Text

from app.answer import Json
from app.redaction import printable
from app.wording import (
    corrections_sentence,
    engine_phrase,
    is_refused,
    plan_sentence,
    recipe_sentence,
    setting_sentence,
    shortfall_sentence,
    verdict_sentence,
)
from estimator.units import gib

_COLOURS = {"fits": "green", "tight": "yellow", "does_not_fit": "red", None: "cyan"}
# Characters of the phase table without its bars.
_TABLE_WIDTH = 80
_EXACT, _NOT_EXACT = " ", "~"
_SHOWN_PROVIDERS = 3
_STORED = ("weights", "quantization_state", "buffers", "adapter_weights")
_EIGHTHS_UP = " ▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def escape(text: str) -> str:
    """What others may have named, as it stands: neither rich's markup nor commands of the terminal, which rich lets through."""
    return without_markup(printable(text))


def print_estimate(console: Console, answer: Json) -> None:
    """Verdict, table of phases and items, warnings."""
    verdict = answer["fit"]["verdict"] if answer["fit"] else None
    colour = _COLOURS["tight" if verdict == "fits" and is_refused(answer) else verdict]
    console.print(f"[bold {colour}]{escape(verdict_sentence(answer))}[/]", highlight=False)
    console.print(f"Estimated: {escape(recipe_sentence(answer['recipe']))}.", highlight=False)
    console.print(_context(answer), style="dim", highlight=False)
    console.print()
    console.print(_phase_table(answer, bar_width=max(4, min(24, console.width - _TABLE_WIDTH))))
    rest = "traced" if answer["engine"] == "trace" else "modelled"
    console.print(f"~ {rest}; all else is exact to the byte", style="dim", highlight=False)
    if "corrections" in answer:
        console.print(escape(corrections_sentence(answer["corrections"])), style="dim", highlight=False)
    _print_warnings(console, answer)


def print_plan(console: Console, answer: Json) -> None:
    """The plan or what is missing, then the estimate it rests on."""
    if answer["plan"] is not None:
        console.print(f"[bold green]{escape(plan_sentence(answer['plan']))}[/]", highlight=False)
        for other in answer["plan"]["alternatives"]:
            console.print(
                f"  or {other['per_device_train_batch_size']} × {other['gradient_accumulation_steps']}, "
                f"leaving {gib(other['margin_bytes'])}",
                style="dim",
                highlight=False,
            )
        console.print()
        print_estimate(console, answer["plan"]["estimate"])
        return
    shortfall = answer["shortfall"]
    console.print(f"[bold red]{escape(shortfall_sentence(shortfall))}[/]", highlight=False)
    if not any(change["fits"] for change in shortfall["changes"]):
        console.print("None of these changes is enough:", highlight=False)
    for change in shortfall["changes"]:
        saves = f"saves {gib(change['saves_bytes'])}" if change["saves_bytes"] > 0 else ""
        saves = f"{gib(change['adds_bytes'])} more to use" if change["adds_bytes"] > 0 else saves
        mark = ", ".join((*(["[green]fits[/]"] if change["fits"] else []), *([saves] if saves else [])))
        console.print(f"  {mark}: {escape(setting_sentence(change['set']))} ({escape(change['costs'])})", highlight=False)
    for advice in shortfall["advice"]:
        setting = ", ".join(f"{name}={value}" for name, value in advice["environment"].items())
        console.print(
            f"  may save up to {gib(advice['saves_at_most_bytes'])}: {escape(setting)} ({escape(advice['costs'])})", highlight=False
        )
    console.print()
    print_estimate(console, shortfall["estimate"])


def print_which(console: Console, answer: Json) -> None:
    """One line per card, what fits first."""
    table = Table(box=None, pad_edge=False)
    for name in ("gpu", "verdict"):
        table.add_column(name)
    for name in ("batch × steps", "tokens", "memory", "~tokens/s", "USD/h", "~USD/M tokens"):
        table.add_column(name, justify="right")
    table.add_column("at")
    for row in answer["gpus"]:
        verdict, price, offer, speed, cost = (row[key] for key in ("verdict", "usd_per_hour", "offer", "speed", "cost"))
        number = f"{row['num_gpus']} × " if row["num_gpus"] > 1 else ""
        table.add_row(
            escape(number + row["gpu"]),
            f"[{_COLOURS[verdict]}]{verdict.replace('_', ' ')}[/]{'*' if row['reserved_basis'] == 'modelled' else ''}"
            f"{'°' if row['emulates_bfloat16'] else ''}",
            f"{row['per_device_train_batch_size']} × {row['gradient_accumulation_steps']}" if verdict == "fits" else "–",
            f"{row['max_length']:,}" if verdict == "fits" else "–",
            f"{gib(row['margin_bytes'])} to spare" if verdict == "fits" else f"{gib(row['missing_bytes'])} missing",
            "–" if speed is None else f"{speed['tokens_per_second']:,.0f}",
            "–" if price is None else f"{price[0]:.2f}" if price[0] == price[1] else f"{price[0]:.2f}–{price[1]:.2f}",
            "–" if cost is None else f"{cost['usd_per_million_tokens']:.2f}",
            "" if offer is None else escape(f"{offer['provider']} ({offer['date']})"),
        )
    console.print(table)
    notes = ["~ a first estimate, from FLOPs and bandwidth; the lowest price of those known, on their date"]
    if any(row["reserved_basis"] == "modelled" for row in answer["gpus"]):
        notes.append("* modelled: what the allocator caches was not replayed; near a border a plan for the card may say otherwise")
    if any(row["emulates_bfloat16"] for row in answer["gpus"]):
        notes.append("° has no bfloat16 of its own, which is emulated slowly or refused; ask for float16, or filter by bf16")
    if any(row["verdict"] == "tight" for row in answer["gpus"]):
        notes.append("tight: the estimate fits, what is missing is its margin for errors")
    for note in notes:
        console.print(note, style="dim", highlight=False)


def print_sweep(console: Console, answer: Json) -> None:
    """The largest batch that fits at each length, or the largest device bytes where no card is named."""
    batches = answer["per_device_train_batch_size"]
    points = len(batches) * len(answer["max_length"]) * len(answer["grids"])
    console.print(f"{points:,} points at gradient_accumulation_steps {answer['gradient_accumulation_steps']}", style="dim", highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("max_length", justify="right")
    for grid in answer["grids"]:
        what = f"device bytes at batch {batches[-1]}" if grid["frontier"] is None else "largest batch that fits"
        table.add_column(what + (f", r = {grid['r']}" if grid["r"] is not None else ""), justify="right")
    for column, length in enumerate(answer["max_length"]):
        table.add_row(f"{length:,}", *(_frontier_cell(grid, column) for grid in answer["grids"]))
    console.print(table)
    if any(grid["frontier"] is None or "modelled" in grid["frontier_basis"] for grid in answer["grids"]):
        console.print("* modelled: what the allocator caches was not replayed; a plan may find another batch", style="dim", highlight=False)


def _frontier_cell(grid: Json, column: int) -> str:
    if grid["frontier"] is None:
        return f"{gib(grid['device_bytes'][-1][column])}*"
    return f"{grid['frontier'][column] or 'none'}{'*' if grid['frontier_basis'][column] == 'modelled' else ''}"


def print_trace(console: Console, answer: Json) -> None:
    """Memory over time, each phase's peak with what is alive in it, and the allocator."""
    peak, allocator, timeline = answer["peak"], answer["allocator"], answer["timeline"]
    console.print(
        f"[bold cyan]Peak {gib(peak['allocated_bytes'])} allocated in {peak['phase']}[/]; the allocator holds "
        f"{gib(allocator['reserved_at_peak_bytes'])} then, {gib(allocator['max_reserved_bytes'])} at most",
        highlight=False,
    )
    number, steps = timeline["num_allocations"], "the loaded model and two optimizer steps"
    console.print(f"{number:,} allocations: {steps}", style="dim", highlight=False)
    console.print()
    _print_skyline(console, timeline["columns"])
    for phase in answer["phases"]:
        console.print(f"\n[bold]{phase['phase']}[/] {gib(phase['allocated_bytes'])}", highlight=False)
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1, 0, 2))
        for justify in ("right", "left", "right", "left"):
            table.add_column(justify="right" if justify == "right" else "left", overflow="fold")
        # beside what is stored all the time, which `load` shows
        rows = [row for row in phase["largest"] if phase["phase"] == "load" or row["item"] not in _STORED]
        for row in rows[:5]:
            kind = f"{row['dtype']} {row['shape']}"
            table.add_row(gib(row["bytes"]), row["item"], f"{row['count']} ×", escape(f"{kind}  {row['module']} {row['operator']}"))
        console.print(table)
    _print_notices(console, answer)


def _print_skyline(console: Console, columns: Iterable[Json]) -> None:
    """One character a stretch of events, eight rows high, phases named below."""
    width, height = max(20, min(console.width - 10, 100)), 8
    shown = list(columns)
    groups = [shown[len(shown) * n // width : max(len(shown) * (n + 1) // width, len(shown) * n // width + 1)] for n in range(width)]
    tops = [max((c["allocated_bytes"] for c in group), default=0) for group in groups]
    highest = max(tops, default=0) or 1
    for row in range(height, 0, -1):
        line = "".join(_EIGHTHS_UP[max(0, min(8, round((top / highest * height - row + 1) * 8)))] for top in tops)
        label = gib(highest) if row == height else ""
        console.print(f"{label:>9} [cyan]{line}[/]", highlight=False)
    phases = [group[0]["phase"] for group in groups]
    marks = "".join(phase[0] if n == 0 or phases[n - 1] != phase else "·" for n, phase in enumerate(phases))
    console.print(f"{'':>9} {marks}   l load, f forward, l loss, b backward, o optimizer_step", style="dim", highlight=False)


def print_models(console: Console, models: Iterable[Json]) -> None:
    """One line per catalogue model."""
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("type")
    table.add_column("parameters", justify="right")
    for model in models:
        table.add_row(escape(model["id"]), escape(model["model_type"]), f"{model['num_parameters']:,}")
    console.print(table)


def print_gpus(console: Console, gpus: Sequence[Json]) -> None:
    """One line per known card."""
    table = Table(box=None, pad_edge=False)
    for name in ("gpu", "name"):
        table.add_column(name)
    for name in ("capacity", "compute capability", "bandwidth", "USD/h"):
        table.add_column(name, justify="right")
    table.add_column("offered by", overflow="fold")
    for gpu in gpus:
        bandwidth = gpu["memory_bandwidth_bytes_per_second"]
        table.add_row(
            escape(gpu["id"]),
            escape(gpu["name"]),
            gib(gpu["capacity_bytes"]),
            gpu["compute_capability"],
            f"{bandwidth / 1e9:,.0f} GB/s" if bandwidth else "",
            _prices(gpu["offers"]),
            escape(_some(gpu["providers"])),
        )
    console.print(table)
    dates = sorted({offer["date"] for gpu in gpus for offer in gpu["offers"]})
    if dates:
        console.print(
            f"prices as of {dates[0]} to {dates[-1]}, for one card of a machine; sources with --json", style="dim", highlight=False
        )


def _some(names: Sequence[str]) -> str:
    """As many names as fit a column, and how many more there are."""
    return ", ".join(names[:_SHOWN_PROVIDERS]) + (f" +{len(names) - _SHOWN_PROVIDERS}" if len(names) > _SHOWN_PROVIDERS else "")


def _prices(offers: Sequence[Json]) -> str:
    """The range over all offers, for one card [USD/h]."""
    paid = [[price / offer["count"] for price in offer["usd_per_hour"]] for offer in offers if offer["usd_per_hour"][1]]
    free = "free, " if len(paid) < len(offers) else ""
    if not paid:
        return free.removesuffix(", ")
    low, high = min(price[0] for price in paid), max(price[1] for price in paid)
    return f"{free}{low:.2f}" if low == high else f"{free}{low:.2f}–{high:.2f}"


def print_inspection(console: Console, inspection: Json) -> None:
    """The parameter table of one model."""
    model = inspection["model"]
    console.print(
        f"[bold]{escape(model['id'] or model['model_type'])}[/]: {model['num_parameters']:,} parameters, "
        f"{escape(inspection['model_class'])}",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False)
    for name, justify in (("tensor", "left"), ("shape", "left"), ("copies", "right"), ("parameters", "right"), ("module", "left")):
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    for row in inspection["tensors"]:
        shape = " × ".join(map(str, row["shape"]))
        note = f" → {row['tied_to']}" if row["tied_to"] else "" if row["role"] == "parameter" else f" ({row['role']})"
        table.add_row(escape(row["name"] + note), shape, str(row["copies"]), f"{row['num_parameters']:,}", escape(row["module_class"]))
    console.print(table)


def bar(share: float, width: int) -> str:
    """A bar of `width` characters filled to `share`, in eighths of a character."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def _phase_table(answer: Json, *, bar_width: int) -> RenderableType:
    phases = answer["phases"]
    peak = max(phase["allocated_bytes"] for phase in phases)
    items = list(dict.fromkeys(item["name"] for phase in phases for item in phase["items"]))
    bytes_of = {(phase["phase"], item["name"]): item["bytes"] for phase in phases for item in phase["items"]}
    # a tilde marks what is not exact to the byte
    marks = {
        (phase["phase"], item["name"]): _EXACT if item["basis"] == "exact" else _NOT_EXACT for phase in phases for item in phase["items"]
    }
    table = Table(box=None, pad_edge=False, show_footer=True, padding=(0, 1, 0, 0))
    table.add_column("item", footer=Text("allocated", style="bold"), no_wrap=True)
    for phase in phases:
        is_peak = phase["allocated_bytes"] == peak
        footer = Text(gib(phase["allocated_bytes"]) + _EXACT, style="bold red" if is_peak else "bold")
        table.add_column(phase["phase"], justify="right", footer=footer, no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in items:
        sizes = [bytes_of.get((phase["phase"], name)) for phase in phases]
        largest = max(size or 0 for size in sizes)
        cells = [f"{gib(size)}{marks[phase['phase'], name]}" if size else f"–{_EXACT}" for phase, size in zip(phases, sizes, strict=True)]
        table.add_row(name, *cells, Text(bar(largest / peak if peak else 0.0, bar_width), style="cyan"))
    return table


def _print_notices(console: Console, answer: Json) -> None:
    if answer["warnings"]:
        console.print()
    for warning in answer["warnings"]:
        console.print(f"[yellow]{escape(warning['code'])}[/] {escape(warning['message'])}", highlight=False)


def _print_warnings(console: Console, answer: Json) -> None:
    _print_notices(console, answer)
    if answer["ignored"]:
        console.print(f"no bearing on memory: {escape(', '.join(answer['ignored']))}", style="dim", highlight=False)


def _context(answer: Json) -> str:
    model, counts, versions = answer["model"], answer["parameters"], answer["stack"]
    return escape(
        f"{model['id'] or model['model_type']}: {counts['total']:,} parameters, {counts['trainable']:,} trainable; "
        f"transformers {versions['transformers']}, peft {versions['peft']}, bitsandbytes {versions['bitsandbytes']}, "
        f"trl {versions['trl']}; {engine_phrase(answer)}"
    )
