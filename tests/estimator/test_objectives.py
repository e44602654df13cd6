"""Traced objectives against the real trainers on the CPU, byte for byte; fused losses against the libraries' own functions."""

from dataclasses import asdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from estimator.fused_loss import TILE_ROWS
from estimator.introspect.trace.heads import tiles
from estimator.introspect.trace.known import Values
from estimator.introspect.trace.routing import Routing
from estimator.introspect.trace.tasks import program_task, timeline_task
from estimator.introspect.trace.watch import Watch
from estimator.phases import Phase
from estimator.recipe import Loss, Objective, ObjectiveKind, Reference
from estimator.scoring import Rows, rows_of, scored_positions
from estimator.timeline import decode_timeline
from estimator.traced_step import decode_program
from tests.oracle import estimates, objectives, recipes, run, traces
from tests.oracle.models import FAMILIES, MODES, Mode

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

B, S, P, LAYERS = 2, 40, 10, 2
PHASES = ("forward", "loss", "backward")
OF_SEQUENCES = {"task_type": "SEQ_CLS"}

Peaks = dict[str, int]


def traced(family: str, mode: str | Mode, gc: bool | None, objective: Objective, loss: Loss = Loss.TRL_TILED) -> Peaks:
    found = traces.live_bytes(traces.timeline(family, mode, B, S, LAYERS, gc=gc, loss=loss, objective=objective))
    return {phase: found[phase] for phase in PHASES}


# -- trainers ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "mode", "gc"), [("gemma2", "qlora_bf16_autocast", False), ("mixtral", "lora_bf16_fp32_autocast", None)])
def test_the_traced_tiles_of_sft_are_those_of_the_real_trainer(family: str, mode: str, gc: bool | None) -> None:
    assert traced(family, mode, gc, Objective()) == objectives.sft(family, mode, B, S, LAYERS, gc=gc)


@pytest.mark.parametrize(
    ("family", "mode", "gc", "reference"),
    [
        ("llama", "qlora_bf16_autocast", None, Reference.NONE),
        ("qwen3", "qlora_bf16_autocast", False, Reference.ADAPTER_OFF),
        ("llama", "full_bf16_autocast", False, Reference.MODEL),
    ],
)
def test_traced_dpo_is_the_real_trainers_with_and_without_reference(family: str, mode: str, gc: bool | None, reference: Reference) -> None:
    objective = Objective(kind=ObjectiveKind.DPO, reference=reference, prompt_length=P)
    assert traced(family, mode, gc, objective) == objectives.dpo(family, mode, B, S, P, LAYERS, reference=reference, gc=gc)


@pytest.mark.parametrize(("family", "mode", "gc"), [("llama", "qlora_bf16_autocast", False), ("qwen3", "lora_bf16_fp32_autocast", None)])
def test_traced_reward_modelling_is_the_real_trainers(family: str, mode: str, gc: bool | None) -> None:
    scored = MODES[mode].with_adapter(**OF_SEQUENCES)
    found = traced(family, scored, gc, Objective(kind=ObjectiveKind.REWARD), Loss.STOCK)
    assert found == objectives.reward(family, scored, B, S, LAYERS, gc=gc)


@pytest.mark.parametrize(
    ("family", "mode", "gc"),
    [("llama", MODES["qlora_fp32_autocast"].with_adapter(**OF_SEQUENCES), False), ("gemma2", MODES["full_bf16"], None)],
)
def test_traced_classification_is_the_real_trainers(family: str, mode: Mode, gc: bool | None) -> None:
    found = traced(family, mode, gc, Objective(kind=ObjectiveKind.CLASSIFICATION, num_labels=5), Loss.STOCK)
    assert found == objectives.classification(family, mode, B, S, LAYERS, labels=5, gc=gc)


@pytest.mark.parametrize(
    ("mode", "gc", "reference", "old"),
    [("qlora_bf16_autocast", False, False, False), ("lora_bf16_fp32_autocast", None, True, True)],
)
def test_a_traced_step_of_grpo_is_the_real_trainers(mode: str, gc: bool | None, reference: bool, old: bool) -> None:
    objective = Objective(
        kind=ObjectiveKind.GRPO,
        reference=Reference.ADAPTER_OFF if reference else Reference.NONE,
        prompt_length=P,
        old_log_probs=old,
    )
    real = objectives.grpo("llama", mode, B, S, P, LAYERS, reference=reference, old_log_probs=old, gc=gc)
    assert traced("llama", mode, gc, objective) == real


