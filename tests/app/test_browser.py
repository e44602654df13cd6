"""The page in a real Chromium: two widths, two themes, with and without JavaScript, by keyboard, and what axe finds."""

import gzip
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from app.form import Form
from app.http import create_app
from tests.served import serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")

PICTURES = Path(__file__).parents[2] / "artifacts" / "pages"
AXE = gzip.decompress((Path(__file__).parent / "axe" / "axe.min.js.gz").read_bytes()).decode()
SMALL = Form.of(
    {
        "model": "openai-community/gpt2",
        "dtype": "float32",
        "training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 128},
        "hardware": {"gpu": "t4"},
    }
)
LARGE = SMALL.edited(per_device_train_batch_size="64", gradient_accumulation_steps="1", max_length="1024")
WIDE, PHONE = (1280, 900), (390, 844)
VERDICT = "#answer .verdict"

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(create_app()) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Open]:
    """Opens pages, and holds them to the page's promise: no errors, nothing asked of anybody else."""
    complaints: list[str] = []
    contexts = []

    def opened(
        path: str, *, size: tuple[int, int] = WIDE, theme: Literal["light", "dark"] = "light", javascript: bool = True, **options: Any
    ) -> Page:
        context = browser.new_context(
            base_url=address,
            viewport={"width": size[0], "height": size[1]},
            color_scheme=theme,
            java_script_enabled=javascript,
            reduced_motion="reduce",
            **options,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith((address, "data:")) else None)
        page.goto(path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def keep_picture(page: Page, name: str) -> None:
    """For whoever wants to see what the tests saw, where there is a place to write to."""
    picture = page.screenshot(full_page=True)
    with suppress(OSError):
        PICTURES.mkdir(parents=True, exist_ok=True)
        (PICTURES / f"{name}.png").write_bytes(picture)


def findings(page: Page) -> list[str]:
    """What axe objects to."""
    page.evaluate(AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [f"{one['id']}: {node['target']} {node['failureSummary']}" for one in found["violations"] for node in one["nodes"]]


def overflow(page: Page) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.mark.parametrize(
    ("size", "theme"),
    [
        pytest.param(WIDE, "light", id="wide, light"),
        pytest.param(PHONE, "dark", id="phone, dark"),
        pytest.param(WIDE, "dark", id="wide, dark", marks=pytest.mark.slow),
        pytest.param(PHONE, "light", id="phone, light", marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing_and_nothing_sticks_out(visit: Open, size: tuple[int, int], theme: Literal["light", "dark"]) -> None:
    page = visit(f"{LARGE.address}&show=all", size=size, theme=theme)
    expect(page.locator(".changes")).to_be_visible()  # which comes by itself, the rest is there
    keep_picture(page, f"answer-{size[0]}-{theme}")
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert findings(page) == []
    assert overflow(page) == 0


@pytest.mark.parametrize("path", ["/accuracy", "/methods"])
def test_axe_finds_nothing_on_the_pages_beside(visit: Open, path: str) -> None:
    page = visit(path, size=PHONE, theme="dark")
    keep_picture(page, path.strip("/"))
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert findings(page) == []
    assert overflow(page) == 0


def test_the_answer_follows_the_edits_and_so_does_the_address(visit: Open) -> None:
    page = visit(SMALL.address or "")
    expect(page.locator(VERDICT)).to_contain_text("Fits on Tesla T4")
    page.get_by_label("per_device_train_batch_size").fill("64")
    page.get_by_label("max_length").fill("1024")
    expect(page.locator(VERDICT)).to_contain_text("Does not fit on Tesla T4")
    expect(page.locator("#spoken")).to_contain_text("Does not fit")
    page.wait_for_function("location.search.includes('max_length=1024')")
    assert parse_qs(urlsplit(page.url).query)["per_device_train_batch_size"] == ["64"]
    page.reload()
    expect(page.locator(VERDICT)).to_contain_text("Does not fit on Tesla T4")


@pytest.mark.slow  # the libraries run
def test_a_step_that_has_to_be_traced_fills_in_by_itself(visit: Open) -> None:
    traced = SMALL.edited(model="facebook/opt-125m")
    page = visit(traced.address or "")
    expect(page.locator(VERDICT)).to_contain_text("Loading takes")
    expect(page.locator(VERDICT)).to_contain_text("Fits on Tesla T4", timeout=90_000)
    assert page.locator("text=the step is being traced").count() == 0


@pytest.mark.slow  # the libraries run
def test_a_model_that_has_to_be_looked_up_fills_in_by_itself(visit: Open) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    page = visit(Form.of({**SMALL.request(), "model": {"config": {**config, "vocab_size": 111}}}).address or "")
    expect(page.locator(VERDICT)).to_contain_text("Fits on Tesla T4", timeout=90_000)


def test_a_run_is_taken_along_as_a_training_file(visit: Open) -> None:
    page = visit(SMALL.address or "")
    page.get_by_role("button", name="Write it for TRL, axolotl").click()
    page.locator("details.copy", has_text="TRL script").locator("summary").click()
    expect(page.get_by_label("TRL script", exact=True)).to_contain_text("Trainer(")
    expect(page.locator("details.copy", has_text="TRL script").get_by_role("button", name="Copy")).to_be_visible()


def test_what_cannot_be_read_is_said_while_it_is_typed(visit: Open) -> None:
    page = visit(SMALL.address or "")
    page.get_by_label("max_length").fill("many")
    expect(page.get_by_role("alert")).to_contain_text("expected a whole number")
    page.get_by_label("max_length").fill("256")
    expect(page.locator(VERDICT)).to_contain_text("Fits")


def test_the_plan_and_the_cards_come_by_themselves_and_are_used_by_a_click(visit: Open) -> None:
    page = visit(LARGE.address or "")
    expect(page.locator(".cards").first).to_be_visible()
    page.get_by_role("link", name="Use these").click()
    expect(page.locator(VERDICT)).to_contain_text("Fits on Tesla T4")
    assert page.get_by_label("per_device_train_batch_size").input_value() != "64"


def test_a_preset_is_an_edit_of_the_form(visit: Open) -> None:
    page = visit(SMALL.address or "")
    page.get_by_label("max_length").fill("200")
    page.get_by_role("button", name="QLoRA").click()
    expect(page.get_by_role("button", name="QLoRA")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_label("max_length")).to_have_value("200")
    page.locator("details.more > summary").click()
    expect(page.get_by_label("load_in_4bit")).to_have_value("true")


def test_without_javascript_the_form_estimates_plans_and_takes_presets(visit: Open) -> None:
    page = visit(SMALL.address or "", javascript=False)
    page.get_by_label("per_device_train_batch_size").fill("64")
    page.get_by_label("max_length").fill("1024")
    page.get_by_role("button", name="Estimate", exact=True).click()
    expect(page.locator(VERDICT)).to_contain_text("Does not fit on Tesla T4")
    page.get_by_role("button", name="Find the largest micro-batch").click()
    page.get_by_role("link", name="Use these").click()
    expect(page.locator(VERDICT)).to_contain_text("Fits on Tesla T4")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_label("max_new_tokens")).to_have_value("256")


def test_the_keyboard_is_enough(visit: Open) -> None:
    page = visit(SMALL.address or "", size=PHONE)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.get_by_label("max_length").focus()
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("256")
    page.keyboard.press("Enter")
    page.wait_for_url("**max_length=256**")
    expect(page.get_by_label("max_length")).to_have_value("256")
    page.keyboard.press("Tab")
    page.locator("details.more > summary").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("dtype", exact=True)).to_be_visible()


def test_a_recipe_is_compared_with_an_edit_of_it(visit: Open) -> None:
    page = visit(SMALL.address or "")
    page.get_by_role("link", name="Compare with a change").click()
    page.get_by_label("max_length").fill("1024")
    row = page.locator(".differences tr", has=page.get_by_role("rowheader", name="training.max_length"))
    expect(row).to_contain_text("1024")
    expect(row).to_contain_text("128")
    assert page.locator(".chart").count() == 2


def test_a_request_is_copied_and_a_pasted_one_read(visit: Open) -> None:
    page = visit(SMALL.address or "", permissions=["clipboard-read", "clipboard-write"])
    page.locator("details.copy", has_text="as JSON").locator("summary").click()
    page.locator("details.copy", has_text="as JSON").get_by_role("button", name="Copy").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    page.goto("/")
    page.get_by_text("Paste or drop a config.json").click()
    page.get_by_label("Config, request or training file").fill(copied)
    page.get_by_role("button", name="Read it").click()
    expect(page.locator(VERDICT)).to_contain_text("Fits on Tesla T4")
    assert page.url.endswith(SMALL.address or "")


def test_a_dropped_file_is_put_where_it_can_be_read(visit: Open) -> None:
    page = visit("/")
    page.evaluate(
        """() => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File(['{"model_type": "llama"}'], 'config.json'));
            const drop = new DragEvent('drop', {dataTransfer, bubbles: true, cancelable: true});
            document.querySelector('form.paste').dispatchEvent(drop);
        }"""
    )
    expect(page.get_by_label("Config, request or training file")).to_have_value('{"model_type": "llama"}')


def test_a_token_goes_along_as_a_header_and_nowhere_else(visit: Open) -> None:
    token = "hf_" + "a1B2" * 8
    page = visit(SMALL.address or "")
    page.locator("details.more > summary").click()
    page.get_by_label("Hub token").fill(token)
    with page.expect_request("**/page/answer**") as asked:
        page.get_by_label("max_length").fill("200")
    assert asked.value.all_headers()["x-hf-token"] == token
    assert token not in asked.value.url + (asked.value.post_data or "")
    expect(page.locator("pre", has_text='"max_length": 200')).to_have_count(1)
    # the address reads max_length=200 already, put there by the answer above: wait for the document itself
    with page.expect_navigation(url="**max_length=200**"):
        page.get_by_role("button", name="Estimate", exact=True).click()
    assert token not in page.url + page.content()
