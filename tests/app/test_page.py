"""The page."""

import re
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from app.form import DEFAULTS, METHODS, Form
from app.http import create_app
from estimator.errors import RequestError


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        yield client


def test_the_page_shows_a_form_without_scripts_or_foreign_addresses(client: TestClient) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert "<script" not in response.text
    assert not re.search(r"""(src|href|action)=["']?(https?:)?//""", response.text)
    assert " style=" not in response.text


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_is_answered(client: TestClient, method: str) -> None:
    response = client.get("/", params={**DEFAULTS, "method": method})
    assert response.status_code == 200, response.text
    assert 'class="verdict' in response.text
    assert "<rect" in response.text


def test_the_verdict_comes_first_and_every_item_has_its_formula(client: TestClient) -> None:
    text = client.get("/", params=dict(DEFAULTS)).text
    assert text.index('class="verdict') < text.index("<svg") < text.index("<table>")
    assert "optimizer_step" in text


def test_a_plan_is_worded(client: TestClient) -> None:
    text = client.get("/", params={**DEFAULTS, "gpu": "a100-80", "action": "plan"}).text
    assert "per_device_train_batch_size" in text
    assert "gradient_accumulation_steps" in text
    assert 'class="plan"' in text


def test_a_shared_address_keeps_what_was_entered(client: TestClient) -> None:
    text = client.get("/", params={**DEFAULTS, "max_length": "777", "gpu": "a100-80"}).text
    assert 'name="max_length" value="777"' in text
    assert '<option value="a100-80" selected>' in text


def test_what_is_entered_is_escaped(client: TestClient) -> None:
    hostile = '"><script>alert(1)</script>{{7*7}}'
    for params in (
        {"model": hostile},
        {**DEFAULTS, "optim": hostile},
        {**DEFAULTS, "max_length": hostile},
        {**DEFAULTS, "method": hostile},
    ):
        text = client.get("/", params=params).text
        assert "<script>" not in text
        assert "49" not in text or "{{7*7}}" in text


def test_errors_are_shown_on_the_page(client: TestClient) -> None:
    response = client.get("/", params={**DEFAULTS, "max_length": "many"})
    assert response.status_code == 422
    assert 'role="alert"' in response.text
    assert "whole number" in response.text


def test_a_pasted_request_is_answered_and_kept(client: TestClient) -> None:
    response = client.post("/", data={"request": '{"model": "openai-community/gpt2"}'})
    assert response.status_code == 200
    assert "openai-community/gpt2" in response.text
    broken = client.post("/", data={"request": '{"model": "</textarea><script>"'})
    assert broken.status_code == 422
    assert "<script>" not in broken.text


def test_the_style_sheet_is_served_from_here(client: TestClient) -> None:
    response = client.get("/static/style.css")
    assert response.status_code == 200
    assert "url(" not in response.text


def test_boxes_that_are_not_ticked_are_off() -> None:
    form = Form.submitted({"model": "x", "method": "qlora"})
    assert form.request()["quantization"]["bnb_4bit_use_double_quant"] is False
    assert Form.blank().request()["quantization"]["bnb_4bit_use_double_quant"] is True


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(RequestError, match="method"):
        Form.submitted({"method": "magic"}).request()
