"""The page of `tcq judge` in headless Chromium: by mouse, by keyboard, at three widths, in light and dark."""

import json
import os
import shutil
import time

import pytest

from browsing import WIDTHS, assert_no_barriers, assert_quiet, chromium, every, one, press, resize, wait
from judging import judging
from tcq.evaluate import judge, judge_page, kinds

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(browser, digits_run, tmp_path):
    """The page with its first question, what the judge has returned at the end, and the workdir."""
    workdir = shutil.copytree(digits_run, tmp_path / "run")
    source, judge_by = judge.prepare(workdir, count=3, labels=False)
    with judging(judge_by, source, ends_itself=False) as (address, ends):
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get(address + "/")
        asks(browser, 1)
        yield browser, ends, workdir
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


def stored(page):
    rows = [json.loads(line) for line in (page / judge.ANSWERS).read_text().splitlines()]
    return [[row["same"] for row in rows[i : i + kinds.NEIGHBOURS]] for i in range(0, len(rows), kinds.NEIGHBOURS)]


def picks(*places):
    return [place in places for place in range(1, kinds.NEIGHBOURS + 1)]


def test_answers_by_mouse(page):
    browser, ends, workdir = page
    names = [e.text for e in every(browser, "#anchor figcaption, #others span")]
    assert one(browser, "#next").text == "None of them n"
    for place in (3, 5, 8, 5):
        every(browser, "#others button")[place - 1].click()
    assert one(browser, "#next").text == "These 2 n"
    pressed = [b.get_attribute("aria-pressed") == "true" for b in every(browser, "#others button")]
    assert pressed == picks(3, 8)
    for number in (1, 2, 3):
        asks(browser, number)
        one(browser, "#next").click()
    assert ended(browser).startswith("3 answers: ")
    wait(browser, lambda: ends)
    assert ends[0].answers == 3 and len({*names}) == 1 + kinds.NEIGHBOURS
    assert stored(workdir) == [picks(3, 8), picks(), picks()]


def test_answers_by_keyboard(page):
    browser, _, workdir = page
    press(browser, "2", "7", "7", "9", "x", "n")
    asks(browser, 2)
    press(browser, "1")
    assert one(browser, "#next").text == "This one n"
    press(browser, "n")
    asks(browser, 3)
    press(browser, "4", "q")
    assert ended(browser).startswith("2 answers: ")
    assert stored(workdir) == [picks(2), picks(1)]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_barriers_at_any_width(page, width, dark, tmp_path):
    browser, _, _ = page
    resize(browser, width, dark=dark)
    press(browser, "2")
    assert_no_barriers(browser, width)
    place = os.environ.get("TCQ_SCREENSHOTS", str(tmp_path))
    browser.save_screenshot(f"{place}/judge-{width}-{'dark' if dark else 'light'}.png")
    press(browser, "q")
    ended(browser)
    assert_no_barriers(browser, width)


def test_the_page_waits_for_a_late_first_question(browser, digits_run, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_page, "WAIT", 0.2)
    source, judge_by = judge.prepare(shutil.copytree(digits_run, tmp_path / "run"), count=3, labels=False)

    def late(ask):
        time.sleep(2)
        return judge_by(ask)

    with judging(late, source, ends_itself=False) as (address, _):
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get(address + "/")
        asks(browser, 1)
        assert_quiet(browser, address)
