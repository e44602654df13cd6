"""How fast the answers come, beside the goals: `python -m tests.benchmarks.speed`."""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from app.plan import plan
from app.reading import read_estimate
from app.service import Case, prepare
from estimator.allocator_settings import parse_settings
from estimator.device import context_bytes
from estimator.engine import estimate
from estimator.gpus import find_gpu
from estimator.grid import ClosedForms
from estimator.parallelism.options import Parallel, Strategy
from estimator.planner import divisors
from estimator.recipe import Recipe
from estimator.replay import replay_events
from estimator.sources import catalogue
from estimator.sources.process import Inspector
from estimator.sources.tracing import Subject, Tracer
from estimator.sweep import sweep
from estimator.units import MIB

MODEL = "meta-llama/Llama-3.1-8B"
REQUEST: dict[str, Any] = {
    "model": MODEL,
    "dtype": "bfloat16",
    "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    "peft": {"r": 16, "target_modules": "all-linear"},
    "training": {
        "per_device_train_batch_size": 4,
        "max_length": 2048,
        "optim": "paged_adamw_8bit",
        "bf16": True,
        "gradient_checkpointing": True,
    },
    "hardware": {"gpu": "rtx4090"},
}
TRACED_MODELS = ("meta-llama/Llama-3.3-70B-Instruct", "Qwen/Qwen3-30B-A3B")
# Widths that no bundled model has, so that nothing is answered from a cache.
NEW_ARCHITECTURES = ("Qwen/Qwen3-8B", "google/gemma-2-9b", "mistralai/Mixtral-8x7B-v0.1", "deepseek-ai/DeepSeek-V3")
# Some machines keep Python from writing compiled modules, which it then compiles anew at every start; a user's does not.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
REFERENCE = """
import sys, time
start = time.perf_counter()
import torch
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
import json
imported = time.perf_counter()
config = json.load(sys.stdin)
with init_empty_weights():
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))
print(imported - start, time.perf_counter() - imported)
"""


def main() -> None:
    """Prints one line per measurement."""
    rows: list[tuple[str, str, str]] = []
    for measure in (
        machine,
        warm_estimate,
        grids,
        all_cards,
        traces,
        replayed_events,
        command_line,
        web_process,
        new_inventories,
        reference,
    ):
        rows += measure()
        while rows:
            name, value, goal = rows.pop(0)
            print(f"{name:<64}{value:>14}   {goal}", flush=True)


def machine() -> list[tuple[str, str, str]]:
    """How fast this machine runs Python at all, which every line below goes with."""

    def loop() -> None:
        total = 0
        for number in range(10_000_000):
            total += number

    return [("reference: ten million additions in a loop", f"{min(_timed(loop) for _ in range(5)):.2f} s", "")]


