import pytest

from calibration.models import config_of
from estimator.errors import ConfigError, RequestError
from tests.calibration.cases import LLAMA


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
