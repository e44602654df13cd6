"""The page, as a browser without JavaScript and htmx ask for it."""

import hashlib
import html
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import orjson
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from typer.testing import CliRunner

import app.page
from app import copies, examples, presets, sections
from app.chart import WIDTH, chart_of
from app.cli import cli
from app.configuration import Configuration
from app.form import Form, fields
from app.holding import cards_that_hold
from app.http import create_app
from app.sections import Patience
from app.service import answer
from app.wording import headline
from app.work import Need
from estimator.errors import RequestError, TraceError
from estimator.inventory_codec import encode
from estimator.sources.cache import InventoryCache
from estimator.sources.process import Inspector
from estimator.sources.resolve import resolve
from estimator.sources.tracing import Tracer
from tests import mock_hub as mocked

FIRST = presets.first()
STATIC = Path(app.page.__file__).parent / "static"
SMALL = Form.of(
    {
        "model": "openai-community/gpt2",
        "dtype": "float32",
        "training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 128},
        "hardware": {"gpu": "t4"},
    }
)
LARGE = SMALL.edited(per_device_train_batch_size="64", gradient_accumulation_steps="1", max_length="1024")

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        yield client


def links(text: str) -> list[str]:
    return [html.unescape(found) for found in re.findall(r'href="(/\?[^"]*)"', text)]


def test_the_first_visit_answers_an_example(client: TestClient) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert "Does not fit on GeForce RTX 4090" in response.text
    assert "An example" in response.text


def test_the_page_obeys_a_policy_that_knows_this_address_alone(client: TestClient) -> None:
    for path in ("/", "/page/answer?model=openai-community/gpt2", f"/page/grid?{SMALL.query}"):
        response = client.get(path)
        policy = response.headers["content-security-policy"]
        assert "unsafe" not in policy
        assert "http" not in policy
        assert not re.search(r"<script(?![^>]*\ssrc=)", response.text)
        assert not re.search(r"\sstyle=|\son[a-z]+=|<style", response.text)
        assert not re.search(r"""(src|href|action)=["']?(https?:)?//""", response.text)


def test_what_is_served_beside_the_page_is_what_the_page_asks_for(client: TestClient) -> None:
    for address in re.findall(r'"(/static/[^"]+)"', client.get("/").text):
        response = client.get(address)
        assert response.status_code == 200
        assert "immutable" in response.headers["cache-control"]
        assert "url(" not in response.text or "htmx" in address
    assert client.get("/static/page.html").status_code == 404
    assert client.get("/static/page.js").headers["cache-control"] == "no-cache"


def test_htmx_is_the_file_that_its_note_names() -> None:
    said = re.search(r"sha256: ([0-9a-f]{64})", (STATIC / "htmx.txt").read_text())
    assert said is not None
    assert hashlib.sha256((STATIC / "htmx.min.js").read_bytes()).hexdigest() == said[1]


@pytest.mark.parametrize("method", presets.PRESETS)
def test_every_method_is_answered(client: TestClient, method: str) -> None:
    response = client.get("/", params={**FIRST.values, "preset": method})
    assert response.status_code == 200
    assert 'class="verdict' in response.text
    assert "<rect" in response.text
    assert f'value="{method}" aria-pressed="true"' in response.text


def test_the_verdict_comes_first_and_every_item_has_its_formula(client: TestClient) -> None:
    text = client.get("/", params=dict(FIRST.values)).text
    assert text.index('class="verdict') < text.index('class="chart"') < text.index('class="items"')
    assert "optimizer_step" in text


def test_the_address_holds_what_is_set_and_nothing_else(client: TestClient) -> None:
    response = client.get("/", params={"model": "openai-community/gpt2", "dtype": "", "stranger": "1"}, follow_redirects=False)
    assert response.status_code == 303
    assert response.headers["location"] == "/?model=openai-community%2Fgpt2"


def test_a_shared_address_keeps_what_was_entered(client: TestClient) -> None:
    text = client.get("/", params={**FIRST.values, "max_length": "777", "gpu": "a100-80"}).text
    assert 'name="max_length" value="777"' in text
    assert '<option value="a100-80" selected>' in text


def test_every_field_has_a_label_and_a_line_of_help(client: TestClient) -> None:
    text = client.get("/").text
    ids = set(re.findall(r'<(?:input|select|textarea) id="([^"]+)"', text))
    assert ids == set(re.findall(r'<label for="([^"]+)"', text))
    assert ids == {found.removesuffix("-help") for found in re.findall(r'<small id="([^"]+)"', text)}


