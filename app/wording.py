"""The sentences that the terminal and the page share."""

from collections.abc import Iterator

from app.answer import REFUSALS, Json
from estimator.units import GIB, gib

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
    spare = "to spare" if fit["verdict"] == "fits" else f"left by the estimate, {_why_tight(fit)}"
    rest = f"{gib(free)} {spare}, {headroom}" if free >= 0 else f"{gib(-free)} missing, {headroom}"
    when = f" in {peak['phase']}" if peak else ""
    return f"{_VERDICTS[fit['verdict']]} on {card}{_but(answer)}: {need}{when}, of {gib(fit['capacity_bytes'])}; {rest}."


def is_refused(answer: Json) -> bool:
    """Whether the run would not start, however much memory there is."""
    return any(warning["code"] in REFUSALS for warning in answer["warnings"])


def _but(answer: Json) -> str:
    refused = [warning["code"] for warning in answer["warnings"] if warning["code"] in REFUSALS]
    return f", but would not run as it stands ({', '.join(refused)})" if refused else ""


def recipe_sentence(recipe: Json) -> str:
    """What was estimated, defaults of the libraries included."""
    training, inference = recipe["training"], recipe["inference"]
    if training is not None:
        parts = [*_method(recipe), *_training(training)]
    elif inference is not None:
        size = f"{inference['batch_size']} × {inference['prompt_length']:,} + {inference['max_new_tokens']:,} tokens"
        parts = [f"generation from {_weights(recipe)} weights", size, f"{inference['cache_implementation']} cache"]
    else:
        return f"the load of {_weights(recipe)} weights alone"
    if recipe["num_gpus"] > 1:
        parts.append(f"{recipe['num_gpus']} GPUs ({recipe['strategy']})")
    return ", ".join([*parts, f"{recipe['attn_implementation']} attention"])


def _weights(recipe: Json) -> str:
    quantization = recipe["quantization"]
    if quantization is None:
        return str(recipe["dtype"])
    if "load_in_8bit" in quantization:
        return "int8"
    return f"{'double-quantized ' if quantization['bnb_4bit_use_double_quant'] else ''}{quantization['bnb_4bit_quant_type']}"


def _method(recipe: Json) -> Iterator[str]:
    peft, task = recipe["peft"], recipe["task"]
    if task is not None and task["kind"] != "sft":
        yield str(task["kind"])
    if peft is None:
        yield f"full training of {_weights(recipe)} weights"
    else:
        targets = peft["target_modules"]
        on = "default modules" if targets is None else targets if isinstance(targets, str) else ", ".join(targets)
        yield f"{'DoRA' if peft['use_dora'] else 'LoRA'} r = {peft['r']} on {on or 'parameters'} over {_weights(recipe)} weights"
    if recipe["prepare_model_for_kbit_training"]:
        yield "prepare_model_for_kbit_training"


def _training(training: Json) -> Iterator[str]:
    steps = training["gradient_accumulation_steps"]
    yield f"batch {training['per_device_train_batch_size']} × {training['max_length']:,} tokens{f' × {steps} steps' if steps > 1 else ''}"
    yield str(training["optim"])
    yield next((name for name in ("bf16", "fp16") if training[name]), "no autocast")
    reentrant = " (reentrant)" if training["gradient_checkpointing_kwargs"]["use_reentrant"] else ""
    yield f"gradient checkpointing{reentrant}" if training["gradient_checkpointing"] else "no gradient checkpointing"
    if training["loss"] != "stock":
        yield f"loss {training['loss']}"
    for name in ("padded", "padding_free"):
        if training[name]:
            yield name


def _why_tight(fit: Json) -> str:
    retries = fit.get("num_alloc_retries")
    if retries is None:
        return "less than its margin for errors"
    return f"as the allocator gives its cache back {f'{times(retries)} in every step' if retries else 'in the first steps'}"


def times(number: int) -> str:
    """How often, in words."""
    return "once" if number == 1 else f"{number} times"


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
        f"(global batch {plan['global_batch_size']}); {gib(plan['margin_bytes'])} to spare{_longer(plan)}{_pressed(plan)}."
    )


