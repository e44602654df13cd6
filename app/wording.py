"""The sentences that the terminal and the page share."""

from collections.abc import Iterator

from app.answer import Json
from estimator.units import gib

_VERDICTS = {"fits": "Fits", "tight": "Tight", "does_not_fit": "Does not fit"}


def verdict_sentence(answer: Json) -> str:
    """The answer in one sentence."""
    fit, peak = answer["fit"], answer["peak"]
    need = _need(answer)
    if fit is None:
        return f"{need[0].upper()}{need[1:]}."
    card = fit["gpu"] or "the card"
    free = fit["free_bytes"]
    taken = f" and {gib(fit['occupied_bytes'])} in use by others" if fit.get("occupied_bytes") else ""
    headroom = f"with {gib(fit['headroom_bytes'])} kept free{taken}"
    rest = f"{gib(free)} to spare, {headroom}" if free >= 0 else f"{gib(-free)} missing, {headroom}"
    when = f" in {peak['phase']}" if peak else ""
    return f"{_VERDICTS[fit['verdict']]} on {card}: {need}{when}, of {gib(fit['capacity_bytes'])}; {rest}."


def _need(answer: Json) -> str:
    peak = answer["peak"]
    if peak is None:
        load = answer["phases"][0]["allocated_bytes"]
        return f"loading takes {gib(load)}; the step of this model is not modelled"
    device = peak["device_bytes"]
    if device is None:
        return f"peak {gib(peak['allocated_bytes'])} allocated"
    return f"peak {gib(device)} on the device ({gib(peak['allocated_bytes'])} allocated)"


def plan_sentence(plan: Json) -> str:
    """The plan in one sentence."""
    return (
        f"per_device_train_batch_size {plan['per_device_train_batch_size']} × "
        f"gradient_accumulation_steps {plan['gradient_accumulation_steps']} at {plan['max_length']:,} tokens "
        f"(global batch {plan['global_batch_size']}); {gib(plan['margin_bytes'])} to spare{_longer(plan)}."
    )


def _longer(plan: Json) -> str:
    longest = plan["longest_max_length"]
    return f"; up to {longest:,} tokens fit" if longest is not None and longest > plan["max_length"] else ""


def check_sentence(answer: Json) -> str:
    """A check in one line: verdict, sizes, and the smallest change."""
    card = answer["gpu"] or "the card"
    need = f"{gib(answer['required_bytes'])} with its margin, of {gib(answer['usable_bytes'])} usable"
    text = f"{answer['verdict']}: {card}, peak {gib(answer['device_bytes'])} in {answer['phase']}, {need}"
    if not answer["missing_bytes"]:
        return text
    change = answer["change"]
    told = f"smallest change: {setting_sentence(change['set'])} ({change['costs']})" if change else "no change found that makes it fit"
    return f"{text}; {gib(answer['missing_bytes'])} missing; {told}"


def shortfall_sentence(shortfall: Json) -> str:
    """What is missing, in one sentence."""
    fit, missing = shortfall["estimate"]["fit"], gib(shortfall["missing_bytes"])
    if fit is not None and fit["verdict"] == "tight":
        return f"Nothing fits for sure: the smallest batch is tight, {missing} short of its margin in {shortfall['phase']}."
    return f"Nothing fits: the smallest batch is {missing} short in {shortfall['phase']}, the margin for errors included."


def setting_sentence(setting: Json) -> str:
    """The fields of a change, one by one, as Python writes their values."""
    return ", ".join(f"{name} = {value!r}" for name, value in _flat(setting))


def _flat(setting: Json, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in setting.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def engine_phrase(answer: Json) -> str:
    """What the step was worked out with, and why."""
    return f"{'closed forms' if answer['engine'] == 'analytic' else 'traced'} ({answer['engine_reason']})"


def corrections_sentence(told: Json) -> str:
    """What was corrected, and on what evidence."""
    if told["not_applied"] is not None:
        return f"corrections {told['version']} are not applied: {told['not_applied']}"
    terms = ", ".join(
        f"{row['term'].replace('_', ' ')} × {row['factor']:.3f} ({row['num_measurements']} measurements of {row['num_models']} models, "
        f"off by up to {row['worst_error']:.1%}, {row['group']})"
        for row in told["terms"]
    )
    return f"corrections {told['version']} ({told['evidence']}): {terms}"