def test_the_picker_knows_real_capacity_and_price(client: TestClient) -> None:
    # app/data and estimator/data/gpus.json: an RTX 4090 reports 23.52 GiB, not 24
    assert re.search(r"GeForce RTX 4090, 23\.52 GiB, \d+\.\d\d USD/h<", client.get("/").text)


def test_what_is_entered_is_escaped(client: TestClient) -> None:
    hostile = '"><script>alert(1)</script>{{7*7}}'
    for params in (
        {"model": hostile},
        *({**FIRST.values, name: hostile} for name in ("optim", "max_length", "preset", "extra", "against", "gpu")),
    ):
        for path in ("/", "/page/answer"):
            text = client.get(path, params=params).text
            assert "<script>" not in text
            assert "49" not in text or "{{7*7}}" in text


def test_errors_are_shown_on_the_page(client: TestClient) -> None:
    response = client.get("/", params={**FIRST.values, "max_length": "many"})
    assert response.status_code == 422
    assert 'role="alert"' in response.text
    assert "whole number" in response.text


@pytest.mark.parametrize("token", ["hf_" + "a1B2" * 8, "hf_oauth_eyJ.a-b_c", "hf_jwt_eyJh.J9-x.abc", "vrk_" + "a1-_" * 8])
def test_an_access_token_is_refused_and_not_shown(client: TestClient, token: str) -> None:
    assert token not in client.post("/", data={"request": f"model: gpt2\n- {token}"}).text
    for path in ("/", "/page/answer", "/page/plan"):
        response = client.get(path, params={"model": "openai-community/gpt2", "revision": token}, follow_redirects=False)
        assert "access token" in response.text
        assert token not in response.text + str(response.headers)


def test_the_answer_alone_brings_the_address_with_it(client: TestClient) -> None:
    response = client.get("/page/answer", params={**SMALL.values, "optim": ""})
    assert response.headers["hx-replace-url"] == SMALL.address
    assert "<html" not in response.text
    assert 'hx-swap-oob="true"' in response.text


def test_a_part_of_the_page_that_does_not_exist_is_404(client: TestClient) -> None:
    assert client.get("/page/secrets").status_code == 404


def test_without_javascript_a_button_brings_the_parts(client: TestClient) -> None:
    text = client.get("/", params={**SMALL.values, "show": "all"}).text
    assert "Use these" in text
    assert 'class="cards"' in text
    assert "largest micro-batch at each length" in text.lower()
    assert "Trace a step" in text


@pytest.mark.slow
def test_memory_over_time_is_drawn_when_it_is_asked_for(client: TestClient) -> None:
    text = client.get("/page/timeline", params=dict(SMALL.values)).text
    assert "<polygon" in text
    assert "style" not in text


def test_a_plan_is_used_by_a_link(client: TestClient) -> None:
    text = client.get("/page/plan", params=dict(SMALL.values)).text
    link = links(text)[0]
    used = Form.submitted(dict(parse_qsl(link.removeprefix("/?"))))
    assert int(used["per_device_train_batch_size"]) * int(used["gradient_accumulation_steps"]) == 4
    assert f"per_device_train_batch_size {used['per_device_train_batch_size']}" in text
    assert "Fits" in client.get(link).text


def test_a_change_that_fits_is_a_link_to_a_run_that_fits(client: TestClient) -> None:
    text = client.get("/page/changes", params=dict(LARGE.values)).text
    enough = [found for row in re.findall(r'<li class="enough">.*?</li>', text, re.DOTALL) for found in links(row)]
    assert len(enough) >= 3
    for link in enough[:3]:
        assert answer(Form.submitted(dict(parse_qsl(link.removeprefix("/?")))).request())["fit"]["verdict"] == "fits"


def test_a_card_of_the_list_is_a_link_to_the_run_on_it(client: TestClient) -> None:
    link = links(client.get("/page/cards", params={**SMALL.values, "filter": "16GB..24GB 2"}).text)[0]
    used = Form.submitted(dict(parse_qsl(link.removeprefix("/?"))))
    assert (used["num_gpus"], used["strategy"], used["filter"]) == ("2", "ddp", "16GB..24GB 2")
    assert used.request()["hardware"]["gpu"]