def _pressed(plan: Json) -> str:
    fit = plan["estimate"]["fit"]
    return f", {_why_tight(fit)}" if "num_alloc_retries" in fit else ""


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
        told = f"Nothing fits for sure: the smallest batch is tight, {missing} short of its margin in {shortfall['phase']}."
    else:
        told = f"Nothing fits: the smallest batch is {missing} short in {shortfall['phase']}, the margin for errors included."
    found = shortfall["cache_given_back"]
    if found is None:
        return told
    batch, steps = found["per_device_train_batch_size"], found["gradient_accumulation_steps"]
    at = f"{batch} × {steps} at {found['max_length']:,} tokens"
    return f"{told} {at} runs if the allocator gives its cache back to make room (policy cache_given_back)."


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
    """What the step was worked out with, and why; without a reason there is no step."""
    reason = str(answer["engine_reason"])
    name = "closed forms" if answer["engine"] == "analytic" else "traced"
    if not reason:
        return "the load alone is known"
    return reason if reason.startswith(name) else f"{name} ({reason})"


_MOMENTS = {
    "load": "while loading",
    "forward": "in the forward pass",
    "loss": "in the loss",
    "backward": "in the backward pass",
    "optimizer_step": "in the optimizer step",
    "prefill": "while the prompt is read",
    "decode": "while tokens are generated",
}
_TEN_GIB = 10 * GIB


def headline(answer: Json, card: str | None) -> str:
    """The verdict as a page says it first: what is to spare or missing, the peak and its interval.

    Args:
        card: its name for people; None without one.
    """
    fit, peak = answer["fit"], answer["peak"]
    if peak is None:
        load = gib(answer["phases"][0]["allocated_bytes"])
        return f"Loading takes {load}; the step of this model is not modelled, so there is no verdict."
    need = peak["device_bytes"] or peak["allocated_bytes"]
    moment = f"{gib(need)} at the peak, {_MOMENTS[peak['phase']]}; {_bounds(peak['interval'])}"
    if fit is None:
        return f"Takes {moment}."
    number, free = answer["recipe"]["num_gpus"], fit["free_bytes"]
    where = f"{f'each of {number} × ' if number > 1 else ''}{card or 'the card'}"
    match fit["verdict"]:
        case "fits":
            return f"Fits on {where} with {gib(free)} to spare{_but(answer)}: {moment}."
        case "tight":
            return f"Tight on {where}{_but(answer)}: {gib(free)} to spare, {_why_tight(fit)}; {moment}."
        case _:
            return f"Does not fit on {where}: {gib(-free)} missing; {moment}."


def load_headline(answer: Json, card: str | None) -> str:
    """What a page says first while the step has still to be traced.

    Args:
        card: its name for people; None without one.
    """
    load = gib(answer["phases"][0]["allocated_bytes"])
    if answer["fit"] is not None:  # known from the load alone: it is too much
        return f"Does not fit on {card or 'the card'}: loading alone takes {load}."
    return f"Loading takes {load}; the step has to be traced for a verdict."


def _bounds(interval: Json | None) -> str:
    if interval is None:
        return "no interval, since too few measured runs are like it"
    low, high = interval["device_low_bytes"], interval["device_high_bytes"]
    digits = 1 if high >= _TEN_GIB else 2
    return f"{100 * interval['coverage']:.0f} % interval {low / GIB:.{digits}f} to {high / GIB:.{digits}f} GiB"


def change_sentence(setting: Json) -> str:
    """A change in one line, each field by the library's own name."""
    return ", ".join(f"{name.rpartition('.')[2]} = {value!r}" for name, value in _flat(setting) if value is not None)


def written_sentence(name: str, file: Json) -> str:
    """What became of a plan that was written as a file."""
    if file["device_bytes"] is None:
        return f"{name}: written."
    verdict = {True: ", which fits", False: ", which does not fit", None: ""}[file["fits"]]
    otherwise = f"; its trainer runs it otherwise ({'; '.join(file['differences'])})" if file["differences"] else ""
    return f"{name}: written; read back, it peaks at {gib(file['device_bytes'])}{verdict}{otherwise}."


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
