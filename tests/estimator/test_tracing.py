"""Who runs a trace, how often, and what is kept of it."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from estimator.dtypes import DType
from estimator.errors import InspectionLimitError, TraceError
from estimator.phases import Phase
from estimator.recipe import Adapter, Attention, Recipe, Training
from estimator.sources.process import Inspector
from estimator.sources.resolve import build, resolve
from estimator.sources.tracing import Subject, Tracer, regime
from estimator.stack import Stack

Answer = TypeVar("Answer")
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
MANY_LAYERS = {**CONFIG, "num_hidden_layers": 400}


def recipe(batch: int = 2, length: int = 64, **changes: Any) -> Recipe:
    training = Training(micro_batch_size=batch, sequence_length=length, **changes)
    return Recipe(dtype=DType.BFLOAT16, attention=Attention.SDPA, stack=Stack(), training=training)


@pytest.fixture(scope="module")
def subject(inspector: Inspector) -> Subject:
    return Subject(config=CONFIG, inventory=build(CONFIG, inspector=inspector))


class Counting:
    """Counts what is asked of the real process."""

    def __init__(self, inspector: Inspector) -> None:
        self.inspector = inspector
        self.asked: list[str] = []

    def run(self, task: str, payload: Mapping[str, object], *, wall_seconds: float | None = None) -> Any:
        self.asked.append(task)
        return self.inspector.run(task, payload, wall_seconds=wall_seconds)


def tracer(inspector: Any, **options: Any) -> Tracer:
    return Tracer(inspector=inspector, **options)


def at_once(*calls: Callable[[], Answer]) -> list[Answer]:
    """What calls answer that begin together, each in a thread."""
    start = threading.Barrier(len(calls))

    def begin(call: Callable[[], Answer]) -> Answer:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(begin, calls))


def test_callers_who_ask_for_the_same_trace_share_one_run(inspector: Inspector, subject: Subject) -> None:
    counting = Counting(inspector)
    shared = tracer(counting)
    answers = at_once(*(partial(shared.step, subject, recipe(batch=batch)) for batch in range(2, 6)))
    assert counting.asked == ["trace"]
    assert all(answer is answers[0] for answer in answers)


def test_callers_who_ask_for_the_same_timeline_share_one_run(inspector: Inspector, subject: Subject) -> None:
    counting = Counting(inspector)
    shared = tracer(counting)
    answers = at_once(*[partial(shared.timeline, subject, recipe())] * 3)
    assert counting.asked == ["timeline"]
    assert all(answer is answers[0] for answer in answers)


def test_one_trace_serves_every_batch_and_length_of_a_regime(inspector: Inspector, subject: Subject) -> None:
    counting = Counting(inspector)
    shared = tracer(counting)
    for batch, length in ((2, 8), (7, 1000), (64, 4096)):
        shared.step(subject, recipe(batch, length))
    assert counting.asked == ["trace"]


def test_one_sequence_is_traced_apart(inspector: Inspector) -> None:
    """GPT-NeoX's eager attention copies the heads of several sequences for its products; a copy lets go of what it was made from."""
    counting, config = Counting(inspector), {**CONFIG, "model_type": "gpt_neox"}
    subject, shared = Subject(config=config, inventory=build(config, inspector=inspector)), tracer(counting)
    one, two, five = (replace(recipe(batch), attention=Attention.EAGER) for batch in (1, 2, 5))
    found = shared.step(subject, two)
    assert shared.has_step(subject, five)
    assert not shared.has_step(subject, one)
    alone = shared.step(subject, one)
    assert counting.asked == ["trace", "trace"]
    assert shared.step(subject, five) is found
    assert shared.step(subject, one) is alone
    said, true = (max(s.at(1, 64) for s in step.program.peaks[Phase.BACKWARD]) for step in (found, alone))
    assert true > said


def test_a_public_trace_is_kept_on_disk_and_a_private_one_is_not(inspector: Inspector, subject: Subject, tmp_path: Path) -> None:
    first, second = Counting(inspector), Counting(inspector)
    asks_first, asks_again = tracer(first, directory=tmp_path / "public"), tracer(second, directory=tmp_path / "public")
    assert not asks_first.has_step(subject, recipe())
    assert first.asked == []
    public = asks_first.step(subject, recipe())
    assert asks_first.has_step(subject, recipe(batch=7, length=1000))
    assert asks_again.has_step(subject, recipe())
    again = asks_again.step(subject, recipe())
    assert second.asked == []
    assert again.program.peaks[Phase.BACKWARD] == public.program.peaks[Phase.BACKWARD]
    private = Subject(config=subject.config, inventory=subject.inventory, is_public=False)
    tracer(Counting(inspector), directory=tmp_path / "private").step(private, recipe())
    assert not (tmp_path / "private").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"program": {}}', '{"program": {"peaks": 1}, "is_outline": false}'])
def test_a_kept_trace_that_cannot_be_read_is_made_again(inspector: Inspector, subject: Subject, tmp_path: Path, content: str) -> None:
    made = tracer(inspector, directory=tmp_path).step(subject, recipe())
    (file,) = tmp_path.glob("*.json")
    file.write_text(content)
    again = Counting(inspector)
    assert tracer(again, directory=tmp_path).step(subject, recipe()).program.kernels == made.program.kernels
    assert again.asked == ["trace"]


def test_a_trace_that_takes_too_long_is_stopped_and_the_next_one_runs(subject: Subject) -> None:
    own = Inspector(keep_spare=False)
    slow = Subject(config=MANY_LAYERS, inventory=build(MANY_LAYERS, inspector=own))
    with pytest.raises(InspectionLimitError, match=r"tracing the step took longer than 3 s and was stopped"):
        tracer(own, wall_seconds=3).timeline(slow, recipe(), all_layers=True)
    assert tracer(own).step(subject, recipe()).program.peaks
    own.close()


def test_what_cannot_be_traced_says_where_it_stopped(inspector: Inspector, subject: Subject) -> None:
    adapted = replace(recipe(), adapter=Adapter(r=4, target_modules=("nowhere",)))
    with pytest.raises(TraceError, match=r"the step cannot be traced: PEFT: .*nowhere"):
        tracer(inspector).step(subject, adapted)


@pytest.mark.parametrize(
    ("config", "length", "expected"),
    [
        ({}, 100, (1, 2**20)),
        ({"sliding_window": 128}, 127, (1, 127)),
        ({"sliding_window": 128}, 128, (128, 2**20)),
        ({"sliding_window": 128, "attention_chunk_size": 512}, 300, (128, 511)),
        ({"sliding_window": None}, 300, (1, 2**20)),
    ],
)
def test_windows_and_chunks_part_the_lengths(subject: Subject, config: dict[str, Any], length: int, expected: tuple[int, int]) -> None:
    inventory = replace(subject.inventory, config={**subject.inventory.config, **config})
    assert regime(inventory, length) == expected


def test_no_length_goes_beyond_learned_positions() -> None:
    """BERT has 512 of them; OPT's 2,048 stand in a table of 2,050 rows, RoBERTa's table has 514 for 512."""
    for name, longest in (("google-bert/bert-base-cased", 512), ("facebook/opt-125m", 2048), ("FacebookAI/roberta-base", 512)):
        assert regime(resolve(name).inventory, 100) == (1, longest)
