"""The schemas of requests and answers, each under a name of its own, so that a client generated from the document has types to show."""

from collections.abc import Mapping
from functools import cache

from app.answer import VERDICTS, Json
from app.request import PlanRequest, Request, SweepRequest
from estimator.phases import Basis, Phase

REQUESTS: Mapping[str, type[Request]] = {"EstimateRequest": Request, "PlanRequest": PlanRequest, "SweepRequest": SweepRequest}

_PLACE = "#/components/schemas/"
_BYTES: Json = {"type": "integer", "minimum": 0}
_DIFFERENCE: Json = {"type": "integer"}
_COUNT: Json = {"type": "integer", "minimum": 1}
_TEXT: Json = {"type": "string"}
_NUMBER: Json = {"type": "number"}
_YES: Json = {"type": "boolean"}
_VERSION: Json = {"const": 1}
_SETTING: Json = {"type": "object", "description": "values by the path of their field: `training.max_length`", "additionalProperties": True}
_VERDICT: Json = {"enum": list(VERDICTS)}
_PHASE: Json = {"enum": [phase.value for phase in Phase]}
_BASIS: Json = {"enum": [basis.value for basis in Basis]}
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
}  # fmt: skip


@cache
def components() -> Mapping[str, Json]:
    """Every component by its name."""
    found: dict[str, Json] = {}
    for name, model in REQUESTS.items():
        schema = model.model_json_schema(ref_template=f"{_PLACE}{{model}}")
        found |= schema.pop("$defs")
        found[name] = {**schema, "title": name}
    return {**found, **_ANSWERS}