@pytest.mark.parametrize("method", ["inference", "load"])
def test_cards_are_found_for_runs_without_training_too(client: TestClient, method: str) -> None:
    form = presets.applied_to(FIRST, method)
    text = client.get("/page/cards", params={**form.values, "filter": "16GB..24GB"}).text
    for link in links(text)[:3]:
        used = Form.submitted(dict(parse_qsl(link.removeprefix("/?"))))
        assert (used["batch_size"], used["max_length"]) == (form["batch_size"], "")
        assert answer(used.request())["fit"]["verdict"] == "fits"
    assert len(links(text)) >= 3


def test_a_card_that_holds_a_run_is_judged_by_its_own_estimate() -> None:
    request = presets.applied_to(FIRST, "inference").request()
    rows = {row["gpu"]: row for row in cards_that_hold(request, "12GB..24GB")}
    assert rows["rtx4090"]["margin_bytes"] == answer(request)["fit"]["free_bytes"]
    assert rows["rtx3060-12"]["verdict"] == "does_not_fit"
    prices = [row["usd_per_hour"][0] for row in rows.values() if row["verdict"] == "fits" and row["usd_per_hour"]]
    assert prices == sorted(prices)


def test_a_length_of_the_grid_is_a_link_to_its_largest_batch() -> None:
    rows = {row["max_length"]: row for row in sections.grid(FIRST)["frontier"]}
    used = Form.submitted(dict(parse_qsl(rows[2048]["address"].removeprefix("/?"))))
    assert (used["max_length"], used["per_device_train_batch_size"]) == ("2048", str(rows[2048]["batch"]))
    assert answer(used.request())["fit"]["verdict"] == "fits"


def test_what_a_part_cannot_answer_is_said_in_its_place(client: TestClient) -> None:
    response = client.get("/page/plan", params={**SMALL.edited(gpu="").values})
    assert response.status_code == 200
    assert "needs a card" in response.text


def test_two_recipes_stand_beside_each_other(client: TestClient) -> None:
    other = presets.applied_to(FIRST, "lora")
    text = client.get("/", params={**FIRST.values, "against": other.query}).text
    assert "What differs" in text
    assert "quantization.bnb_4bit_quant_type" in text
    assert text.count('class="chart"') == 2


def test_recipes_beside_each_other_share_one_scale() -> None:
    small, large = answer(SMALL.request()), answer(FIRST.request())
    widths = {bar.name: bar.segments[0].width for bar in chart_of(small, at_least=30 * 2**30).bars}
    alone = {bar.name: bar.segments[0].width for bar in chart_of(small).bars}
    assert widths["load"] < alone["load"]
    assert chart_of(large).bars[0].name == "load"


def test_a_bar_crosses_the_line_where_the_run_does_not_fit() -> None:
    chart = chart_of(answer(FIRST.request()))
    ends = {bar.name: bar.segments[-1].x + bar.segments[-1].width for bar in chart.bars}
    assert chart.usable_x is not None
    assert chart.usable_x < ends["on the card"] <= WIDTH


def test_the_headline_says_what_is_to_spare() -> None:
    found = answer(SMALL.request())
    assert headline(found, "T4").startswith("Fits on T4 with")
    assert "to spare" in headline(found, "T4")
    assert headline({**found, "fit": None}, None).startswith("Takes")


@pytest.mark.parametrize(
    "pasted",
    [
        '{"model": "openai-community/gpt2", "training": {"max_length": 64}}',
        "model: openai-community/gpt2\ntraining:\n  max_length: 64\n",
        '{"training": {"max_length": 64}}',
    ],
)
def test_a_pasted_request_becomes_an_address(client: TestClient, pasted: str) -> None:
    response = client.post("/", data={"model": "openai-community/gpt2", "dtype": "float16", "request": pasted}, follow_redirects=False)
    assert response.status_code == 303
    assert response.headers["location"] == "/?model=openai-community%2Fgpt2&max_length=64"


def test_a_pasted_config_takes_the_place_of_the_model(client: TestClient) -> None:
    response = client.post(
        "/", data={**SMALL.values, "attn_implementation": "", "request": orjson.dumps(CONFIG).decode()}, follow_redirects=False
    )
    used = dict(parse_qsl(response.headers["location"].removeprefix("/?")))
    assert Form.submitted(used).request()["model"] == {"config": CONFIG}
    assert used["max_length"] == "128"


