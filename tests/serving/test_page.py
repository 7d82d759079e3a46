"""The page at / in a real browser: Chromium, where the machine has one."""

import shutil
import time

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "window-size=390,900",
    ):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser):
    """url → the page there, open and filled in."""

    def opened(url):
        browser.get(f"{url}/")
        shows(browser, "state", "Ready.")
        browser.get_log("browser")  # what other tests provoked
        return browser

    return opened


def text(browser, name):
    return browser.find_element(By.ID, name).text


def shows(browser, name, words, timeout_s=30):
    """Waits until the element shows the words."""
    end = time.monotonic() + timeout_s
    while words not in text(browser, name):
        assert time.monotonic() < end, f"{name} shows {text(browser, name)!r}, not {words!r}"
        time.sleep(0.05)


def fill(browser, **values):
    for name, value in values.items():
        field = browser.find_element(By.ID, name)
        field.clear()
        field.send_keys(str(value))


def press(browser, name):
    browser.find_element(By.ID, name).click()


def points(browser, name):
    return (browser.find_element(By.ID, name).get_attribute("d") or "").count("L")


def test_a_forecast_is_drawn(page, applications):
    browser = page(applications["real"])
    fill(browser, horizon=12, samples=4)
    press(browser, "go")
    shows(browser, "said", "tiny on cpu")
    assert points(browser, "history") == 95
    assert points(browser, "median") == 12
    assert points(browser, "band") == 23  # twelve highs, and twelve lows back
    shows(browser, "replicas", "← answered")
    # The favicon aside, which browsers ask for by themselves, nothing is missing and nothing has failed.
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry for entry in severe if "favicon" not in entry["message"]] == []


def test_bars_appear_while_later_ones_are_computed_and_stop_stops(page, applications):
    browser = page(applications["slow"])
    fill(browser, horizon=400, samples=3)
    press(browser, "go")
    shows(browser, "said", " of 400 bars")
    assert 0 < points(browser, "median") < 400
    press(browser, "stop")
    shows(browser, "said", "Stopped.")
    end = time.monotonic() + 10
    while any(
        replica["running_rows"] for replica in httpx.get(f"{applications['slow']}/v1/replicas").json()["replicas"]
    ):
        assert time.monotonic() < end, "the replica goes on computing"
        time.sleep(0.1)


def test_what_is_refused_is_said(page, applications):
    browser = page(applications["real"])
    fill(browser, horizon=100000)
    press(browser, "go")
    shows(browser, "said", "at most 512 bars")


def test_devices_and_warnings_are_shown_on_a_phone(page, applications):
    browser = page(applications["real"])
    shows(browser, "replicas", "cpu")
    replicas = httpx.get(f"{applications['real']}/v1/replicas").json()["replicas"]
    shown = text(browser, "replicas")
    assert all(replica["replica_id"] in shown and replica["device"] in shown for replica in replicas)
    warning = httpx.get(f"{applications['real']}/v1/readyz").json().get("device_warning")
    assert text(browser, "warning") == (warning or "")
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
