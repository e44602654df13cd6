"""The schemas of requests and answers, each under a name of its own, so that a client generated from the document has types to show."""

import ast
import inspect
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from app import request
from app.answer import VERDICTS, Json
from app.options import OPTIONS, PLAN_OPTIONS
from app.request import PlanRequest, Request, SweepRequest
from app.trainer_files.formats import Format
from app.trainer_files.opening import FIELD as FILES
from app.trainer_files.opening import MAX_FILES
from app.trainer_files.read_back import KINDS
from estimator.gpus import Vendor
from estimator.inventory import ModuleKind, TensorRole
from estimator.phases import Basis, Phase

REQUESTS: Mapping[str, type[Request]] = {"EstimateRequest": Request, "PlanRequest": PlanRequest, "SweepRequest": SweepRequest}

_PLACE = "#/components/schemas/"
_BYTES: Json = {"type": "integer", "minimum": 0}
_DIFFERENCE: Json = {"type": "integer"}
_COUNT: Json = {"type": "integer", "minimum": 1}
_INDEX: Json = {"type": "integer", "minimum": 0}
_TEXT: Json = {"type": "string"}
_NUMBER: Json = {"type": "number"}
_YES: Json = {"type": "boolean"}
_VERSION: Json = {"const": 1}
_SETTING: Json = {"type": "object", "description": "values by the path of their field: `training.max_length`", "additionalProperties": True}
_VERDICT: Json = {"enum": list(VERDICTS)}
_PHASE: Json = {"enum": [phase.value for phase in Phase]}
_BASIS: Json = {"enum": [basis.value for basis in Basis]}
_FORMAT: Json = {"enum": [one.value for one in Format]}
_SIZES: Json = {
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "max_length": _COUNT,
    "global_batch_size": _COUNT,
    "margin_bytes": _DIFFERENCE,
}


def ref(name: str) -> Json:
    """A reference to a component."""
    return {"$ref": f"{_PLACE}{name}"}


