"""What the estimates of published rows rest on: constants that rows set, and rules read from source code that rows merely agree with."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from calibration.published import CONSTANTS


class Origin(StrEnum):
    """Where a rule or a number comes from."""

    ROWS = "set by rows"
    """Those rows never judge the figure."""
    SOURCE = "source code"
    """The rule follows from the text of the library at the versions named; rows were not needed to find its value."""
    INPUT = "input of the rows"
    """Not of the estimator: what the rows were run with, where it was not published in so many words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One constant or rule that published rows bear on."""

    name: str
    origin: Origin
    source: str
    """File and function at the versions read; how an assumption was made."""
    agreeing: tuple[str, ...] = ()
    """Rows in which the rule shows: where it is wrong they are off."""


# Each was read in the wheels named, on both sides of the boundary.
RULES: tuple[Rule, ...] = (
    Rule(
        name="idle share of the allocator, full logits: searches, lists of cards, generation; no figure of a published row",
        origin=Origin.ROWS,
        source="median over the rows",
        agreeing=tuple(
            f"fms-accel-{n}"
            for n in ["0125", "0127", "0137", "0139", "0145", "0147", "0214", "0216", "0250", "0252", "0262", "0264", "0274", "0276"]
        ),
    ),
    Rule(
        name="idle share of the allocator, fused loss: as above",
        origin=Origin.ROWS,
        source="median over the rows",
        agreeing=tuple(f"fms-accel-{n}" for n in ["0561", "0562", "0563", "0569", "0570", "0571"]),
    ),
    Rule(
        name="keys and values repeated before flash attention until 4.47",
        origin=Origin.SOURCE,
        source="transformers 4.45.2, 4.46.3, 4.47.1: models/mistral/modeling_mistral.py, MistralFlashAttention2.forward calls repeat_kv; "
        "4.48.1: only eager_attention_forward does, not integrations/flash_attention.py",
        agreeing=("fms-accel-0137", "fms-accel-0262"),
    ),
    Rule(
        name="float32 copy of the logits replaces them until 4.45, stands beside them from 4.46",
        origin=Origin.SOURCE,
        source="transformers 4.45.2: models/mistral/modeling_mistral.py (logits = logits.float()); 4.46.3, 4.48.1: loss/loss_utils.py",
        agreeing=("fms-accel-0033", "fms-accel-0125"),
    ),
    Rule(
        name="shifted copy of the logits until 4.48",
        origin=Origin.SOURCE,
        source="transformers 4.46.3, 4.48.1, 4.49.0: loss/loss_utils.py, ForCausalLMLoss",
        agreeing=("fms-accel-0033", "fms-accel-0077"),
    ),
    Rule(
        name="GPTBigCode: loss on 16-bit logits until 4.48.2",
        origin=Origin.SOURCE,
        source="transformers 4.44.2, 4.48.1: models/gpt_bigcode/modeling_gpt_bigcode.py (CrossEntropyLoss()); 4.48.3: self.loss_function",
        agreeing=("fms-accel-0001", "fms-accel-0003"),
    ),
    Rule(
        name="GPTBigCode: keys and values of all layers handed out until 4.53",
        origin=Origin.SOURCE,
        source="transformers 4.44.2, 4.48.1, 4.53.3: models/gpt_bigcode/modeling_gpt_bigcode.py, GPTBigCodeModel.forward (presents); "
        "absent from 4.54.1",
        agreeing=("fms-accel-0001", "fms-accel-0003", "fms-accel-0182", "fms-accel-0184"),
    ),
    Rule(
        name="Mistral: cos and sin of all positions in every layer until 4.41",
        origin=Origin.SOURCE,
        source="transformers 4.39.3, 4.40.2, 4.41.2: models/mistral/modeling_mistral.py, MistralRotaryEmbedding; absent from 4.42.4",
        agreeing=("fms-accel-0298", "fms-accel-0302"),
    ),
    Rule(
        name="4-bit linear layers keep their input before bitsandbytes 0.43.2",
        origin=Origin.SOURCE,
        source="bitsandbytes 0.43.1, 0.43.2, 0.43.3: autograd/_functions.py, MatMul4Bit.forward (ctx.tensors)",
        agreeing=("fms-accel-0308", "fms-accel-0310", "fms-accel-0357", "fms-accel-0359"),
    ),
    Rule(
        name="4-bit linear layers cast their bias to the input's type before bitsandbytes 0.50",
        origin=Origin.SOURCE,
        source="bitsandbytes 0.43.3: nn/modules.py, Linear4bit.forward (bias.data = bias.data.to(x.dtype))",
        agreeing=("fms-accel-0069",),
    ),
    Rule(
        name="adapters take the type of a 16-bit base before peft 0.12, float32 on packed weights",
        origin=Origin.SOURCE,
        source="peft 0.11.1: tuners/lora/layer.py, LoraLayer.update_layer (weight.dtype.is_floating_point); "
        "0.12.0: tuners/tuners_utils.py, _cast_adapter_dtype",
        agreeing=("fms-accel-0302", "fms-accel-0317"),
    ),
    Rule(
        name="4-bit weights are loaded in the order of their names, into segments asked for one by one, until 4.49",
        origin=Origin.SOURCE,
        source="transformers 4.48.1: modeling_utils.py, load_state_dict (safe_load_file) and _load_state_dict_into_meta_model; "
        "safetensors 0.4.5, 0.5.2: torch.py, load_file answers sorted names (tried); transformers 4.50.3: caching_allocator_warmup, absent "
        "from 4.49.0",
        agreeing=("fms-accel-0057", "fms-accel-0069", "fms-accel-0071", "fms-accel-0079"),
    ),
    Rule(
        name="two cuBLAS workspaces of 8.125 MiB: forward and backward thread",
        origin=Origin.SOURCE,
        source="torch: aten/src/ATen/cuda/CublasHandlePool.cpp, getCurrentCUDABlasHandle (a pool per thread), parseChosenWorkspaceSize",
        agreeing=("fms-accel-0033", "fms-accel-0298"),
    ),
    Rule(
        name="the last batch stays: ids, labels and mask of 8 bytes",
        origin=Origin.SOURCE,
        source="transformers 4.39.3 to 4.48.1: trainer.py, _inner_training_loop (inputs is a local variable of the loop)",
        agreeing=("fms-accel-0033", "fms-accel-0035"),
    ),
    Rule(
        name="keys and values of the tokens before stay until those with the new token are complete, until 4.41",
        origin=Origin.SOURCE,
        source="transformers 4.35.2: models/llama/modeling_llama.py, LlamaAttention.forward (torch.cat of past_key_value, which the caller "
        "holds); 4.42.4: generation/utils.py says of such models that they copy the cache, using much more memory",
        agreeing=("optimum-bench-llama-0006", "optimum-bench-llama-0008", "optimum-bench-llama-0076"),
    ),
    Rule(
        name="Llama's logits of the whole prompt until 4.44, in float32 until 4.45",
        origin=Origin.SOURCE,
        source="transformers 4.35.2: models/llama/modeling_llama.py, LlamaForCausalLM.forward (logits.float())",
        agreeing=("optimum-bench-llama-0005", "optimum-bench-llama-0007"),
    ),
    Rule(
        name="vocabulary of Mistral 32,001 and of santacoder 49,158",
        origin=Origin.INPUT,
        source="tokenizer and one padding token: 32,000 + 1; 49,152 + <|endoftext|> and four <fim-…> tokens + 1. That the five are not "
        "among the 49,152 is what resting memory says: 20 kB of 6.8 GB are at stake",
        agreeing=("fms-accel-0001", "fms-accel-0033"),
    ),
    Rule(
        name="library versions of the rows of June 2024",
        origin=Origin.INPUT,
        source="not published; those of the project's next record, a month later, whatever the figures",
        agreeing=("fms-accel-0357", "fms-accel-0359"),
    ),
)


def all_rules() -> tuple[Rule, ...]:
    """The rules above, and before them the constants that rows set."""
    tuned = (
        Rule(name=f"{name} ({figure})", origin=Origin.ROWS, source="median over the rows", agreeing=ids)
        for figure, constants in CONSTANTS.items()
        for name, ids in constants.items()
    )
    return (*tuned, *RULES)


def ranges(ids: Iterable[str]) -> str:
    """Ids in short: `fms-accel-0001 0003 0005–0007`."""
    by_source: dict[str, list[str]] = {}
    for one in sorted(ids):
        source, _, number = one.rpartition("-")
        by_source.setdefault(source, []).append(number)
    return ", ".join(f"{source}-{' '.join(_spans(numbers))}" for source, numbers in by_source.items())


def _spans(numbers: list[str]) -> Iterable[str]:
    first = last = numbers[0]
    for number in [*numbers[1:], ""]:
        if number.isdigit() and last.isdigit() and int(number) == int(last) + 1:
            last = number
            continue
        yield first if first == last else f"{first}–{last}"
        first = last = number
