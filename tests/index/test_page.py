"""The search page in headless Chromium: by mouse and by keyboard, at three widths, in light and dark."""

import os
import shutil
from urllib.parse import parse_qs, urlsplit

import pytest

from browsing import WIDTHS, assert_no_barriers, assert_quiet, chromium, every, one, press, resize, wait
from serving import running
from tcq import index as indexes

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def collection(run, images, tmp_path_factory):
    """An index with own columns and a copy of an image, and the folder of its images."""
    base = tmp_path_factory.mktemp("collection")
    folder = shutil.copytree(
        images, base / "photos", ignore=shutil.ignore_patterns("empty*", "tr*", "te*", "pa*", "z*")
    )
    shutil.copy(folder / "class 3" / "003.png", folder / "class 3" / "copy.png")
    (base / "own.csv").write_text("path,title\nclass 3/003.png,<b>Three</b>\n")
    indexes.build(run, folder, base / "index", own_columns=base / "own.csv")
    return base / "index", folder


@pytest.fixture(scope="module")
def address(collection):
    with running(collection[0], k=12) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(browser, address):
    """The page, freshly opened at 1280 pixels; afterwards without messages in the console, or requests elsewhere."""
    resize(browser, 1280)
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(address + "/")
    wait(browser, lambda: "images" in one(browser, "#about").text)
    yield browser
    assert_quiet(browser, address)


def text(browser, selector):
    return "".join(element.text for element in every(browser, selector))


def shown(browser, count):
    wait(browser, lambda: one(browser, "#status").text == f"{count} images are shown.")
    wait(
        browser,
        lambda: browser.execute_script("return [...document.images].every(i => i.loading === 'lazy' || i.complete)"),
    )


def search(browser, *paths):
    one(browser, "#file").send_keys("\n".join(map(str, paths)))


def with_shift(browser, key):
    from selenium.webdriver import ActionChains, Keys

    ActionChains(browser).key_down(Keys.SHIFT).send_keys(getattr(Keys, key)).key_up(Keys.SHIFT).perform()


def test_an_image_is_searched_and_a_hit_searches_again(page, collection):
    _, folder = collection
    search(page, folder / "class 3" / "003.png")
    shown(page, 12)
    assert one(page, "h2").text == "Like 003.png"
    assert one(page, ".query img").get_attribute("src").startswith("blob:")
    scores = [float(e.text) for e in every(page, ".score")]
    assert scores == sorted(scores, reverse=True)
    assert "<b>Three</b>" in [e.text for e in every(page, "dd")]  # as text, and not as HTML
    assert page.execute_script("return document.querySelectorAll('li img')[0].naturalWidth") == 160
    name = every(page, ".name")[3].text
    every(page, "li button")[3].click()
    wait(page, lambda: text(page, "h2") == f"Like {name}")
    shown(page, 12)
    page.back()
    wait(page, lambda: "features" in page.current_url and len(every(page, "li")) == 12)
    assert [float(e.text) for e in every(page, ".score")] == scores


def test_a_link_shows_the_same_search_again(page, collection):
    search(page, collection[1] / "class 5" / "005.png")
    shown(page, 12)
    names, link = [e.text for e in every(page, ".name")], one(page, ".link").get_attribute("href")
    page.get(link)
    shown(page, 12)
    assert [e.text for e in every(page, ".name")] == names
    page.refresh()
    shown(page, 12)
    assert [e.text for e in every(page, ".name")] == names


def test_several_images_and_more_answers(page, collection):
    search(page, collection[1] / "class 3" / "003.png", collection[1] / "class 4" / "004.png")
    shown(page, 24)
    assert [e.text for e in every(page, "h2")] == ["Like 003.png", "Like 004.png"]
    assert len(parse_qs(urlsplit(page.current_url).query)["features"]) == 2
    more = every(page, ".more")[1]
    page.execute_script("arguments[0].click()", more)
    wait(page, lambda: len(every(page, "section:nth-of-type(2) li")) == 24)
    ids = [e.get_attribute("src") for e in every(page, "section:nth-of-type(2) li img")]
    assert len(set(ids)) == 24 and len(every(page, "section:nth-of-type(1) li")) == 12