@pytest.mark.parametrize(
    "pasted",
    [
        '{"model": "</textarea><script>"',
        "- a\n- b",
        "a: &x [1]\nb: *x",
        "x: 2020-01-01\n1: 2",
        ": : :",
        "[" * 500,
        '{"a":' * 200 + "1" + "}" * 200,
        "!!python/object:os.system {}",
    ],
)
def test_what_cannot_be_pasted_is_refused_and_kept(client: TestClient, pasted: str) -> None:
    response = client.post("/", data={"request": pasted})
    assert response.status_code == 422
    assert "<script>" not in response.text
    assert 'role="alert"' in response.text


def test_a_form_too_long_for_an_address_is_posted(client: TestClient) -> None:
    long = SMALL.edited(
        model="", extra=orjson.dumps({"model": {"config": {**CONFIG, "id2label": {str(n): "x" * 40 for n in range(400)}}}}).decode()
    )
    assert "max_memory_allocated" in client.post("/page/answer", data={**long.values, "wait": "model"}).text
    text = client.post("/", data=dict(long.values)).text  # with its answer, since the model is known by now
    assert 'method="post" action="/" hx-post="/page/answer"' in text
    assert "Too long for an address" in text


def test_a_body_over_the_limit_is_refused(client: TestClient) -> None:
    assert client.post("/", content=b"request=" + b"x" * (1 << 21)).status_code == 413
    assert client.post("/", content=urlencode({str(n): "x" for n in range(300)}).encode()).status_code == 422


@pytest.mark.parametrize("name", examples.ESTIMATE)
def test_the_command_line_that_is_offered_asks_the_same(name: str) -> None:
    request = examples.ESTIMATE[name]["value"]
    line = copies.as_command(request)
    program, *arguments = shlex.split(line)
    assert program == "vramplan"
    ran = CliRunner().invoke(cli, [*arguments, "--json"])
    assert orjson.loads(ran.stdout) == orjson.loads(orjson.dumps(answer(request)))


# -- a step that has to be traced --------------------------------------------------------------------------------------------------------

TRACED = Form.of(
    {
        "model": "facebook/opt-125m",
        "dtype": "float32",
        "training": {"per_device_train_batch_size": 2, "max_length": 128},
        "hardware": {"gpu": "t4"},
    }
)
TRACED_LOAD = f"{125_239_296 * 4 / 2**30:.2f} GiB"  # parameters of the class as transformers counts them, in float32


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is traced yet; what would have been is noted and fails."""
    asked: list[str] = []

    def step(*_: Any, **__: Any) -> None:
        asked.append("trace")
        raise TraceError("no trace in this test", field="engine")

    monkeypatch.setattr(Tracer, "has_step", lambda *_: False)
    monkeypatch.setattr(Tracer, "step", step)
    return asked


@pytest.mark.parametrize("other", ["", SMALL.query])
def test_a_step_that_has_to_be_traced_holds_up_no_page(client: TestClient, untraced: list[str], other: str) -> None:
    form = TRACED.edited(against=other)
    for path in ("/", "/page/answer"):
        text = client.get(path, params=dict(form.values)).text
        assert untraced == []
        assert f"Loading takes {TRACED_LOAD}; the step has to be traced" in text
        assert "the step is being traced" in text
        assert "not_modelled" not in text
        assert 'name="show" value="step"' in text
        (address,) = set(re.findall(r'hx-get="(/page/answer[^"]+)"', text))
        assert "wait=step" in address
    for path in (html.unescape(address), f"{form.address}&show=step"):
        text = client.get(path).text
        assert untraced.pop() == "trace"
        untraced.clear()
        assert "the step has to be traced" not in text
        assert "no trace in this test" in text


def test_a_comparison_with_a_step_that_has_to_be_traced_waits_too(client: TestClient, untraced: list[str]) -> None:
    assert "the step is being traced" in client.get("/", params=dict(SMALL.edited(against=TRACED.query).values)).text
    assert untraced == []


def test_a_load_that_is_too_much_alone_is_said_before_any_trace(client: TestClient, untraced: list[str]) -> None:
    text = client.get("/", params=dict(TRACED.edited(model="facebook/opt-66b").values)).text
    assert "Does not fit on Tesla T4: loading alone takes" in text
    assert untraced == []


def test_a_long_form_waits_for_its_trace_by_post(client: TestClient, untraced: list[str]) -> None:
    long = TRACED.edited(extra=orjson.dumps({"hardware": {"deepspeed": {"x": "y" * 8000}}}).decode())
    text = client.post("/", data=dict(long.values)).text
    assert """hx-vals='{"wait": "step"}'""" in text
    assert untraced == []
    client.post("/page/answer", data={**long.values, "wait": "step"})
    assert untraced != []


# -- a model that has to be looked up ----------------------------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A process that builds gpt2, whatever it is asked for; what is asked of it."""
    asked: list[str] = []
    gpt2 = encode(resolve("gpt2").inventory)

    def run(_: Inspector, task: str, payload: dict[str, Any]) -> Any:
        asked.append(task)
        return {**gpt2, "content_hash": payload["content_hash"]}

    monkeypatch.setattr(Inspector, "run", run)
    cache = InventoryCache(None)
    monkeypatch.setattr("estimator.sources.resolve.default_cache", lambda: cache)
    return asked