def warm_estimate() -> list[tuple[str, str, str]]:
    """From frozen recipe and inventory to the estimate; every call has another batch, so that no cache can answer."""
    case = prepare(read_estimate(REQUEST))
    assert case.recipe.training is not None
    recipes = [
        replace(case.recipe, training=replace(case.recipe.training, micro_batch_size=1 + n % 64, sequence_length=128 * (1 + n // 64)))
        for n in range(2000)
    ]
    for recipe in recipes[:200]:
        estimate(case.inventory, recipe)
    seconds = [_timed(lambda recipe=recipe: estimate(case.inventory, recipe)) for recipe in recipes[200:]]
    return [
        ("warm estimate, median", f"{statistics.median(seconds) * 1e6:.0f} µs", "≤ 100 µs"),
        ("warm estimate, 99th percentile", f"{sorted(seconds)[int(len(seconds) * 0.99)] * 1e6:.0f} µs", ""),
    ]


def grids() -> list[tuple[str, str, str]]:
    """10,000 sizes on arrays, beside one estimate after the other."""
    case = prepare(read_estimate(REQUEST))
    evaluator = ClosedForms(inventory=case.inventory, recipe=case.recipe)
    batches, lengths = range(1, 101), range(64, 64 * 101, 64)
    whole = partial(sweep, evaluator, batches, lengths, steps=1, context_bytes=context_bytes(case.recipe.num_multiprocessors))
    whole()
    arrays = statistics.median(_timed(whole) for _ in range(9))
    assert case.recipe.training is not None
    sized = partial(replace, case.recipe.training)
    recipes = [replace(case.recipe, training=sized(micro_batch_size=b, sequence_length=n)) for b in batches for n in lengths]
    naive = _timed(lambda: [estimate(case.inventory, recipe) for recipe in recipes])
    return [
        ("sweep of 10,000 points", f"{arrays * 1e3:.1f} ms", "≤ 50 ms"),
        ("reference: 10,000 estimates", f"{naive * 1e3:.0f} ms", f"{naive / arrays:.0f} ×"),
    ]


def all_cards() -> list[tuple[str, str, str]]:
    """A plan over all cards × 1, 2, 4, 8; every call has another length, so that no cache answers it whole."""

    def question(length: int) -> dict[str, Any]:
        training = {**REQUEST["training"], "max_length": length, "per_device_train_batch_size": 1}
        return {**REQUEST, "training": training, "hardware": None, "global_batch_size": 16, "confirm": False}

    plan(question(512))
    seconds = [_timed(lambda length=length: plan(question(length))) for length in range(1024, 2048, 64)]
    rows = plan(question(1024))["gpus"]
    naive = _timed(lambda: _one_by_one(prepare(read_estimate(_without(question(1024), "global_batch_size", "confirm"))), rows))
    planned = statistics.median(seconds)
    confirmed = _timed(lambda: plan({**question(1040), "confirm": True}))
    return [
        (f"plan over {len(rows)} machines, with speed and price, median", f"{planned * 1e3:.1f} ms", "≤ 20 ms"),
        ("the same, single cards confirmed by replays", f"{confirmed:.1f} s", ""),
        ("reference: an estimate for every divisor on each of them", f"{naive * 1e3:.0f} ms", f"{naive / planned:.0f} ×"),
    ]


def _without(request: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in request.items() if key not in names}


def _one_by_one(case: Case, rows: list[dict[str, Any]]) -> None:
    assert case.recipe.training is not None
    for row in rows:
        gpu = find_gpu(row["gpu"])
        for size in divisors(16 // row["num_gpus"]):
            training = replace(case.recipe.training, micro_batch_size=size, gradient_accumulation_steps=16 // row["num_gpus"] // size)
            recipe = replace(
                case.recipe,
                training=training,
                compute_capability=gpu.compute_capability,
                num_multiprocessors=gpu.num_sms,
                parallel=Parallel(strategy=Strategy.DDP if row["num_gpus"] > 1 else Strategy.SINGLE, num_gpus=row["num_gpus"]),
            )
            estimate(case.inventory, recipe)


def traces() -> list[tuple[str, str, str]]:
    """A few layers of each kind at four sizes, against every layer at one size; answers from what the few layers gave."""
    inspector = Inspector(keep_spare=False)
    tracer = Tracer(inspector=inspector)
    tracer.step(*_traced("HuggingFaceTB/SmolLM2-1.7B"))  # the frameworks' imports
    rows = []
    for name in TRACED_MODELS:
        subject, recipe = _traced(name)
        cold = _timed(partial(tracer.step, subject, recipe))
        whole = _timed(partial(tracer.timeline, subject, recipe, all_layers=True))
        rows.append((f"trace of {name}, warm process", f"{cold:.1f} s", "≤ 5 s"))
        rows.append(("reference: all its layers at one size", f"{whole:.1f} s", f"{whole / cold:.1f} ×"))
        answered = partial(estimate, subject.inventory, recipe, tracer.step(subject, recipe).program)
        seconds = [_timed(answered) for _ in range(300)]
        rows.append(("estimate from its trace, median", f"{statistics.median(seconds) * 1e6:.0f} µs", "≤ 1,000 µs"))
    inspector.close()
    return rows


def _traced(name: str) -> tuple[Subject, Recipe]:
    case = prepare(read_estimate({**REQUEST, "model": name, "hardware": None, "engine": "trace"}))
    return case.answerer.subject, case.recipe


def replayed_events() -> list[tuple[str, str, str]]:
    """Layers that keep some tensors for the way back and free others at once, as a step does, on the simulated allocator."""
    rows = []
    sizes: list[int] = []
    events: list[int] = []
    for step in range(25):
        kept: list[int] = []
        for layer in range(80):
            made = range(len(sizes), len(sizes) + 20)
            sizes += [1 + (7919 * (n % 1600 + 13 * (step % 2))) % (1 + n % 5 * 9 * MIB) for n in made]
            events += made
            events += [~n for n in made if n % 5 < 3]
            kept += [n for n in made if n % 5 >= 3]
            if layer == 79:
                events += [~n for n in reversed(kept)]
    for options in ("", "expandable_segments:True"):
        seconds = min(_timed(lambda options=options: replay_events(sizes, events, parse_settings(options))) for _ in range(3))
        name = f"allocator replay{', ' if options else ''}{options}: {len(events):,} events"
        rows.append((name, f"{len(events) / seconds / 1e3:.0f} k/s", "≥ 100 k/s"))
    return rows


def command_line() -> list[tuple[str, str, str]]:
    """A fresh process of the command, from its start to its end; the first, which may have modules to compile, is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        request.write_text(json.dumps({**REQUEST, "hardware": None}))
        # the console script's own import and call
        command = [sys.executable, "-c", "from app.cli import main; main()", "estimate", "--request", str(request)]
        seconds = [_timed(lambda: subprocess.run(command, check=True, capture_output=True, env=_ENVIRONMENT)) for _ in range(6)][1:]
        probe = "import sys, app.cli\ntry:\n app.cli.main()\nfinally:\n print('torch' in sys.modules, file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", probe, *command[3:]], check=True, capture_output=True, text=True)
    return [
        ("vramplan estimate of a bundled model, best of 5, wall", f"{min(seconds):.2f} s", "≤ 0.4 s"),
        ("the same, torch imported", done.stderr.split()[-1], "False"),
    ]


def web_process() -> list[tuple[str, str, str]]:
    """The serving process after a hundred answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from app.cli import main; main()", "serve", "--port", str(port)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_ENVIRONMENT)
    try:
        while not _answers(port):
            if process.poll() is not None or time.perf_counter() - start > 60:
                raise SystemExit("the service does not start")
            time.sleep(0.02)
        started = time.perf_counter() - start
        first = _timed(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/").read())
        seconds = [_timed(lambda: _post(port)) for _ in range(100)]
        resident = psutil.Process(process.pid).memory_info().rss
    finally:
        process.terminate()
        process.wait()
    return [
        ("vramplan serve, until it is ready", f"{started:.2f} s", "≤ 2 s"),
        ("its first page, with a result", f"{first:.2f} s", ""),
        ("POST /v1/estimate, median", f"{statistics.median(seconds) * 1e3:.1f} ms", ""),
        ("web process, resident", f"{resident / MIB:.0f} MiB", "≤ 150 MiB"),
    ]


def new_inventories() -> list[tuple[str, str, str]]:
    """Architectures at sizes nobody has asked for, in a process that has its imports behind it."""
    inspector = Inspector(keep_spare=False)
    cold = _timed(lambda: _inspect(inspector, _config(MODEL)))
    rows = [("inventory, cold process", f"{cold:.2f} s", "")]
    for name in NEW_ARCHITECTURES:
        seconds = _timed(lambda name=name: _inspect(inspector, _config(name)))
        rows.append((f"inventory of {name}, warm process", f"{seconds:.2f} s", "≤ 1 s"))
    inspector.close()
    return rows


def reference() -> list[tuple[str, str, str]]:
    """What `accelerate estimate-memory` does, less its download: import the frameworks, build on the meta device."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE], input=json.dumps(_config(MODEL)), env=environment, check=True, capture_output=True, text=True
    )
    imported, built = map(float, done.stdout.split()[-2:])
    return [
        ("reference: importing torch, transformers and accelerate", f"{imported:.2f} s", ""),
        (f"reference: accelerate's empty {MODEL}", f"{built:.2f} s", ""),
    ]


def _config(name: str) -> dict[str, Any]:
    entry = catalogue.find(name)
    assert entry is not None, name
    return dict(catalogue.load(entry.file).config)


def _inspect(inspector: Inspector, config: dict[str, Any]) -> None:
    inspector.run("inventory", {"config": config, "content_hash": "benchmark"})


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=1).close()
    except OSError:
        return False
    return True


def _post(port: int) -> None:
    body = json.dumps(REQUEST).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/estimate", data=body, headers={"content-type": "application/json"})
    urllib.request.urlopen(request, timeout=30).read()


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