def _nullable(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _listed(schema: Json) -> Json:
    return {"type": "array", "items": schema}


def _mapped(schema: Json, description: str = "") -> Json:
    """An object whose names are data."""
    return {"type": "object", **({"description": description} if description else {}), "additionalProperties": schema}


def _object(properties: Json, *, optional: Json | None = None, description: str = "") -> Json:
    """An object that has some properties always, and others at times."""
    said = {"description": description} if description else {}
    return {"type": "object", **said, "required": list(properties), "properties": {**properties, **(optional or {})}}


_ANSWERS: Mapping[str, Json] = {
    "Model": _object(
        {
            "id": _nullable(_TEXT),
            "revision": _nullable(_TEXT),
            "model_type": _TEXT,
            "source": {"enum": ["catalogue", "hub", "config"]},
            "num_parameters": _BYTES,
        },
        optional={"checkpoint": {"type": "object", "description": "what the files store, where they were looked at"}},
    ),
    "Parameters": _object(dict.fromkeys(("total", "trainable", "adapter", "quantized"), _BYTES)),
    "Interval": _object(
        {
            "coverage": _NUMBER,
            **dict.fromkeys(("allocated_low_bytes", "allocated_high_bytes", "device_low_bytes", "device_high_bytes"), _BYTES),
            "basis": _TEXT,
        },
        description="How wrong the peak may be, as far as measurements tell, and which.",
    ),
    "Peak": _object(
        {
            "phase": _PHASE,
            "allocated_bytes": _BYTES,
            "reserved_bytes": _nullable(_BYTES),
            "reserved_basis": _TEXT,
            "device_bytes": _nullable(_BYTES),
            "paged_bytes": _BYTES,
            "interval": _nullable(ref("Interval")),
        },
        description="The largest phase: live tensors, what the allocator holds, and what nvidia-smi shows.",
    ),
    "Item": _object({"name": _TEXT, "bytes": _BYTES, "basis": _BASIS, "formula": _TEXT, "source": _TEXT}),
    "PhaseMemory": _object({"phase": _PHASE, "allocated_bytes": _BYTES, "items": _listed(ref("Item"))}),
    "Fit": _object(
        {
            "gpu": _nullable(_TEXT),
            "capacity_bytes": _BYTES,
            "headroom_bytes": _BYTES,
            "free_bytes": _DIFFERENCE,
            "verdict": _VERDICT,
        },
        optional={"occupied_bytes": _BYTES, "num_alloc_retries": {"type": "integer", "minimum": 0}},
        description="`fits`: with the margin for errors; `tight`: by the estimate alone.",
    ),
    "Warning": _object({"code": _TEXT, "message": _TEXT}),
    "Corrections": _object(
        {
            "version": _TEXT,
            "date": _TEXT,
            "evidence": _TEXT,
            "not_applied": _nullable(_TEXT),
            "terms": _listed(
                _object(
                    {
                        "term": _TEXT,
                        "factor": _NUMBER,
                        "group": _TEXT,
                        "num_measurements": _COUNT,
                        "num_models": _COUNT,
                        "worst_error": _NUMBER,
                        "seen_bytes": _listed(_DIFFERENCE),
                    }
                )
            ),
        },
        description="The fitted corrections behind an answer; absent where none are in force.",
    ),
    "Estimate": _object(
        {
            "schema_version": _VERSION,
            "model": ref("Model"),
            "parameters": ref("Parameters"),
            "recipe": {"type": "object", "description": "every choice under its library's name, defaults resolved"},
            "engine": {"enum": ["analytic", "trace"]},
            "engine_reason": _TEXT,
            "stack": {"type": "object", "additionalProperties": _TEXT},
            "peak": _nullable(ref("Peak")),
            "steady_state_bytes": _nullable(_BYTES),
            "phases": _listed(ref("PhaseMemory")),
            "ranks": _listed({"type": "object"}),
            "host_bytes": _BYTES,
            "fit": _nullable(ref("Fit")),
            "warnings": _listed(ref("Warning")),
            "ignored": _listed(_TEXT),
        },
        optional={"corrections": ref("Corrections")},
    ),
    "Check": _object(
        {
            "schema_version": _VERSION,
            "verdict": _VERDICT,
            "gpu": _nullable(_TEXT),
            "phase": _PHASE,
            **dict.fromkeys(("device_bytes", "required_bytes", "usable_bytes", "missing_bytes"), _BYTES),
            "warnings": _listed(_TEXT),
            "refused": _listed(_TEXT),
            "change": _nullable(_object({"set": _SETTING, "saves_bytes": _DIFFERENCE, "costs": _TEXT})),
        }
    ),
    "Sizes": _object(_SIZES, description="A micro-batch with its steps, and what it leaves free on the card."),
    "Plan": _object(
        {
            **_SIZES,
            "longest_max_length": _nullable(_COUNT),
            "policy": _object({"name": {"enum": ["cache_kept", "cache_given_back"]}, "headroom_bytes": _BYTES, "margin": _TEXT}),
            "estimate": ref("Estimate"),
            "alternatives": _listed(ref("Sizes")),
        }
    ),
    "Change": _object(
        {
            "set": _SETTING,
            "parts": _listed(_SETTING),
            "saves_bytes": _DIFFERENCE,
            "adds_bytes": _DIFFERENCE,
            "fits": _YES,
            "missing_bytes": _BYTES,
            "cost": _TEXT,
            "costs": _TEXT,
        }
    ),
    "Shortfall": _object(
        {
            "missing_bytes": _DIFFERENCE,
            "phase": _PHASE,
            "missing_by_phase": {"type": "object", "additionalProperties": _DIFFERENCE},
            "estimate": ref("Estimate"),
            "changes": _listed(ref("Change")),
            "advice": _listed({"type": "object"}),
            "cache_given_back": {**_nullable(ref("Sizes")), "description": "What the policy of that name would recommend."},
        }
    ),
    "CardPlan": _object(
        {
            "gpu": _TEXT,
            "name": _TEXT,
            "num_gpus": _COUNT,
            "strategy": _TEXT,
            "verdict": _VERDICT,
            "emulates_bfloat16": _YES,
            "reserved_basis": _TEXT,
            **_SIZES,
            "capacity_bytes": _BYTES,
            "device_bytes": _BYTES,
            "missing_bytes": _BYTES,
            "usd_per_hour": _nullable(_listed(_NUMBER)),
            "offer": _nullable(_object({"provider": _TEXT, "date": _TEXT, "source": _TEXT})),
            "speed": _nullable(
                _object(
                    {**dict.fromkeys(("tokens_per_second", "tokens_per_second_low", "tokens_per_second_high"), _NUMBER), "basis": _TEXT}
                )
            ),
            "cost": _nullable(
                _object({"usd_per_million_tokens": _NUMBER}, optional={"epoch_hours": _NUMBER, "usd_per_epoch": _NUMBER})
            ),
        }
    ),
    "PlanAnswer": _object(
        {
            "schema_version": _VERSION,
            "plan": _nullable(ref("Plan")),
            "shortfall": _nullable(ref("Shortfall")),
            "gpus": _nullable(_listed(ref("CardPlan"))),
        },
        description="One of `plan`, `shortfall` and, where the request names no card, `gpus` is set.",
    ),
    "Grid": _object(
        {
            "r": _nullable(_COUNT),
            **dict.fromkeys(("allocated_bytes", "device_bytes", "required_bytes"), _listed(_listed(_BYTES))),
            "verdicts": _nullable(_listed(_listed(_VERDICT))),
            "frontier": _nullable(_listed(_nullable(_COUNT))),
            "frontier_basis": _nullable(_listed(_TEXT)),
        },
        description="A row for each micro-batch, in it a column for each length; `frontier` is the largest micro-batch that fits at each.",
    ),
    "SweepAnswer": _object(
        {
            "schema_version": _VERSION,
            "reserved_basis": _TEXT,
            "model": ref("Model"),
            "gpu": _nullable(_TEXT),
            "usable_bytes": _nullable(_BYTES),
            "gradient_accumulation_steps": _COUNT,
            "per_device_train_batch_size": _listed(_COUNT),
            "max_length": _listed(_COUNT),
            "grids": _listed(ref("Grid")),
        }
    ),
    "TracedPhase": _object(
        {
            "phase": _PHASE,
            "allocated_bytes": _BYTES,
            "items": _listed(_object({"name": _TEXT, "bytes": _BYTES})),
            "modules": _listed(
                _object(
                    {"module": _TEXT, "bytes": _BYTES},
                    description="What a module made, or a stored tensor takes; layers are taken together, an empty name is outside of any.",
                )
            ),
            "largest": _listed(
                _object(
                    {**dict.fromkeys(("item", "module", "operator", "dtype", "shape"), _TEXT), "count": _COUNT, "bytes": _BYTES},
                    description="Tensors of one kind; layers are taken together.",
                )
            ),
        }
    ),
    "Trace": _object(
        {
            "schema_version": _VERSION,
            "model": ref("Model"),
            "recipe": {"type": "object", "description": "every choice under its library's name, defaults resolved"},
            "engine": {"const": "trace"},
            "stack": _mapped(_TEXT),
            "peak": _object({"phase": _PHASE, "allocated_bytes": _BYTES, "event": _INDEX}),
            "phases": _listed(ref("TracedPhase")),
            "allocator": _object(
                {
                    "settings": _TEXT,
                    **dict.fromkeys(
                        ("max_reserved_bytes", "reserved_at_peak_bytes", "allocated_at_peak_bytes", "inactive_split_at_peak_bytes"), _BYTES
                    ),
                    "num_segments": _INDEX,
                },
                description="What PyTorch's caching allocator makes of it, replayed.",
            ),
            "timeline": _object(
                {
                    "num_allocations": _INDEX,
                    "num_events": _INDEX,
                    "columns": _listed(
                        _object(
                            {
                                "phase": _PHASE,
                                "event": _INDEX,
                                "allocated_bytes": _BYTES,
                                "reserved_bytes": _BYTES,
                                "items": _mapped(_BYTES, "bytes by item"),
                            }
                        )
                    ),
                },
                description="Stretches of equally many events; of each the instant at which most is allocated.",
            ),
            "warnings": _listed(ref("Warning")),
        }
    ),
    "Written": _object(
        {"content": _TEXT, "differences": _listed(_TEXT), "device_bytes": _nullable(_BYTES), "fits": _nullable(_YES)},
        description="A file, the choices that its trainer makes otherwise than the run, and what the run takes as that trainer makes it.",
    ),
    "Converted": _object(
        {
            "schema_version": _VERSION,
            "formats": _mapped(_FORMAT, "whose file each is, by its name"),
            "request": {"type": "object", "description": "the request that the files stand for, as every other route takes it"},
            "written": _nullable(ref("Written")),
        }
    ),
    "ListedModel": _object({"id": _TEXT, "model_type": _TEXT, "model_class": _TEXT, "num_parameters": _BYTES}),
    "Models": _object({"schema_version": _VERSION, "models": _listed(ref("ListedModel"))}),
    "Tensor": _object(
        {
            "name": _TEXT,
            "shape": _listed(_INDEX),
            "copies": _COUNT,
            "num_parameters": _BYTES,
            "role": {"enum": [role.value for role in TensorRole]},
            "module_kind": {"enum": [kind.value for kind in ModuleKind]},
            "module_class": _TEXT,
            "tied_to": _nullable(_TEXT),
        },
        description="Tensors that differ in the number of their layer alone: `{}` stands for it, `copies` is how many.",
    ),
    "Inspected": _object(
        {
            "schema_version": _VERSION,
            "model": ref("Model"),
            "model_class": _TEXT,
            "num_layers": _INDEX,
            "checkpoint_dtype": _nullable(_TEXT),
            "attn_implementations": _listed(_TEXT),
            "tensors": _listed(ref("Tensor")),
        }
    ),
    "Offer": _object(
        {"provider": _TEXT, "count": _COUNT, "usd_per_hour": _listed(_NUMBER), "date": _TEXT, "source": _TEXT, "note": _TEXT},
        description="So many of the card in one machine; lowest and highest price of it.",
    ),
    "Gpu": _object(
        {
            "id": _TEXT,
            "name": _TEXT,
            "vendor": {"enum": [vendor.value for vendor in Vendor]},
            "architecture": _TEXT,
            "label_gb": _NUMBER,
            "capacity_bytes": {**_BYTES, "description": "what CUDA reports as total"},
            "capacity_basis": _TEXT,
            "nvidia_smi_bytes": {**_nullable(_BYTES), "description": "what nvidia-smi reports as total: more than a process can get"},
            "context_bytes": _BYTES,
            "context_basis": _TEXT,
            "compute_capability": _TEXT,
            "num_multiprocessors": _COUNT,
            "bf16": _YES,
            "fp8": _YES,
            "memory_bandwidth_bytes_per_second": _nullable(_NUMBER),
            "dense_flops_per_second": _mapped(_NUMBER, "by type of the factors"),
            **dict.fromkeys(("certainty", "source", "spec_certainty", "spec_source", "note"), _TEXT),
            "providers": _listed(_TEXT),
            "offers": _listed(ref("Offer")),
        }
    ),
    "Gpus": _object({"schema_version": _VERSION, "gpus": _listed(ref("Gpu"))}),
    "Health": _object({"status": {"const": "ok"}}),
    "Ready": _object(
        {
            "status": {"const": "ready"},
            "state": {"enum": ["none", "kept"]},
            "hub": {"enum": ["asked", "left alone"], "description": "`left alone` while it keeps failing"},
            "corrections": {**_nullable(_TEXT), "description": "version of those that answers rest on"},
        }
    ),
    "Posted": _object(
        {
            "schema_version": _VERSION,
            "hash": _TEXT,
            "status": {"enum": ["accepted", "quarantined", "released", "rejected"]},
            "reasons": _listed(_TEXT),
        }
    ),
    "InForce": _object(
        {
            "schema_version": _VERSION,
            "version": _nullable(_TEXT),
            "corrections": {**_nullable({"type": "object"}), "description": "as `vramplan calibrate fit` writes them"},
        }
    ),
    "History": _object(
        {
            "schema_version": _VERSION,
            "events": _listed(
                _object(
                    {
                        "version": _TEXT,
                        "action": {"enum": ["activated", "refused", "rolled_back"]},
                        "reason": _TEXT,
                        "at": {**_NUMBER, "description": "seconds since 1970"},
                    }
                )
            ),
        }
    ),
}  # fmt: skip


_FILE: Json = {
    "type": "object",
    "additionalProperties": False,
    "required": ["content"],
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 512, "description": "for messages, and for files that name each other"},
        "content": {"anyOf": [_TEXT, {"type": "object"}], "description": "the text of a file, or what it holds"},
        "format": {**_FORMAT, "description": "whose file it is, where its keys do not tell"},
    },
}
_FILES: Json = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_FILES,
    "items": ref("File"),
    "description": "Files of trainers and launchers; what stands beside them goes before what they say. Where they name the model, `model` "
    "may be left out.",
}
_CONVERT: Json = {
    "type": "object",
    "description": "`files` to read, or a run to write, or both; beside them any field of `EstimateRequest`.",
    "properties": {
        FILES: _FILES,
        "write": {"enum": sorted(KINDS), "description": "the kind of file to write"},
        "as": {"type": "string", "description": "its name; with `write: trl` one that ends in .py asks for a script"},
    },
    "additionalProperties": True,
}
# Where the command line's line of help stands for a field that has none of its own.
_SECTIONS: Mapping[str, str] = {
    **dict.fromkeys(REQUESTS, ""),
    "QuantizationFields": "quantization.",
    "PeftFields": "peft.",
    "TrainingFields": "training.",
    "InferenceFields": "inference.",
    "HardwareFields": "hardware.",
}


