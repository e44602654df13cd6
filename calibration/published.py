"""Measurements by others: read, and translated into the model and the recipe they were made with, or into the reason why not.

The rows lie in `measurements/published`; its README says what the fields mean and what the fms-acceleration rows were found to contain.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from estimator.dtypes import DType, parse_dtype
from estimator.gpus import Gpu, find_gpu
from estimator.recipe import Adapter, Attention, Inference, Loss, Quantization, QuantizationKind, Recipe, Trainer, Training
from estimator.stack import Stack, parse_version

_DIRECTORY = Path(__file__).with_name("measurements") / "published"

# The benchmark whose runs of `generate` are translated.
_GENERATION = "optimum-bench-llama"

# Ids of a batch that stay alive after the last step: token ids, labels and mask, each int64.
BATCH_BYTES_PER_TOKEN = 24

# Rows whose figure set a constant of their own kind of run: figure → constant → ids. They never judge that figure. There is none: rows are
# training steps, whose device memory is replayed.
CONSTANTS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType({"device": {}, "allocated": {}})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One published measurement with its citation."""

    id: str
    source: str
    citation: str
    """Repository, path, commit and the place inside the file."""
    fields: Mapping[str, Any]
    """What was published: see the README beside the rows."""
    versions: Mapping[str, str]
    """Library → version; empty where none were recorded."""

    @property
    def grade(self) -> str:
        return str(self.fields["grade"])

    @property
    def is_bound(self) -> bool:
        """Whether the run failed, so that there is no figure."""
        return bool(self.fields.get("oom"))

    @property
    def allocated_bytes(self) -> int | None:
        """Largest allocation [bytes], where the counter was PyTorch's."""
        return self._figure("allocated_peak")

    @property
    def resting_bytes(self) -> int | None:
        """Allocated once training is over [bytes]."""
        value = self.fields.get("resting_bytes")
        return None if value is None else int(value)

    @property
    def device_bytes(self) -> int | None:
        """What nvidia-smi showed beyond what was used before [bytes]."""
        value = self.fields.get("device_bytes")
        return self._figure("device_peak") if value is None else int(value)

    def _figure(self, metric: str) -> int | None:
        value = self.fields.get("figure_bytes")
        return int(value) if value is not None and self.fields["metric"] == metric else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a row measured, in the estimator's words, for the row's own library versions."""

    row: Row
    model: str
    config: Mapping[str, Any] | None
    """Content of the config.json where the catalogue does not have the model."""
    vocab_size: int | None
    """Rows of the embeddings where the script resized them."""
    has_rotary_caches: bool
    """Whether every layer keeps cos and sin of all positions in buffers."""
    recipe: Recipe
    gpu: Gpu
    group: str
    """Rows of one group share model, method and stack."""

    @property
    def method(self) -> str:
        return str(self.row.fields["method"])

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        assert self.recipe.training is not None
        return self.recipe.training.micro_batch_size * self.recipe.training.sequence_length


@dataclass(frozen=True, slots=True, kw_only=True)
class NotModelled:
    """Why a row cannot judge the estimator."""

    row: Row
    reason: str


Translation: TypeAlias = Run | NotModelled


@cache
def rows() -> tuple[Row, ...]:
    """All published measurements."""
    tables = json.loads((_DIRECTORY / "tables.json").read_text(encoding="utf-8"))
    lines = (_DIRECTORY / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(_row(json.loads(line), tables) for line in lines)


def _row(fields: dict[str, Any], tables: Mapping[str, Any]) -> Row:
    file = tables["files"][fields["file"]]
    stack = fields.get("stack")
    return Row(
        id=fields["id"],
        source=file["source"],
        citation=f"{file['repo']} {file['path']}@{file.get('commit', '')[:12]} ({fields['at']})",
        fields=MappingProxyType({**fields, "date": file.get("date"), "why": tables["reasons"][fields["why"]]}),
        versions=MappingProxyType({} if stack is None else tables["stacks"][stack]),
    )


@cache
def _configs() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((_DIRECTORY / "configs.json").read_text(encoding="utf-8"))
    return found


def translate(row: Row) -> Translation:
    """The run behind a row, or the reason why it is not modelled."""
    reason = _obstacle(row)
    if reason is not None:
        return NotModelled(row=row, reason=reason)
    return _generation_run(row) if row.source == _GENERATION else _fms_run(row)


def _obstacle(row: Row) -> str | None:
    """What keeps a row from being modelled, the plainest reason first."""
    fields = row.fields
    checks = (
        (row.is_bound, "the run failed: a bound, not a figure"),
        (fields.get("num_gpus", 1) != 1, "several GPUs: not modelled yet"),
        (_is_foreign_quantization(fields.get("quantization")), f"quantization {fields.get('quantization')}: not bitsandbytes"),
        (fields.get("loss") == "third_party", "loss and layer kernels of a third party"),
        (fields.get("loss") == "liger", "together with third-party layer kernels"),
        (fields["phase"] == "stage", "allocated between the stages of a notebook's own loop, not a peak"),
        (fields["phase"] != "train" and row.source != _GENERATION, f"phase {fields['phase']} is not translated: {fields['why']}"),
        ("reserved_mean_bytes" in fields, "lengths of single batches are not published: compared as a bound, above"),
        (
            row.source == "peft-metamath" and fields["method"] not in ("full", "lora", "dora"),
            f"adapters of {fields['method']} are not modelled",
        ),
        (row.source not in ("fms-accel", _GENERATION), f"stack or step of {row.source} is not translated: {fields['why']}"),
        ("length" not in fields, f"token count of the largest batch is not known: {fields['why']}"),
    )
    return next((reason for holds, reason in checks if holds), None)


def _is_foreign_quantization(quantization: str | None) -> bool:
    return quantization is not None and not quantization.startswith("bnb-")


# The script adds a padding token and resizes the embeddings to the tokenizer's length, whatever the checkpoint's: 32,000 + 1 for Mistral;
# for santacoder 49,152 byte pairs, <|endoftext|>, <fim-prefix>, <fim-middle>, <fim-suffix>, <fim-pad> and one more, where the checkpoint is
# padded to 49,280.
_RESIZED_VOCABULARY = {"mistralai/Mistral-7B-v0.1": 32_001, "bigcode/gpt_bigcode-santacoder": 49_158}

# Source: transformers 4.41.2 (has them) and 4.42.4 (has not), models/mistral/modeling_mistral.py, MistralRotaryEmbedding.
_WITHOUT_ROTARY_CACHES = (4, 42)

# Versions of the rows of June 2024, published without any: those of the project's next record, a month later.
_UNRECORDED = {"torch": "2.2.2", "transformers": "4.39.3", "peft": "0.11.1", "bitsandbytes": "0.43.1", "trl": "0.9.6"}


def stack_of(versions: Mapping[str, str]) -> Stack:
    """The versions of a row; libraries that it does not name had no part in it."""
    known = versions or _UNRECORDED
    libraries = ("torch", "transformers", "peft", "bitsandbytes", "trl")
    return Stack(**{name: parse_version(f"versions.{name}", known[name]) for name in libraries if name in known})


def _fms_run(row: Row) -> Run:
    """A single-GPU run of fms-acceleration's benchmark: TRL's SFTTrainer on packed sequences.

    Source: foundation-model-stack/fms-acceleration, scripts/benchmarks/defaults.yaml, scenarios.yaml and sample-configurations.
    """
    fields = row.fields
    stack = stack_of(row.versions)
    dtype = parse_dtype(fields["weight_dtype"])
    is_baseline = "baseline-peft-bnb" in fields["at"]
    recipe = Recipe(
        dtype=dtype,
        attention=Attention.FLASH_ATTENTION_2,
        quantization=_quantization(fields, dtype),
        adapter=_adapter(fields, stack),
        # The project's own plugin ("accelerated") loads and wraps the model itself, past TRL's casts.
        prepare_for_kbit_training=is_baseline,
        trainer=Trainer.TRL if is_baseline else Trainer.TRANSFORMERS,
        training=Training(
            micro_batch_size=fields["batch"],
            sequence_length=fields["length"],
            gradient_accumulation_steps=fields.get("accumulation", 1),
            optimizer=fields["optimizer"],
            autocast_dtype=_autocast(fields),
            gradient_checkpointing=True,
            use_reentrant=stack.trainer_checkpoints_reentrantly,
            loss=Loss.STOCK,
        ),
        compute_capability=(8, 0),
        stack=stack,
    )
    transformers = ".".join(map(str, stack.transformers))
    kind = "baseline" if is_baseline else "plain"
    return Run(
        row=row,
        model=fields["model"],
        config=_configs().get(fields["model"]),
        vocab_size=_RESIZED_VOCABULARY.get(fields["model"]),
        has_rotary_caches=fields["model"].startswith("mistralai/") and stack.transformers < _WITHOUT_ROTARY_CACHES,
        recipe=recipe,
        gpu=find_gpu("a100-80"),
        group=f"{fields['model'].rpartition('/')[2]} {fields['method']} {kind} {transformers}",
    )


# The weights are the same as in the repositories that the catalogue has.
_MIRRORED = {"NousResearch/Llama-2-7b-hf": "meta-llama/Llama-2-7b-hf", "NousResearch/Llama-2-13b-hf": "meta-llama/Llama-2-13b-hf"}

_ATTENTIONS = {
    "eager": Attention.EAGER,
    "sdpa(BetterTransformer)": Attention.SDPA,
    "flash_attention_2": Attention.FLASH_ATTENTION_2,
}


def _generation_run(row: Row) -> Run:
    """A forward pass over a prompt, or the generation of 512 tokens after it: equal lengths, no padding, greedy.

    Source: huggingface/optimum-benchmark, examples/running-llamas/configs; transformers 4.35.2, models/llama/modeling_llama.py,
    LlamaRotaryEmbedding (cos and sin of all positions in every layer).
    """
    fields = row.fields
    stack = stack_of(row.versions)
    attention = _ATTENTIONS[fields["attention"]]
    recipe = Recipe(
        dtype=parse_dtype(fields["weight_dtype"]),
        attention=attention,
        inference=Inference(batch_size=fields["batch"], prompt_length=fields["prompt"], max_new_tokens=max(1, fields["generated"])),
        compute_capability=(8, 0),
        stack=stack,
    )
    model = _MIRRORED[fields["model"]]
    return Run(
        row=row,
        model=model,
        config=None,
        vocab_size=None,
        has_rotary_caches=True,
        recipe=recipe,
        gpu=find_gpu("a100-80"),
        group=f"{model.rpartition('/')[2]} {fields['method']} {attention.value} {'.'.join(map(str, stack.transformers))}",
    )


def _autocast(fields: Mapping[str, Any]) -> DType | None:
    name = fields.get("autocast", "no")
    return None if name == "no" else parse_dtype(name)


def _quantization(fields: Mapping[str, Any], dtype: DType) -> Quantization | None:
    name = fields.get("quantization")
    if name is None:
        return None
    return Quantization(
        kind=QuantizationKind(name.removeprefix("bnb-")),
        double_quant=bool(fields.get("double_quant", False)),
        compute_dtype=dtype,
    )


def _adapter(fields: Mapping[str, Any], stack: Stack) -> Adapter | None:
    rank = fields.get("rank")
    if rank is None:
        return None
    # santacoder's attention has one fused input projection, and its output projection shares the name of the MLP's.
    named = fields["targets"]
    targets = ("c_attn",) if "c_attn" in named else tuple(named.split(","))
    # Before peft 0.12 (its pull request 1706) an adapter took the type of its base weight; on packed weights, which are not floating-point,
    # it stayed float32.
    autocast_dtype = stack.peft >= (0, 12) or fields.get("quantization") is not None
    return Adapter(r=rank, target_modules=targets, dropout=fields.get("dropout", 0.0), autocast_adapter_dtype=autocast_dtype)
