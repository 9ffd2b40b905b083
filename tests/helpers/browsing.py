"""A headless Chromium, and what tests of pages need of it."""

import contextlib
import shutil
import sys
import time
from pathlib import Path

import pytest

AXE = Path(sys.prefix, "axe", "node_modules", "axe-core", "axe.min.js")
WIDTHS = (360, 768, 1280)


@contextlib.contextmanager
def chromium():
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def resize(browser, width, *, dark=False):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def one(browser, selector):
    return browser.find_element("css selector", selector)


def every(browser, selector):
    return browser.find_elements("css selector", selector)


def wait(browser, condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, one(browser, "#status").text
        time.sleep(0.05)


def press(browser, *keys):
    from selenium.webdriver import ActionChains, Keys

    for key in keys:
        ActionChains(browser).send_keys(getattr(Keys, key, key)).perform()


def assert_quiet(browser, address):
    """Nothing was requested elsewhere, and the console has no messages."""
    names = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith((address, "data:", "blob:")) for name in names), names
    assert [line for line in browser.get_log("browser") if "favicon" not in line["message"]] == []


def assert_no_barriers(browser, width):
    """Nothing is wider than the page, and axe-core finds no violation."""
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_script(AXE.read_text())
    result = browser.execute_async_script("axe.run().then(arguments[0])")
    assert [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in result["violations"]] == []
    assert len(result["passes"]) > 15