@cache
def components() -> Mapping[str, Json]:
    """Every component by its name."""
    found: dict[str, Json] = {}
    for name, model in REQUESTS.items():
        schema = model.model_json_schema(ref_template=f"{_PLACE}{{model}}")
        found |= schema.pop("$defs")
        found[name] = {**schema, "title": name, "properties": {**schema["properties"], FILES: _FILES}}
    helped = {option.path: option.help for group in (*OPTIONS.values(), *PLAN_OPTIONS.values()) for option in group}
    for name, schema in found.items():
        said = _said_under_fields(REQUESTS.get(name) or getattr(request, name, None))
        for field, one in schema.get("properties", {}).items():
            if text := said.get(field) or helped.get(_SECTIONS.get(name, f"{name}.") + field):
                one.setdefault("description", text)
    return {**found, "File": _FILE, "ConvertRequest": _CONVERT, **_ANSWERS}


def _said_under_fields(model: Any) -> Mapping[str, str]:
    """The line under each field of a class and of those it is made from."""
    said: dict[str, str] = {}
    for one in model.__mro__ if isinstance(model, type) else ():
        for field, line in pairwise(_bodies().get(one.__name__, [])):
            match field, line:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    said.setdefault(name, text)
    return said


@cache
def _bodies() -> Mapping[str, list[ast.stmt]]:
    """The classes of requests. Read here and not by pydantic, which would do so on each start."""
    return {one.name: one.body for one in ast.parse(inspect.getsource(request)).body if isinstance(one, ast.ClassDef)}
