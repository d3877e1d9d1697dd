"""The web page of a search, in a real browser."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import urllib.request

import pytest

from tests.search.toy import SETTINGS, build_model, memory, train
from torchdyn_snopt.errors import UnsupportedError
from torchdyn_snopt.search import (
    HorizonSearch,
    dashboard,
    serve_dashboard,
    show_on_dashboard,
    write_report,
)

SMALL = dataclasses.replace(SETTINGS, trials=3)


@pytest.fixture
def search(tmp_path):
    pytest.importorskip("optuna_dashboard", reason="the extra 'dashboard' is not installed")
    found = HorizonSearch(memory(), "toy", SMALL, tmp_path, title="Toy")
    found.work(build_model, train)
    comparison = found.comparison()
    write_report(comparison, tmp_path)
    show_on_dashboard(found, comparison, tmp_path)
    return found


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1400,1800",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(option)
    service = webdriver.ChromeService(executable_path=driver)
    running = webdriver.Chrome(options=options, service=service)
    try:
        yield running
    finally:
        running.quit()


def test_the_address_is_on_loopback_and_lists_both_studies(search):
    with serve_dashboard(search) as address:
        assert address.startswith("http://127.0.0.1:")
        api = address.removesuffix("/dashboard") + "/api/studies"
        with urllib.request.urlopen(api, timeout=20) as answer:
            studies = json.load(answer)["study_summaries"]
    assert {study["study_name"] for study in studies} == {"toy", "toy (joint)"}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_page_shows_arms_best_t1_and_picture(search, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    study_id = search.load(1)._study_id
    best = search.comparison().summary("policy", 0).best
    with serve_dashboard(search) as address:
        browser.get(f"{address}/studies/{study_id}/note")
        wait = WebDriverWait(browser, 60)
        wait.until(lambda page: "Best t1" in page.find_element(By.TAG_NAME, "body").text)
        text = browser.find_element(By.TAG_NAME, "body").text
        pictures = [i for i in browser.find_elements(By.TAG_NAME, "img") if _is_loaded(browser, i)]
        wait.until(lambda page: any(_is_loaded(page, i) for i in _images(page)))
        pictures = [i for i in _images(browser) if _is_loaded(browser, i)]
        browser.save_screenshot(str(tmp_path / "note.png"))
        browser.get(f"{address}/studies/{study_id}")
        wait.until(lambda page: "Best" in page.find_element(By.TAG_NAME, "body").text)
        browser.save_screenshot(str(tmp_path / "study.png"))
    for title in ("SNOpt policy (one run)", "depth search, TPE", "joint search, NSGA-II"):
        assert title in text
    assert f"Best t1: {best.last('t1'):.3f}" in text
    assert pictures
    keep = os.environ.get("TORCHDYN_SNOPT_SCREENSHOTS")
    if keep:
        for name in ("note", "study"):
            shutil.copy(tmp_path / f"{name}.png", keep)


def _images(page):
    from selenium.webdriver.common.by import By

    return page.find_elements(By.TAG_NAME, "img")


def _is_loaded(page, image):
    """Whether a picture of the report's size has arrived."""
    script = "return arguments[0].complete ? arguments[0].naturalWidth : 0"
    return page.execute_script(script, image) > 1000


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    found = HorizonSearch(memory(), "toy", SMALL, tmp_path)
    monkeypatch.setattr(dashboard.importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(UnsupportedError, match=r"torchdyn-snopt\[dashboard\]"),
        serve_dashboard(found),
    ):
        pass