@pytest.mark.parametrize(
    ("model", "other", "patience", "expected"),
    [
        ("gpt2", None, Patience.STEP, Need.NOTHING),
        ("gpt2", "model=facebook/opt-125m", Patience.STEP, Need.NOTHING),
        ("gpt2", "model=facebook/opt-125m", Patience.NONE, Need.NOTHING),
        ("gpt2", "model=owner/gpt2", Patience.STEP, Need.HUB),
        ("owner/gpt2", "model=gpt2", Patience.MODEL, Need.HUB),
        ("gpt2", "model=owner/gpt2", Patience.NONE, Need.DATABASE),
        ("gpt2", "model=gpt2&engine=trace", Patience.STEP, Need.BUILDER),
        ("owner/gpt2", "extra=model: {}", Patience.STEP, Need.BUILDER),
        ("gpt2", "model=hf_CANARYcanary0123456789", Patience.STEP, Need.NOTHING),  # what cannot be taken is left out
    ],
)
def test_a_comparison_waits_for_what_either_side_needs(model: str, other: str | None, patience: Patience, expected: Need) -> None:
    assert app.page._need(SMALL.edited(model=model, against=other or ""), patience) is expected


@pytest.mark.parametrize("beside", [False, True])
def test_a_model_that_has_to_be_looked_up_holds_up_no_page(built: list[str], beside: bool) -> None:
    with mocked.serving() as mock, TestClient(create_app(Configuration(hub_endpoint=mock.endpoint))) as client:
        mock.repositories["gpt2"] = {"config.json": orjson.dumps({**resolve("gpt2").config, "_name_or_path": f"{beside}"})}
        form = SMALL.edited(against=SMALL.edited(model="owner/gpt2").query) if beside else SMALL.edited(model="owner/gpt2")
        for path in ("/", "/page/answer"):
            text = client.get(path, params=dict(form.values)).text
            assert (mock.requests, built) == ([], [])
            assert "has to be looked up first" in text
            assert 'name="show" value="model"' in text
            (address,) = set(re.findall(r'hx-get="(/page/answer[^"]+wait=model)"', text))
        assert "Fits on Tesla T4" in client.get(html.unescape(address)).text
        assert (len(mock.requests), built) == (1, ["inventory"])
        assert "Fits on Tesla T4" in client.get("/", params=dict(form.values)).text
        assert (len(mock.requests), built) == (1, ["inventory"])


def test_a_pasted_config_that_has_to_be_built_is_waited_for_where_it_is_asked_for(client: TestClient, built: list[str]) -> None:
    config = {**resolve("gpt2").config, "_name_or_path": "pasted"}
    form = Form.of({**SMALL.request(), "model": {"config": config}})
    assert "has to be looked up first" in client.get("/", params=dict(form.values)).text
    assert built == []
    assert "Fits on Tesla T4" in client.get("/", params={**form.values, "show": "model"}).text
    assert built == ["inventory"]


def test_what_is_no_model_is_said_before_anything_is_looked_up(client: TestClient, built: list[str]) -> None:
    for form in (SMALL.edited(model="../x"), Form.of({**SMALL.request(), "model": {"config": {**CONFIG, "hidden_size": -1}}})):
        response = client.get("/", params=dict(form.values))
        assert response.status_code == 422
        assert "looked up" not in response.text
    assert built == []


# -- taken along ------------------------------------------------------------------------------------------------------------------------


