"""The service's page in a real browser: Chromium without a screen."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.betons import picture
from tests.services import Running, make_exported, running

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("page")
    exported = make_exported(folder)
    with running(folder / "log", exported.run, "--index", exported.neighbours) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'dist_contrastive[dev]'")
    with api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, service: Running) -> Iterator[Any]:
    """The page, opened; at the end nothing was asked from elsewhere and no script failed."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    opened, problems, asked = context.new_page(), [], []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(service.url)
    opened.wait_for_function("() => document.querySelector('#encoder').textContent.includes('step')")
    yield opened
    context.close()
    assert all(url.startswith((service.url, "blob:", "data:")) for url in asked)
    assert [problem for problem in problems if "422" not in problem] == []


def image(seed: int, side: int = 24) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(picture(side, side, seed)).save(buffer, "PNG")
    return {"name": f"{seed}.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def wait_for_text(page: Any, selector: str, text: str) -> None:
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector).textContent.includes(text)", arg=[selector, text]
    )


def test_two_images_get_their_place_on_the_scale(page: Any) -> None:
    page.get_by_label("First image").set_input_files(image(1))
    page.get_by_label("Second image").set_input_files(image(1))
    wait_for_text(page, "#pair-result", "Cosine 1.000")
    assert page.locator("#chart path").count() == 2
    mark = page.locator("#chart line")
    assert float(mark.get_attribute("x1")) == pytest.approx(585)
    page.get_by_label("Second image").set_input_files(image(2))
    page.wait_for_function("() => !document.querySelector('#pair-result').textContent.includes('1.000')")
    wait_for_text(page, "#pair-result", "Cosine")
    assert float(mark.get_attribute("x1")) < 585
    assert page.locator("#chart-title").text_content() == page.locator("#pair-result").text_content()


def test_a_dropped_image_finds_neighbours_with_pictures(page: Any) -> None:
    page.evaluate(
        """async (bytes) => {
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], "x.png", { type: "image/png" }));
            const drop = document.querySelector("label[for=image-q]");
            drop.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
        }""",
        list(image(3)["buffer"]),
    )
    wait_for_text(page, "#search-result", "12 neighbours")
    page.wait_for_function(
        "() => [...document.querySelectorAll('#neighbours img')].filter((image) => image.naturalWidth).length === 12"
    )
    assert "class" in page.locator("#neighbours li").first.text_content()


def test_words_find_neighbours_by_keyboard_alone(page: Any) -> None:
    page.get_by_label("or words").focus()
    page.keyboard.type("1 of 2")
    page.keyboard.press("Enter")
    wait_for_text(page, "#search-result", "12 neighbours")


def test_the_keyboard_reaches_everything_in_order(page: Any) -> None:
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert reached == ["image-a", "image-b", "image-q", "text", "Search", "For programs: examples"]


def test_a_file_that_is_no_image_gets_the_services_sentence(page: Any) -> None:
    page.get_by_label("First image").set_input_files(image(1))
    broken = {"name": "x.png", "mimeType": "image/png", "buffer": b"no image"}
    page.get_by_label("Second image").set_input_files(broken)
    wait_for_text(page, "#pair-result", "b can't be read as an image")


@pytest.mark.parametrize("width", [320, 360, 1100])
def test_nothing_is_wider_than_the_screen(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.get_by_label("First image").set_input_files(image(1, 300))
    page.get_by_label("Second image").set_input_files(image(2, 300))
    wait_for_text(page, "#pair-result", "Cosine")
    page.get_by_label("Image to search with").set_input_files(image(3))
    wait_for_text(page, "#search-result", "neighbours")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_token_is_asked_for(browser: Any, service: Running, tmp_path: Path) -> None:
    # The same export, found from what the other service was started with.
    words = [word for word in service.process.args[3:] if word != "--port"][:3]  # type: ignore[index]
    with running(tmp_path / "log", *words, "--token", "secret") as guarded:
        page = browser.new_context().new_page()
        page.goto(guarded.url)
        page.get_by_label("Token").fill("secret")
        page.keyboard.press("Enter")
        wait_for_text(page, "#encoder", "step")
        page.get_by_label("Image to search with").set_input_files(image(3))
        page.wait_for_function("() => document.querySelectorAll('#neighbours img[src^=blob]').length === 12")
        page.context.close()
