"""The page of `tcq judge` in headless Chromium: by mouse, by keyboard, at three widths, in light and dark."""

import os
import shutil

import pytest

from browsing import WIDTHS, assert_no_barriers, assert_quiet, chromium, every, one, press, resize, wait
from judging import judging
from tcq.evaluate import judge

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(browser, digits_run, tmp_path):
    """The page with its first question, and what the judge has returned at the end."""
    source, judge_by = judge.prepare(shutil.copytree(digits_run, tmp_path / "run"), count=3, labels=False)
    with judging(judge_by, source, ends_itself=False) as (address, ends):
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get(address + "/")
        asks(browser, 1)
        yield browser, ends
        assert_quiet(browser, address)


def asks(browser, number):
    wait(browser, lambda: one(browser, "#progress").text == f"question {number}")
    drawn = "return [...document.images].every(i => i.complete && i.naturalWidth > 100)"
    wait(browser, lambda: browser.execute_script(drawn))


def ended(browser):
    wait(browser, lambda: one(browser, "#status").text.startswith("Done."))
    assert browser.switch_to.active_element.get_attribute("id") == "result"
    assert not one(browser, "#question").is_displayed()
    return one(browser, "#result").text


def test_answers_by_mouse(page):
    browser, ends = page
    names = [e.text for e in every(browser, "figcaption")]
    for number, answer in enumerate(("same", "different", "same"), 1):
        asks(browser, number)
        one(browser, f"[data-answer={answer}]").click()
    assert ended(browser).startswith("3 answers: ")
    wait(browser, lambda: ends)
    assert ends[0].answers == 3 and len(set(names)) == 2


def test_answers_by_keyboard(page):
    browser, _ = page
    press(browser, "y")
    asks(browser, 2)
    press(browser, "n")
    asks(browser, 3)
    press(browser, "q")
    assert ended(browser).startswith("2 answers: ")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_barriers_at_any_width(page, width, dark, tmp_path):
    browser, _ = page
    resize(browser, width, dark=dark)
    assert_no_barriers(browser, width)
    place = os.environ.get("TCQ_SCREENSHOTS", str(tmp_path))
    browser.save_screenshot(f"{place}/judge-{width}-{'dark' if dark else 'light'}.png")
    press(browser, "q")
    ended(browser)
    assert_no_barriers(browser, width)
