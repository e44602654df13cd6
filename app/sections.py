"""What each part of the page shows, found out by the same calls as everywhere, and worded so that templates only place things."""

from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum

from markupsafe import Markup

from app import copies
from app.answer import NOT_MODELLED, Json, is_modelled
from app.card import Card, card_of
from app.chart import chart_of, largest_bytes, usable_bytes
from app.form import Form
from app.holding import cards_that_hold
from app.plan import plan
from app.reading import Question, read_estimate
from app.request import Request
from app.service import Case, answer_of, is_at_hand, prepare, render
from app.shortfall import Shortage, changes
from app.sweep import answer_sweep, svg_of, sweep
from app.trace import svg_of as timeline_of
from app.trace import trace
from app.trainer_files.writing import written
from app.wording import engine_phrase, headline, load_headline, plan_sentence, recipe_sentence, shortfall_sentence, written_sentence
from estimator.errors import RequestError, VramplanError
from estimator.units import gib

_NUM_BATCHES, _NUM_LENGTHS = 16, 16
_LENGTH_STEP = 128
_MIN_LENGTHS = 4096
_SHOWN_CARDS = 12
_SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length")
_SHOWN_CHANGES = 12


class Patience(IntEnum):
    """What an answer waits for."""

    NONE = 0
    MODEL = 1
    """The Hub, and the process that builds a model from its config."""
    STEP = 2
    """That, and a trace."""


def answered(form: Form, origin: str, patience: Patience = Patience.STEP) -> Json | None:
    """The answer to the form, with the recipe it is compared with beside it.

    Args:
        origin: of the service.
        patience: what to wait for. Without the model there is no answer yet, and None is returned; without the step what is stored after
            loading is answered for, and `is_waiting` says that the rest is still to come.

    Raises:
        VramplanError: if the request or the model cannot be answered for.
    """
    request = form.request()
    question, beside = read_estimate(request), _asked_beside(form)
    if patience < Patience.MODEL and not (is_at_hand(question.request) and (beside is None or _is_at_hand(beside))):
        return None
    case, other_case = prepare(question), _prepared_beside(beside)
    if patience < Patience.STEP and any(one.answerer.has_to_trace(one.recipe) for one in (case, other_case) if one is not None):
        return _of_load(case, request, origin)
    found = answer_of(case)
    other = None if other_case is None else _answered_beside(other_case)
    view = _view(case.card, found, at_least=0 if other is None else largest_bytes(other))
    view["other"] = None if other is None or other_case is None else _view(other_case.card, other, at_least=largest_bytes(found))
    view["differences"] = [] if other is None else list(_differences(found, other))
    view["copies"] = _copies(request, origin)
    view["is_waiting"] = False
    # Each edit of a traced model would trace anew: there the rest waits until it is asked for.
    view["is_quick"] = found["engine"] == "analytic"
    view["is_modelled"] = found["peak"] is not None
    view["is_training"] = request.get("training") is not None and found["peak"] is not None
    return view


def _of_load(case: Case, request: Json, origin: str) -> Json:
    """What is known before the step is traced."""
    found = render(case, case.answerer.loaded(case.recipe))
    found["warnings"] = [warning for warning in found["warnings"] if warning["code"] != NOT_MODELLED]
    said: Json = {"headline": load_headline(found, _name(case.card)), "copies": _copies(request, origin), "other": None, "differences": []}
    waiting = {"is_waiting": True, "is_quick": False, "is_modelled": False, "is_training": False}
    return _view(case.card, found, at_least=0) | said | waiting


def _copies(request: Json, origin: str) -> Json:
    return {"curl": copies.as_curl(request, origin), "JSON": copies.as_json(request), "command line": copies.as_command(request)}


def _name(card: Card | None) -> str | None:
    return None if card is None else card.name


def _view(card: Card | None, found: Json, *, at_least: int) -> Json:
    return {
        "answer": found,
        "headline": headline(found, _name(card)),
        "verdict": found["fit"]["verdict"] if found["fit"] else "unknown",
        "usable": usable_bytes(found),
        "engine": engine_phrase(found),
        "recipe": recipe_sentence(found["recipe"]),
        "chart": chart_of(found, at_least=at_least),
    }


