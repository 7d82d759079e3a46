"""The page at / in a real browser: Chromium, where the machine has one."""

import shutil

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
def shows(browser, wait):
    """(element, words): waits until the element shows the words."""
    return lambda name, words: wait(lambda: words in text(browser, name), 30, 0.05)


@pytest.fixture
def page(browser, shows):
    """url → the page there, open and filled in."""

    def opened(url):
        browser.get(f"{url}/")
        shows("state", "Ready.")
        browser.get_log("browser")  # what other tests provoked
        return browser

    return opened


def text(browser, name):
    return browser.find_element(By.ID, name).text


def fill(browser, **values):
    for name, value in values.items():
        field = browser.find_element(By.ID, name)
        field.clear()
        field.send_keys(str(value))


def press(browser, name):
    browser.find_element(By.ID, name).click()


def points(browser, name):
    return (browser.find_element(By.ID, name).get_attribute("d") or "").count("L")


def test_a_forecast_is_drawn(page, shows, applications):
    browser = page(applications["real"])
    fill(browser, horizon=12, samples=4)
    press(browser, "go")
    shows("said", "tiny on cpu")
    assert points(browser, "history") == 95
    assert points(browser, "median") == 12
    assert points(browser, "band") == 23  # twelve highs, and twelve lows back
    shows("replicas", "← answered")
    # The favicon aside, which browsers ask for by themselves, nothing is missing and nothing has failed.
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry for entry in severe if "favicon" not in entry["message"]] == []


def test_bars_appear_while_later_ones_are_computed_and_stop_stops(page, shows, wait, applications):
    browser = page(applications["slow"])
    fill(browser, horizon=400, samples=3)
    press(browser, "go")
    shows("said", " of 400 bars")
    assert 0 < points(browser, "median") < 400
    press(browser, "stop")
    shows("said", "Stopped.")
    replicas = f"{applications['slow']}/v1/replicas"
    wait(lambda: not any(replica["running_rows"] for replica in httpx.get(replicas).json()["replicas"]), 10)


def test_what_is_refused_is_said(page, shows, applications):
    browser = page(applications["real"])
    fill(browser, horizon=100000)
    press(browser, "go")
    shows("said", "at most 512 bars")


def test_devices_and_warnings_are_shown_on_a_phone(page, shows, applications):
    browser = page(applications["real"])
    shows("replicas", "cpu")
    replicas = httpx.get(f"{applications['real']}/v1/replicas").json()["replicas"]
    shown = text(browser, "replicas")
    assert all(replica["replica_id"] in shown and replica["device"] in shown for replica in replicas)
    warning = httpx.get(f"{applications['real']}/v1/readyz").json().get("device_warning")
    assert text(browser, "warning") == (warning or "")
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
