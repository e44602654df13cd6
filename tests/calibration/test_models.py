import pytest
import torch

from calibration.models import config_of
from calibration.worker.meter import count_parameters
from calibration.worker.model import build
from estimator.errors import ConfigError, RequestError
from tests.calibration.cases import LLAMA, case


def test_a_pasted_config_is_taken_as_it_is() -> None:
    assert config_of({"model": {"config": LLAMA}}) == LLAMA


def test_a_bundled_model_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert config_of({"model": "meta-llama/Llama-3.1-8B"})["hidden_size"] == 4096


@pytest.mark.parametrize("model", [None, "", 3, {}, {"config": "llama"}])
def test_a_request_without_a_model_is_refused(model: object) -> None:
    with pytest.raises(RequestError, match="model"):
        config_of({"model": model})  # type: ignore[dict-item]


def test_a_config_out_of_bounds_is_refused_before_any_worker_sees_it() -> None:
    with pytest.raises(ConfigError):
        config_of({"model": {"config": {**LLAMA, "num_hidden_layers": 10**9}}})


def test_a_bundled_model_is_built_from_its_own_facts() -> None:
    config = config_of({"model": "EleutherAI/pythia-14m"})
    model = build(case(config, peft={"r": 4, "target_modules": ["query_key_value"]}), torch.device("cpu"))
    assert count_parameters(model)[0] == 14_067_712  # the Hub's count of EleutherAI/pythia-14m
