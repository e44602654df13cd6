"""Which cards a run fits: every card of the catalogue, with the best plan on each and its price.

Hundreds of plans are asked for at once, with what the allocator caches modelled. Those for single cards are then confirmed with the
allocator replayed, as a plan for one card is, in the order of the list and as far as `MAX_REPLAYS` goes; each row says which it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from app.answer import SCHEMA_VERSION, VERDICTS, Json, device_bytes
from app.card import card_for
from app.evaluation import evaluator_of
from app.levers import NATIVE_BFLOAT16, computes_in_bfloat16
from app.prices import current, price_json
from app.request import PlanRequest
from app.search import Search
from app.service import Case
from app.shortfall import required_bytes
from estimator.choice import NEWER_KERNELS, Choice, Machine, choices
from estimator.errors import RequestError
from estimator.gpu_filter import GpuFilter, split_words
from estimator.gpus import Gpu, Vendor, all_gpus
from estimator.grid import Evaluator
from estimator.inventory import Inventory
from estimator.offers import Offer, cheapest
from estimator.parallelism.options import Parallel, Strategy
from estimator.phases import Basis
from estimator.planner import Goal
from estimator.recipe import Recipe
from estimator.throughput import StepWork, step_work, time_of

_LAST = float("inf")
# Sizes that are replayed for one list: four take about a second.
MAX_REPLAYS = 16
# What "sort" may say: the smallest of it comes first.
SORTS: dict[str, Callable[[Json], float]] = {
    "price": lambda row: row["usd_per_hour"][0] if row["usd_per_hour"] else _LAST,
    "margin": lambda row: -row["margin_bytes"],
    "batch": lambda row: -row["per_device_train_batch_size"] * row["num_gpus"],
    "length": lambda row: -row["max_length"],
    "memory": lambda row: row["capacity_bytes"],
    "speed": lambda row: -row["speed"]["tokens_per_second"] if row["speed"] else _LAST,
    "cost": lambda row: _LAST if row["cost"] is None else row["cost"]["usd_per_million_tokens"],
}


def which(request: PlanRequest, case: Case, goal: Goal) -> Json:
    """Every card that passes the filter, with the best size on it: what fits first, then as asked.

    Raises:
        RequestError: if the filter cannot be read or leaves no card, or the step is not modelled.
    """
    hardware = request.hardware
    wanted = GpuFilter.parse((hardware.filter if hardware is not None else None) or "", field="hardware.filter", book=current())
    headroom = hardware.headroom if hardware is not None else None
    strategy = Strategy.DDP if hardware is None or hardware.strategy == "single" else Strategy(hardware.strategy)
    machines = [
        Machine(gpu=gpu, num_gpus=number, usable_bytes=usable)
        for gpu in _cards(wanted)
        for usable in (card_for(gpu, headroom).usable_bytes,)
        for number in wanted.counts()
        if wanted.accepts(gpu, number) and not (request.global_batch_size or 0) % number
    ]
    if not machines:
        raise _nothing_left(hardware.filter if hardware is not None else None, wanted, request.global_batch_size)
    recipes: dict[tuple[object, ...], Recipe] = {}
    quick: set[tuple[object, ...]] = set()

    def answered(machine: Machine) -> tuple[Evaluator, Goal]:
        spread = strategy if machine.num_gpus > 1 else Strategy.SINGLE
        recipe = _on(machine.gpu, case.recipe)
        recipe = replace(recipe, parallel=replace(recipe.parallel, strategy=spread, num_gpus=machine.num_gpus))
        recipes[machine.kind] = recipe
        evaluator = evaluator_of(case, recipe)
        if evaluator.is_quick:
            quick.add(machine.kind)
        return evaluator, replace(goal, num_gpus=machine.num_gpus)

    works = _Works(inventory=case.inventory, recipes=recipes)
    is_bfloat16 = computes_in_bfloat16(case.recipe)

    def shown(choice: Choice, basis: Basis) -> Json:
        offer = cheapest_of(choice, wanted)
        emulates = is_bfloat16 and choice.machine.gpu.compute_capability < NATIVE_BFLOAT16
        row = _row(choice, strategy, offer, basis) | {"emulates_bfloat16": emulates}
        return row | _speed(choice, works, offer, request.epoch_tokens)

    def order(row: Json) -> tuple[object, ...]:
        return VERDICTS.index(row["verdict"]), SORTS[request.sort](row), row["capacity_bytes"]

    found = [(shown(choice, Basis.MODELLED), choice) for choice in choices(machines, answered)]
    if request.confirm:
        searched: set[tuple[object, ...]] = set()
        for place, (_, choice) in sorted(enumerate(found), key=lambda pair: order(pair[1][0])):
            # a traced step would be traced anew for each card
            if choice.machine.num_gpus == 1 and choice.machine.kind in quick and len(searched) < MAX_REPLAYS:
                recipe = _on(choice.machine.gpu, recipes[choice.machine.kind])
                confirmed = _confirmed(case, recipe, choice.machine, headroom, goal, searched)
                found[place] = shown(confirmed, Basis.REPLAYED), confirmed
    rows = sorted((row for row, _ in found), key=order)
    return {"schema_version": SCHEMA_VERSION, "plan": None, "shortfall": None, "gpus": rows}


def _on(gpu: Gpu, recipe: Recipe) -> Recipe:
    return replace(recipe, compute_capability=gpu.compute_capability, num_multiprocessors=gpu.num_sms)


def _confirmed(
    case: Case, recipe: Recipe, machine: Machine, headroom: int | str | None, goal: Goal, searched: set[tuple[object, ...]]
) -> Choice:
    """What a plan for the card alone would find."""
    card = card_for(machine.gpu, headroom)
    search = Search(case=case.on(card, recipe), goal=replace(goal, num_gpus=1), replayed=searched)
    sizes = search.found(evaluator_of(search.case, recipe))
    asked = search.goal.smallest() if sizes is None else sizes
    outcome = search.outcome(asked)
    return Choice(
        machine=machine,
        fits=sizes is not None,
        micro_batch_size=int(asked.batch[0]),
        gradient_accumulation_steps=int(asked.steps[0]),
        sequence_length=int(asked.length[0]),
        device_bytes=device_bytes(outcome.estimate),
        required_bytes=required_bytes(outcome.recipe, card, outcome.estimate),
    )


def _cards(wanted: GpuFilter) -> Iterator[Gpu]:
    """Cards of CUDA, whose memory is modelled; modified ones only where they are named."""
    for gpu in all_gpus():
        if gpu.vendor is Vendor.NVIDIA and (not gpu.is_modified or gpu.id in wanted.gpus):
            yield gpu


def _nothing_left(text: str | None, wanted: GpuFilter, global_batch: int | None) -> RequestError:
    """Why there is no machine to look at: what of the filter no card meets, or that none of its numbers of cards shares the batch."""
    numbers = sorted({number for gpu in _cards(wanted) for number in wanted.counts() if wanted.accepts(gpu, number)})
    if numbers:
        counts = ", ".join(map(str, numbers))
        return RequestError(
            f"global_batch_size: {global_batch} is not shared evenly by any number of cards that the filter leaves ({counts}); expected a "
            "multiple of one of them",
            field="global_batch_size",
        )
    words = split_words(text or "")
    alone = [word for word in words if not any(_meets(gpu, word, wanted) for gpu in all_gpus() if gpu.vendor is Vendor.NVIDIA)]
    reason = (
        f"no card of CUDA meets {' or '.join(map(repr, alone))}" if alone else f"no card of CUDA meets all of {', '.join(words)} at once"
    )
    return RequestError(f"hardware.filter: {text!r} leaves no card: {reason}; `vramplan gpus` lists what there is", field="hardware.filter")


def _meets(gpu: Gpu, word: str, wanted: GpuFilter) -> bool:
    one = GpuFilter.parse(word, field="hardware.filter", book=wanted.book)
    return any(one.accepts(gpu, number) for number in one.counts())


def _row(choice: Choice, strategy: Strategy, offer: Offer | None, basis: Basis) -> Json:
    gpu, number = choice.machine.gpu, choice.machine.num_gpus
    return {
        "gpu": gpu.id,
        "name": gpu.name,
        "num_gpus": number,
        "strategy": strategy.value if number > 1 else Strategy.SINGLE.value,
        "verdict": choice.verdict,
        "reserved_basis": basis.value,
        "per_device_train_batch_size": choice.micro_batch_size,
        "gradient_accumulation_steps": choice.gradient_accumulation_steps,
        "max_length": choice.sequence_length,
        "global_batch_size": choice.micro_batch_size * choice.gradient_accumulation_steps * number,
        "capacity_bytes": gpu.capacity_bytes,
        "device_bytes": choice.device_bytes,
        "margin_bytes": choice.machine.usable_bytes - choice.device_bytes,
        "missing_bytes": max(0, choice.required_bytes - choice.machine.usable_bytes),
        **price_json(offer),
    }


def cheapest_of(choice: Choice, wanted: GpuFilter) -> Offer | None:
    """The lowest known price of a machine, free notebooks left out."""
    return cheapest(choice.machine.gpu.id, choice.machine.num_gpus, providers=wanted.providers, book=wanted.book)


@dataclass(slots=True, kw_only=True)
class _Works:
    """The work of each plan that was met: the same on all cards of a kind."""

    inventory: Inventory
    recipes: dict[tuple[object, ...], Recipe]
    """By kind of machine."""
    known: dict[tuple[object, ...], StepWork] = field(default_factory=dict)

    def of(self, choice: Choice) -> StepWork:
        """The work of one card.

        Raises:
            RequestError: if nothing is known of the model's.
        """
        sizes, steps = (choice.micro_batch_size, choice.sequence_length), choice.gradient_accumulation_steps
        recipe = self.recipes[choice.machine.kind]
        key = recipe.compute_capability >= NEWER_KERNELS, *sizes
        whole = *key, steps
        if whole not in self.known:
            if key not in self.known:
                assert recipe.training is not None
                batch, length = sizes
                training = replace(recipe.training, micro_batch_size=batch, sequence_length=length, gradient_accumulation_steps=1)
                self.known[key] = step_work(self.inventory, replace(recipe, training=training, parallel=Parallel()))
            work = self.known[key]  # of one micro-batch: all are alike
            self.known[whole] = replace(work, accumulation=steps, tokens=work.tokens * steps)
        return self.known[whole]


def _speed(choice: Choice, works: _Works, offer: Offer | None, epoch_tokens: int | None) -> Json:
    """A first estimate of how fast the plan runs, and what it costs; null where it does not fit or nothing is known."""
    nothing: Json = {"speed": None, "cost": None}
    if not choice.fits:
        return nothing
    try:
        step = time_of(works.of(choice), choice.machine.gpu, choice.machine.num_gpus)
    except RequestError:  # the card's or the model's speed is not known
        return nothing
    fastest, slowest = (step.tokens / seconds for seconds in step.seconds_range)
    speed = {
        "tokens_per_second": step.tokens_per_second,
        "tokens_per_second_low": slowest,
        "tokens_per_second_high": fastest,
        "basis": step.basis,
    }
    if offer is None:
        return {"speed": speed, "cost": None}
    price = offer.usd_per_hour_min
    cost = {"usd_per_million_tokens": step.usd_per_million_tokens(price)}
    if epoch_tokens is not None:
        cost |= {"epoch_hours": step.epoch_hours(epoch_tokens), "usd_per_epoch": step.usd_per_epoch(epoch_tokens, price)}
    return {"speed": speed, "cost": cost}