def test_filters_and_copies(page, collection):
    search(page, collection[1] / "class 3" / "003.png")
    shown(page, 12)
    before = [e.text for e in every(page, ".name")]
    assert {"003.png", "copy.png"} <= set(before)
    one(page, "#hide").click()
    wait(page, lambda: "near copies are hidden" in text(page, ".hidden"))
    assert len({"003.png", "copy.png"} & {e.text for e in every(page, ".name")}) == 1
    one(page, "#path").send_keys("class 7/")
    press(page, "ENTER")
    wait(page, lambda: "path=class+7" in page.current_url and every(page, "li"))
    assert all("/class 7/" in e.get_attribute("title") for e in every(page, ".name"))
    one(page, "#path").clear()
    one(page, "#path").send_keys("no such path")
    press(page, "ENTER")
    wait(page, lambda: text(page, ".hidden") == "No image was found.")


def test_by_keyboard_alone(page, collection):
    def tab():
        press(page, "TAB")
        element = page.switch_to.active_element
        assert page.execute_script("return getComputedStyle(arguments[0]).outlineStyle", element) != "none"
        return element.get_attribute("id") or element.get_attribute("aria-label") or element.text

    assert [tab() for _ in range(4)] == ["file", "path", "k", "hide"]
    search(page, collection[1] / "class 3" / "003.png")  # what the dialogue of the browser would do
    shown(page, 12)
    assert page.switch_to.active_element.tag_name == "h2"  # where the answers begin
    order = [tab() for _ in range(5)]  # to the link of the second hit
    assert order[0] == "Link to this search"
    assert [o.split()[0] for o in order[1:]] == ["Search", "Open", "Search", "Open"]
    with_shift(page, "TAB")  # back to its picture
    press(page, "ENTER")
    name = order[3].removeprefix("Search by ")
    wait(page, lambda: text(page, "h2") == f"Like {name}")
    shown(page, 12)
    assert page.switch_to.active_element.tag_name == "h2"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_barriers_at_any_width(page, collection, width, dark, tmp_path):
    resize(page, width, dark=dark)
    search(page, collection[1] / "class 3" / "003.png", collection[1] / "class 4" / "004.png")
    shown(page, 24)
    assert_no_barriers(page, width)
    page.save_screenshot(
        os.environ.get("TCQ_SCREENSHOTS", str(tmp_path)) + f"/page-{width}-{'dark' if dark else 'light'}.png"
    )


def test_dropped_and_pasted_files(page, collection):
    script = """
      const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], arguments[2], {type: arguments[3]}));
      const event = arguments[1] === 'drop'
        ? new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})
        : new ClipboardEvent('paste', {clipboardData: data, bubbles: true});
      document.body.dispatchEvent(event);
    """
    import base64

    contents = base64.b64encode((collection[1] / "class 3" / "003.png").read_bytes()).decode()
    for kind in ("drop", "paste"):
        page.execute_script(script, contents, kind, f"{kind}.png", "image/png")
        wait(page, lambda kind=kind: every(page, "h2") and one(page, "h2").text == f"Like {kind}.png")
        shown(page, 12)
    page.execute_script(script, contents, "drop", "letter.txt", "text/plain")
    wait(page, lambda: one(page, "#status").text == "These are no images.")


def test_errors_are_shown_in_words(browser, collection, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with running(collection[0], k=12) as address:
        browser.get(address + "/")
        search(browser, tmp_path / "broken.png", collection[1] / "class 3" / "003.png")
        wait(browser, lambda: one(browser, "#status").text.startswith("broken.png: query:"))
        assert "error" in one(browser, "#status").get_attribute("class") and len(every(browser, "li")) == 12
        browser.get(address + "/?item=99999")
        wait(browser, lambda: "no image of the index has the id 99999" in one(browser, "#status").text)
    search(browser, collection[1] / "class 3" / "003.png")
    wait(browser, lambda: "is tcq serve still running?" in one(browser, "#status").text)
    browser.get_log("browser")