def _asked_beside(form: Form) -> Question[Request] | None:
    """The recipe to compare with; None where there is none, or it cannot be read."""
    if (beside := form.beside) is None:
        return None
    try:
        return read_estimate(beside.request())
    except VramplanError:
        return None


def _is_at_hand(beside: Question[Request]) -> bool:
    try:
        return is_at_hand(beside.request)
    except VramplanError:
        return True  # it is left out


def _prepared_beside(beside: Question[Request] | None) -> Case | None:
    try:
        return None if beside is None else prepare(beside)
    except VramplanError:
        return None


def _answered_beside(case: Case) -> Json | None:
    try:
        return answer_of(case)
    except VramplanError:
        return None


def _differences(found: Json, other: Json) -> Iterator[Json]:
    """Choices of the recipe in which two answers differ, then their phases and items."""
    ours, theirs = (
        dict(_leaves({"model": found["model"]["id"], **found["recipe"]})),
        dict(_leaves({"model": other["model"]["id"], **other["recipe"]})),
    )
    for name in dict.fromkeys((*ours, *theirs)):
        if ours.get(name) != theirs.get(name):
            yield {"name": name, "this": _shown(ours.get(name)), "other": _shown(theirs.get(name)), "by": ""}
    mine, its = _sizes(found), _sizes(other)
    for name in dict.fromkeys((*mine, *its)):
        here, there = mine.get(name, 0), its.get(name, 0)
        if here != there:
            sign = "+" if here > there else "−"
            yield {"name": name, "this": gib(here), "other": gib(there), "by": f"{sign}{gib(abs(here - there))}"}


