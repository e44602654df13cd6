"""A typed client of the service. The types are made from its own document; to run it takes `typing_extensions` and nothing else:

pip install datamodel-code-generator
curl -s http://127.0.0.1:8000/openapi.json -o openapi.json
datamodel-codegen --input openapi.json --input-file-type openapi --output-model-type typing.TypedDict --output vramplan_types.py
python client.py http://127.0.0.1:8000
"""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, cast

from vramplan_types import Estimate, EstimateRequest, PlanAnswer, PlanRequest, Problem


class Refused(Exception):
    """The service's own words on why there is no answer; `errors` names the fields."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem["detail"])
        self.problem = problem


class Client:
    """Asks a service. `token` opens gated and private models of the Hub for this client alone."""

    def __init__(self, origin: str = "http://127.0.0.1:8000", token: str | None = None) -> None:
        self._origin = origin
        self._headers = {"content-type": "application/json"} | ({"x-hf-token": token} if token else {})

    def estimate(self, request: EstimateRequest) -> Estimate:
        return cast(Estimate, self._post("/v1/estimate", request))

    def plan(self, request: PlanRequest) -> PlanAnswer:
        return cast(PlanAnswer, self._post("/v1/plan", request))

    def _post(self, path: str, payload: Mapping[str, Any]) -> Any:
        asked = urllib.request.Request(self._origin + path, json.dumps(payload).encode(), self._headers)
        try:
            with urllib.request.urlopen(asked, timeout=150) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise Refused(json.load(error)) from None


if __name__ == "__main__":
    client = Client(*sys.argv[1:])
    run: EstimateRequest = {
        "model": "Qwen/Qwen2.5-7B",
        "dtype": "bfloat16",
        "peft": {"r": 16, "target_modules": "all-linear"},
        "training": {"per_device_train_batch_size": 1, "max_length": 2048, "bf16": True, "gradient_checkpointing": True},
        "hardware": {"gpu": "rtx4090"},
    }
    found = client.estimate(run)
    if found["peak"] is not None and found["fit"] is not None:
        print(f"{found['peak']['allocated_bytes'] / 2**30:.1f} GiB in {found['peak']['phase']}: {found['fit']['verdict']}")
    planned = client.plan({**run, "global_batch_size": 16})["plan"]
    if planned is not None:
        print(f"{planned['per_device_train_batch_size']} × {planned['gradient_accumulation_steps']}")
    try:
        client.estimate({"model": "no-such-model"})
    except Refused as refused:
        print(refused.problem["status"], refused)