@pytest.mark.parametrize(
    ("mode", "tied", "changes"),
    [
        ("qlora_bf16_autocast", False, {"modules_to_save": ("embed_tokens", "lm_head")}),
        ("lora_bf16_fp32_autocast", True, {"modules_to_save": ("lm_head",)}),
        ("qlora_prepared_autocast", False, {"targets": ("embed_tokens", "q_proj")}),
        ("lora_bf16_fp32_autocast", False, {"trained_tokens": (("embed_tokens", 5),)}),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_trained_vocabulary_is_traced_to_the_byte(mode: str, tied: bool, changes: dict[str, object]) -> None:
    changed, config = MODES[mode].with_adapter(**changes), {"tie_word_embeddings": tied}
    real = run.step("llama", changed, B, S, LAYERS, gc=False, config=config)
    found = traces.live_bytes(traces.timeline("llama", changed, B, S, LAYERS, gc=False, config=config))
    assert {p: found[p] for p in PHASES} == {p: real.first[p].live_bytes for p in PHASES}


# -- fused losses -----------------------------------------------------------------------------------------------------------------------

H = 64
_BF16, _F32 = torch.bfloat16, torch.float32


def tile_peaks(function: type[torch.autograd.Function], N: int, V: int, types: tuple[torch.dtype, torch.dtype], trained: bool) -> Peaks:
    """Peaks and what is kept of one call and its backward pass, under bfloat16 autocast, the head with a bias [bytes]."""
    with FakeTensorMode(), objectives.triton_paths():
        watch = Watch({}, Values(Routing.BALANCED))
        watch.begin("given")
        hidden = torch.empty((N, H), dtype=types[0], requires_grad=True)
        weight = torch.empty((V, H), dtype=types[1], requires_grad=trained)
        bias, targets = torch.empty(V, dtype=types[1], requires_grad=trained), torch.empty(N, dtype=torch.int64)
        for tensor in (hidden, weight, bias, targets):
            watch.take_in(tensor, "weights", "")
        with watch:
            watch.begin("forward")
            with torch.autocast("cpu", dtype=_BF16):
                results = function.apply(hidden, weight, bias, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy", "is_top1"))
            watch.begin("backward")
            results[0].sum().backward()
            watch.begin("after")
        timeline = watch.timeline()
    kept = {mark.phase: sum(a.allocated_bytes for a in timeline.alive(mark.event - 1)) for mark in timeline.marks}
    return {phase: peak.allocated_bytes for phase, peak in timeline.peaks().items()} | {f"before {name}": n for name, n in kept.items()}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("types", [(_BF16, _BF16), (_F32, _BF16), (_BF16, _F32), (_F32, _F32)])
@pytest.mark.parametrize(("N", "rows"), [(1000, Rows()), (3 * TILE_ROWS, Rows(in_pass=TILE_ROWS, several=True))])
def test_tiles_take_what_trls_function_takes(N: int, rows: Rows, types: tuple[torch.dtype, torch.dtype], trained: bool) -> None:
    for V in (20_000, 70_000):
        assert tile_peaks(tiles(rows), N, V, types, trained) == tile_peaks(ChunkedLogProbFunction, N, V, types, trained)


@pytest.mark.parametrize("loss", [Loss.TRL_TILED, Loss.TRL_CHUNKED, Loss.LIGER])
@pytest.mark.parametrize(
    ("family", "mode", "batch", "length", "config"),
    [
        ("llama", "qlora_bf16_autocast", 2, 120, {}),
        ("llama", "qlora_bf16_autocast", 4, 1100, {"vocab_size": 128_256}),
        ("llama", "full_bf16", 4, 300, {"tie_word_embeddings": True}),
        ("llama", "full_fp32_autocast", 4, 1100, {"vocab_size": 70_000}),
        ("qwen3", "qlora_prepared_autocast", 4, 1100, {}),
        ("gemma2", "full_bf16_autocast", 4, 300, {}),  # logits are capped
        ("gemma2", "full_fp32", 4, 1100, {"tie_word_embeddings": True}),
        ("phi", "full_fp32_autocast", 4, 300, {}),  # the head has a bias
        ("cohere", "lora_bf16_bf16_autocast", 4, 300, {}),  # logits are multiplied by a number
    ],
)
def test_the_closed_form_of_a_fused_loss_is_the_trace(
    loss: Loss, family: str, mode: str, batch: int, length: int, config: dict[str, object]
) -> None:
    config = {"vocab_size": 4096, "max_position_embeddings": 4096} | config
    found = traces.live_bytes(traces.timeline(family, mode, batch, length, LAYERS, gc=False, loss=loss, config=config))
    form = estimates.live_bytes(family, mode, batch, length, LAYERS, gc=False, loss=loss, config=config)
    # what the closed form leaves out: the allocator's rounding, and tensors of one element per token
    several = 32 * 512 + 2 * 8 * batch * length
    for phase in ("loss", "backward"):
        assert found[phase] == pytest.approx(form[Phase(phase)], rel=1e-3, abs=several)


# -- regimes ----------------------------------------------------------------------------------------------------------------------------


def test_a_preference_scores_the_completions_of_both_sequences() -> None:
    objective = Objective(kind=ObjectiveKind.DPO, prompt_length=24)
    training = recipes.recipe("llama", "full_bf16", 3, 100, loss=Loss.TRL_TILED, objective=objective).training
    assert training is not None
    assert scored_positions(training) == 3 * 2 * (100 - 24)


def test_the_first_token_is_not_scored() -> None:
    training = recipes.recipe("llama", "full_bf16", 3, 100).training
    assert training is not None
    assert scored_positions(training) == 3 * 99


@pytest.mark.parametrize(
    ("loss", "batch", "rows"),
    [
        (Loss.STOCK, 64, Rows()),
        (Loss.TRL_TILED, 4, Rows()),
        (Loss.TRL_TILED, 5, Rows(in_pass=4096, several=True)),
        (Loss.TRL_CHUNKED, 1, Rows(in_pass=256, several=True)),
        # Liger: vocabulary over width is 32, so a chunk is 1/32 of the tokens, rounded up to a power of two
        (Loss.LIGER, 4, Rows(in_pass=128, several=True)),
        (Loss.LIGER, 5, Rows(in_pass=256, several=True)),
    ],
)
def test_passes_follow_from_the_batch(loss: Loss, batch: int, rows: Rows) -> None:
    training = recipes.recipe("llama", "full_bf16", batch, 1024, loss=loss).training
    assert training is not None
    assert rows_of(training, {"vocab_size": 128_256, "hidden_size": 4096}) == rows


@pytest.mark.parametrize(
    ("loss", "objective"),
    [
        (Loss.TRL_TILED, Objective()),
        (Loss.LIGER, Objective()),
        (Loss.TRL_TILED, Objective(kind=ObjectiveKind.DPO, reference=Reference.ADAPTER_OFF, prompt_length=100)),
    ],
)
def test_a_program_of_few_small_runs_holds_at_a_large_size(loss: Loss, objective: Objective) -> None:
    batch, length = 4, 2048
    recipe = recipes.recipe("llama", "qlora_bf16_autocast", batch, length, gc=False, loss=loss, objective=objective)
    training = recipe.training
    assert training is not None
    config = FAMILIES["llama"].config(1).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    payload = {"config": config, "recipe": asdict(recipe), "layers_prefix": "model.layers"}
    rows = asdict(rows_of(training, config))
    found = decode_program(program_task(payload | {"lengths": [102, 2**20], "rows": rows})["program"])
    whole = decode_timeline(timeline_task(payload)["timeline"])  # type: ignore[arg-type]
    start = next(mark.event for mark in whole.marks if mark.phase == Phase.FORWARD)
    there = sum(a.allocated_bytes for a in whole.alive(start - 1))
    for phase in PHASES:
        largest = max(snapshot.at(batch, length) for snapshot in found.peaks[Phase(phase)])
        assert largest == pytest.approx(whole.peaks()[phase].allocated_bytes - there, rel=1e-3)
