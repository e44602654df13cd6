"""The fields of the page's form, and the request they make."""

from collections.abc import Mapping
from dataclasses import dataclass

from app.answer import Json
from estimator.errors import RequestError

METHODS = {
    "qlora": "QLoRA (4-bit NF4 base, LoRA)",
    "lora": "LoRA (16-bit base)",
    "lora_int8": "LoRA on an 8-bit base",
    "full": "Full fine-tuning",
    "inference": "Generation",
    "load": "Load the weights only",
}
DTYPES = ("", "bfloat16", "float16", "float32", "auto")
TRAINERS = {"transformers": "transformers Trainer", "trl": "TRL SFTTrainer"}
PRECISIONS = {"": "as the trainer does", "bf16": "bf16=True", "fp16": "fp16=True", "none": "off"}
CHOICES = {"": "as the trainer does", "yes": "on", "no": "off"}
ATTENTIONS = ("", "sdpa", "eager", "flash_attention_2")
OPTIMIZERS = (
    "", "adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adafactor", "sgd",
)  # fmt: skip
CACHES = ("dynamic", "static")

DEFAULTS: Mapping[str, str] = {
    "model": "meta-llama/Llama-3.1-8B",
    "method": "qlora",
    "dtype": "bfloat16",
    "attention": "",
    "trainer": "transformers",
    "r": "16",
    "target_modules": "all-linear",
    "double_quant": "on",
    "prepare": "yes",
    "batch": "4",
    "accumulation": "4",
    "max_length": "2048",
    "optim": "paged_adamw_8bit",
    "precision": "bf16",
    "checkpointing": "yes",
    "liger": "",
    "padded": "",
    "inference_batch": "1",
    "prompt_length": "1024",
    "max_new_tokens": "256",
    "cache": "dynamic",
    "gpu": "rtx4090",
    "transformers": "",
}
# Checkboxes send nothing when they are off.
_CHECKBOXES = frozenset(("double_quant", "liger", "padded"))
_MAX_VALUE = 300


@dataclass(frozen=True, slots=True)
class Form:
    """What stands in the form."""

    values: Mapping[str, str]

    @classmethod
    def blank(cls) -> "Form":
        return cls(DEFAULTS)

    @classmethod
    def submitted(cls, query: Mapping[str, str]) -> "Form":
        """The form as sent; fields that a shortened link leaves out keep their defaults, boxes that are not ticked are off."""
        sent = {name: query[name].strip()[:_MAX_VALUE] for name in DEFAULTS if name in query}
        return cls({**DEFAULTS, **dict.fromkeys(_CHECKBOXES, ""), **sent})

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    def request(self, *, plan: bool = False) -> Json:
        """The request of the contract that the form stands for.

        Raises:
            RequestError: if a number is none, or the method is not known.
        """
        method = self["method"]
        if method not in METHODS:
            raise RequestError(f"method: {method!r} is not known; accepted: {', '.join(METHODS)}", field="method")
        request: Json = {
            "model": self["model"],
            "dtype": self["dtype"] or None,
            "attn_implementation": self["attention"] or None,
            "padded": self["padded"] == "on",
            "hardware": {"gpu": self["gpu"]} if self["gpu"] else None,
            "stack": {"transformers": self["transformers"]} if self["transformers"] else None,
        }
        if method == "inference":
            request["inference"] = self._inference()
        elif method != "load":
            request |= self._training(method, plan=plan)
        return request

    def _training(self, method: str, *, plan: bool) -> Json:
        training: Json = {
            "per_device_train_batch_size": self._number("batch"),
            "gradient_accumulation_steps": self._number("accumulation"),
            "max_length": self._number("max_length"),
            "optim": self["optim"] or None,
            "gradient_checkpointing": {"yes": True, "no": False}.get(self["checkpointing"]),
            "use_liger_kernel": self["liger"] == "on",
            **self._precision(),
        }
        fields: Json = {"trainer": self["trainer"], "training": training}
        if plan:
            fields["global_batch_size"] = (self._number("batch") or 1) * (self._number("accumulation") or 1)
        if method != "full":
            fields["peft"] = {"r": self._number("r"), "target_modules": self._targets()}
        if method in ("qlora", "lora_int8"):
            fields["quantization"] = self._quantization() if method == "qlora" else {"load_in_8bit": True}
            fields["prepare_model_for_kbit_training"] = {"yes": True, "no": False}.get(self["prepare"])
        return fields

    def _quantization(self) -> Json:
        compute = self["dtype"] if self["dtype"] in ("bfloat16", "float16") else "bfloat16"
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self["double_quant"] == "on",
            "bnb_4bit_compute_dtype": compute,
        }

    def _precision(self) -> Json:
        choice = self["precision"]
        return {} if not choice else {"bf16": choice == "bf16", "fp16": choice == "fp16"}

    def _targets(self) -> list[str] | str | None:
        text = self["target_modules"]
        if not text or text == "all-linear":
            return text or None
        return [name.strip() for name in text.split(",") if name.strip()]

    def _inference(self) -> Json:
        return {
            "batch_size": self._number("inference_batch"),
            "prompt_length": self._number("prompt_length"),
            "max_new_tokens": self._number("max_new_tokens"),
            "cache_implementation": self["cache"] or None,
        }

    def _number(self, name: str) -> int | None:
        text = self[name]
        if not text:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 12):
            raise RequestError(f"{name}: {text[:40]!r} is not accepted; expected a whole number", field=name)
        return int(text)