def _leaves(value: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, inner


def _shown(value: object) -> str:
    return "–" if value in (None, [], "") else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sizes(found: Json) -> dict[str, int]:
    """Peak figures, phases, and the items of the peak [bytes]."""
    peak = found["peak"]
    sizes = {} if peak is None else {f"peak, {name}": peak[f"{name}_bytes"] or 0 for name in ("device", "reserved", "allocated")}
    sizes |= {phase["phase"]: phase["allocated_bytes"] for phase in found["phases"]}
    return sizes | {
        f"{item['name']} at the peak": item["bytes"]
        for phase in found["phases"]
        if peak is not None and phase["phase"] == peak["phase"]
        for item in phase["items"]
    }


def planned(form: Form) -> Json:
    """The plan for the card: the largest micro-batch of the global batch, or what is missing."""
    _need_card(form)
    found = plan(form.plan_request())
    if found["plan"] is None:
        return {"sentence": shortfall_sentence(found["shortfall"]), "use": None, "others": [], "advice": found["shortfall"]["advice"]}
    made = found["plan"]
    return {
        "sentence": plan_sentence(made),
        "use": _sized(form, made),
        "others": [{**other, "address": _sized(form, other)} for other in made["alternatives"]],
        "margin": made["policy"]["margin"],
        "longest": _longest(form, made),
        "advice": [],
    }


def _longest(form: Form, made: Json) -> Json | None:
    longest = made["longest_max_length"]
    if longest is None or longest <= made["max_length"]:
        return None
    return {"max_length": longest, "address": _sized(form, {**made, "max_length": longest})}


def _sized(form: Form, sizes: Json) -> str | None:
    """The address of the form with the sizes of a plan."""
    return form.changed({f"training.{name}": sizes[name] for name in _SIZES}).address


def changed(form: Form) -> Json:
    """What could be changed so that the run fits, each with the form that has it."""
    _need_card(form)
    request = form.request()
    case = prepare(read_estimate(request))
    training = case.recipe.training
    if training is None:
        raise RequestError("training: changes are looked for in training runs only", field="training")
    estimate = case.answerer.estimate(case.recipe)
    if not is_modelled(estimate):
        raise RequestError("model: its training step is not modelled", field="model")
    found = changes(
        Shortage(
            case=case,
            estimate=estimate,
            payload=request,
            global_batch=training.micro_batch_size * training.gradient_accumulation_steps,
        )
    )
    rows = [{**change, "address": form.changed(change["set"]).address} for change in found[:_SHOWN_CHANGES]]
    return {"changes": rows}


def cards(form: Form) -> Json:
    """Which cards fit, with the best batch on each and its price."""
    request = form.cards_request()
    is_planned = request.get("training") is not None
    found = plan(request)["gpus"] if is_planned else cards_that_hold(form.request(), str(request["hardware"].get("filter", "")))
    fitting = [row for row in found if row["verdict"] == "fits"]
    rows = [{**row, "address": _on_card(form, row)} for row in fitting]
    others = len(found) - len(fitting)
    return {"cards": rows[:_SHOWN_CARDS], "more": rows[_SHOWN_CARDS:], "num_others": others, "is_planned": is_planned}


def _on_card(form: Form, row: Json) -> str | None:
    """The address of the form on a card of the list, with the sizes planned for it."""
    setting = {"hardware.gpu": row["gpu"], "hardware.capacity_gib": None, "hardware.nvidia_smi": None}
    if "strategy" in row:
        number = row["num_gpus"]
        setting |= {"hardware.num_gpus": number if number > 1 else None, "hardware.strategy": row["strategy"] if number > 1 else None}
        setting |= {f"training.{name}": row[name] for name in _SIZES}
    return form.changed(setting).address


def grid(form: Form) -> Json:
    """Micro-batch by length as a picture, and the largest batch at each length."""
    request = form.request()
    case = prepare(read_estimate(request))
    training = case.recipe.training
    if training is None:
        raise RequestError("training: the grid is over sizes of a training run", field="training")
    limit = case.inventory.num_positions or 2**24
    longest = min(max(_MIN_LENGTHS, 2 * training.sequence_length), limit)
    step = max(1, longest // _NUM_LENGTHS // _LENGTH_STEP * _LENGTH_STEP or longest // _NUM_LENGTHS)
    axes = {
        "per_device_train_batch_size": f"1..{max(_NUM_BATCHES, 2 * training.micro_batch_size)}",
        "max_length": f"{step}..{longest // step * step}:{step}",
    }
    swept = sweep({**request, "sweep": axes})
    told = answer_sweep(swept)
    frontier = told["grids"][0]["frontier"]
    rows = [
        {"max_length": length, "batch": batch, "address": _at(form, batch, length)}
        for length, batch in zip(told["max_length"], frontier or (), strict=False)
    ]
    return {"picture": Markup(svg_of(swept, standalone=False)), "frontier": rows, "largest": told["per_device_train_batch_size"][-1]}


def _at(form: Form, batch: int | None, length: int) -> str | None:
    if batch is None:
        return None
    return form.changed({"training.per_device_train_batch_size": batch, "training.max_length": length}).address


def timeline(form: Form) -> Json:
    """Memory over a step of the traced run."""
    return {"picture": Markup(timeline_of(trace(form.request()), standalone=False))}


_FILES = (
    ("TRL script", "trl", "train.py"),
    ("axolotl YAML", "axolotl", "axolotl.yml"),
    ("LLaMA-Factory YAML", "llamafactory", "llamafactory.yml"),
)


def files(form: Form) -> Json:
    """The run as trainers read it; where one has no words for it, its reason."""
    return {"files": [_file(form.request(), *names) for names in _FILES]}


def _file(request: Json, title: str, kind: str, name: str) -> Json:
    try:
        found = written(request, kind, name).rendered()
    except VramplanError as refused:
        return {"title": title, "text": "", "said": refused.message}
    return {"title": title, "text": found["content"], "said": "" if found["device_bytes"] is None else written_sentence(name, found)}


SECTIONS: Mapping[str, Callable[[Form], Json]] = {
    "plan": planned,
    "changes": changed,
    "cards": cards,
    "grid": grid,
    "timeline": timeline,
    "files": files,
}
QUICK = ("plan", "cards", "grid")
"""What `show=all` brings; the others take longer, and wait until they are asked for by name."""
TRACED = "timeline"
"""What runs the libraries."""
LONG = (*QUICK, "changes")
"""What evaluates many runs; what is left writes files."""


def _need_card(form: Form) -> None:
    if card_of(read_estimate(form.request()).request.hardware) is None:
        raise RequestError("hardware: needs a card; pick a GPU or give its capacity", field="hardware")