def test_a_run_is_taken_along_as_a_script_and_as_training_files(client: TestClient) -> None:
    text = client.get("/page/files", params=dict(FIRST.values)).text
    copied = {html.unescape(title): html.unescape(file) for title, file in re.findall(r'aria-label="([^"]+)">(.*?)</pre>', text, re.DOTALL)}
    assert list(copied) == ["TRL script", "axolotl YAML", "LLaMA-Factory YAML"]
    compile(copied["TRL script"], "train.py", "exec")
    assert "Trainer(" in copied["TRL script"]
    for title, key in (("axolotl YAML", "micro_batch_size"), ("LLaMA-Factory YAML", "per_device_train_batch_size")):
        assert yaml.safe_load(copied[title])[key] == 4
        response = client.post("/", data={"request": copied[title]}, follow_redirects=False)
        assert response.status_code == 303
    assert "axolotl.yml: written; read back, it peaks at" in text


def test_where_a_trainer_has_no_words_for_a_run_its_reason_stands(client: TestClient) -> None:
    text = client.get("/page/files", params=dict(FIRST.edited(use_dora="true", strategy="device_map", num_gpus="2").values)).text
    assert "TRL script" in text
    assert '<p class="soft">LLaMA-Factory YAML: ' in text


def test_what_has_no_option_goes_through_standard_input() -> None:
    request: dict[str, Any] = {
        "model": "openai-community/gpt2",
        "training": {"max_length": 64, "optim": "sgd", "optim_args": "momentum=0.9"},
    }
    before, after = copies.as_command(request).split(" | ")
    _, _, rest = shlex.split(before)
    _, *arguments = shlex.split(after)
    ran = CliRunner().invoke(cli, [*arguments, "--json"], input=rest)
    assert orjson.loads(ran.stdout) == orjson.loads(orjson.dumps(answer(request)))


def test_the_line_for_curl_carries_the_request() -> None:
    words = shlex.split(copies.as_curl(FIRST.request(), "http://127.0.0.1:8000"))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8000/v1/estimate"]
    assert orjson.loads(words[-1]) == FIRST.request()


def test_a_comparison_that_cannot_be_answered_is_left_out() -> None:
    found = sections.answered(SMALL.edited(against="model=&max_length=many"), "http://x")
    assert found["other"] is None


def test_changes_are_for_training_runs() -> None:
    with pytest.raises(RequestError, match="training"):
        sections.changed(presets.applied_to(FIRST, "inference"))


def test_a_pasted_training_file_becomes_the_form(client: TestClient) -> None:
    pasted = (
        "base_model: mistralai/Mistral-7B-v0.1\nadapter: qlora\nload_in_4bit: true\nsequence_len: 4096\nmicro_batch_size: 2\nbf16: auto\n"
    )
    pasted += "lora_r: 32\nlora_target_linear: true\ngradient_accumulation_steps: 4\noptimizer: adamw_bnb_8bit\n"
    response = client.post("/", data={"model": "openai-community/gpt2", "request": pasted}, follow_redirects=False)
    address = response.headers["location"] if response.status_code == 303 else ""
    found = client.get(address) if address else response
    assert found.status_code == 200
    assert 'value="mistralai/Mistral-7B-v0.1"' in found.text
    assert 'value="4096"' in found.text
    assert "Takes " in found.text


TEXTS = st.one_of(
    st.sampled_from(
        ["", "true", "false", "1", "0", "-1", "99999999999", "1e9", "NaN", "∞", "all-linear", "[", "a,b", "x=1", "{}", "fp4", "t4"]
    ),
    st.sampled_from(['{"training": {}}', '{"model": {"config": {}}}', '{"peft": null}', '{"hardware": 3}', "a" * 3000, "?a=1&b=2", "%00"]),
    st.text(max_size=12),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(st.sampled_from([*fields(), "extra", "against", "preset", "show"]), TEXTS, max_size=5),
    path=st.sampled_from(["/", "/page/answer", "/page/grid"]),
    is_posted=st.booleans(),
)
def test_whatever_stands_in_the_form_is_answered_or_refused(client: TestClient, values: dict[str, str], path: str, is_posted: bool) -> None:
    sent = {**SMALL.values, **values, "engine": "analytic", "show": ""}
    response = client.post(path, data=sent) if is_posted else client.get(path, params=sent)
    assert response.status_code in (200, 422)
    assert "Traceback" not in response.text
