"""The operator's page in a real browser: by keyboard alone, judged by axe, and a swap of a model."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import axe_selenium_python
import numpy as np
import pytest
import uvicorn
from api_harness import STUDY, ApiHarness
from PIL import Image
from programs import program
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from sqlalchemy import select

from service.components import listen
from service.console import build_console
from service.console.frame import MENU
from service.records.database import Records
from service.records.jobs import refuse_job, renew_lease
from service.records.migrate import upgrade
from service.records.tables import Delivery, DeliveryState, Result, ResultKind

Driver = webdriver.Chrome
_AXE = Path(axe_selenium_python.__file__).parent / "node_modules/axe-core/axe.min.js"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiHarness]:
    """A node with something of everything: a running, a refused and a finished job, a parked delivery."""
    folder = tmp_path_factory.mktemp("node")
    url = f"sqlite:///{folder / 'records.sqlite'}"
    upgrade(url)
    records = Records(url)
    destinations = [{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 1, "timeout_s": 1}]
    storage = {"low_watermark_bytes": 0, "reserve_bytes": 0}
    # What the gate finds has tests of its own.
    models = {"require_gate": False}
    api = ApiHarness(folder, records, destinations=destinations, storage=storage, models=models)
    build_console(api.app, api.app.state.api)
    api.install()
    api.install(activate=False, version="1.1.0")

    succeeded = api.enqueue(instances=[api.receive_instance()], destinations=["pacs"])
    api.succeed(succeeded)
    picture = api.spool.results_dir / succeeded / "preview"
    Image.fromarray(np.full((120, 360, 3), (20, 60, 90), np.uint8)).save(picture, format="png")
    with records.write() as session:
        session.add(
            Result(
                job_id=succeeded, kind=ResultKind.PREVIEW, path=api.spool.relative(picture),
                size_bytes=picture.stat().st_size, sha256="0" * 64, created_at=api.now,
            )
        )  # fmt: skip
        for delivery in session.scalars(select(Delivery)):
            delivery.state, delivery.last_status = DeliveryState.PARKED, 0x0122
            delivery.last_error = "The peer answered 0x0122."
    refused = api.enqueue(instances=[api.receive_instance("2", study=f"{STUDY}.2")], study=f"{STUDY}.2")
    attempt = api.claim(refused).attempt
    with records.write() as session:
        refuse_job(
            session, refused, attempt, code="GANTRY_TILT", reason="The gantry is tilted by 18.5 degrees.",
            remedy="Route upright series, or set gantry_tilt: resample.", now=api.now,
        )  # fmt: skip
    running = api.enqueue()
    attempt = api.claim(running).attempt
    with records.write() as session:
        renew_lease(session, running, attempt, stage="forward", fraction=0.4, lease_s=600, now=api.now)
    yield api
    records.close()


@pytest.fixture(scope="module")
def address(node: ApiHarness) -> Iterator[str]:
    with listen("HTTP", "127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(node.app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    options = Options()
    options.binary_location = program("chromium", "chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, Service(program("chromedriver", "chromium-driver")))
    yield browser
    browser.quit()


@pytest.fixture
def page(driver: Driver, address: str, node: ApiHarness) -> Driver:
    """A browser that an administrator logged in with, by keyboard alone."""
    driver.delete_all_cookies()
    driver.get(f"{address}/")
    wait_for(driver, "Log in")
    press(driver, Keys.TAB)  # to the link that skips the menu
    press(driver, Keys.TAB)
    assert driver.switch_to.active_element.get_attribute("id") == "key"
    press(driver, node.secrets["admin"], Keys.ENTER)
    wait_for(driver, "Queue")
    return driver


def wait(driver: Driver) -> WebDriverWait[Driver]:
    """Waits until a page is there; while one gives way to the next its elements are stale."""
    return WebDriverWait(driver, 20, ignored_exceptions=[StaleElementReferenceException])


def wait_for(driver: Driver, heading: str) -> None:
    wait(driver).until(lambda d: d.find_element(By.TAG_NAME, "h1").text == heading)


def press(driver: Driver, *keys: str) -> None:
    driver.switch_to.active_element.send_keys(*keys)


def tab_to(driver: Driver, name: str) -> None:
    """Press the tabulator until what has the focus is called so."""
    for _ in range(60):
        press(driver, Keys.TAB)
        focused = driver.switch_to.active_element
        if name in (focused.text, focused.accessible_name):
            assert focused.value_of_css_property("outline-style") != "none", "the focus cannot be seen"
            return
    pytest.fail(f"{name!r} cannot be reached by keyboard")


def body(driver: Driver) -> str:
    return driver.find_element(By.TAG_NAME, "body").text


@pytest.mark.parametrize("path", [*(path for path, _, _ in MENU), f"studies/{STUDY}", "login", "nowhere"])
def test_axe_finds_nothing_on_any_page(page: Driver, address: str, path: str, tmp_path: Path) -> None:
    page.get(f"{address}/console/{path}?live=false")
    page.execute_script(_AXE.read_text())
    found: dict[str, Any] = page.execute_async_script(
        "const done = arguments[0], tags = ['wcag2a', 'wcag2aa'];"
        "axe.run(document, {runOnly: {type: 'tag', values: tags}, iframes: false})"
        ".then(done, error => done({violations: [{id: String(error), nodes: []}]}))"
    )
    assert not [(each["id"], [n["html"] for n in each["nodes"]]) for each in found["violations"]]
    picture = Image.open(io.BytesIO(page.get_screenshot_as_png()))
    picture.save(tmp_path / "page.png")
    assert len(set(picture.convert("L").resize((64, 64)).get_flattened_data())) > 3, "an empty picture"


def test_a_model_is_swapped_by_keyboard_and_the_audit_tells_who(page: Driver, node: ApiHarness) -> None:
    tab_to(page, "Models")
    press(page, Keys.ENTER)
    wait_for(page, "Models")
    tab_to(page, "Make threshold 1.1.0 active")
    press(page, Keys.ENTER)
    wait(page).until(lambda d: "threshold 1.1.0 is active" in body(d))
    assert node.registry.active_version("threshold") == "1.1.0"
    tab_to(page, "Take threshold back to the version before")
    press(page, Keys.ENTER)
    wait(page).until(lambda d: "threshold is back on 1.0.0" in body(d))
    tab_to(page, "Audit")
    press(page, Keys.ENTER)
    wait_for(page, "Audit")
    assert "model.activated" in body(page)
    assert "admin" in body(page)


def test_the_queue_shows_progress_and_reasons_and_reads_itself_again(page: Driver, address: str) -> None:
    page.get(f"{address}/console/queue")
    progress = page.find_element(By.TAG_NAME, "progress")
    assert float(progress.get_attribute("value") or 0) == pytest.approx(0.4)
    assert "GANTRY_TILT" in body(page)
    assert page.find_elements(By.CSS_SELECTOR, "meta[http-equiv=refresh]")
    tab_to(page, "Stop that")
    press(page, Keys.ENTER)
    wait(page).until(lambda d: "This page stays as it is" in body(d))
    assert not page.find_elements(By.CSS_SELECTOR, "meta[http-equiv=refresh]")


def test_a_study_shows_its_preview(page: Driver, address: str) -> None:
    page.get(f"{address}/console/studies/{STUDY}")
    picture = page.find_element(By.CSS_SELECTOR, "figure img")
    wait(page).until(lambda _: picture.get_property("complete"))
    assert picture.get_property("naturalWidth") == 360
    assert "SECRET-PATIENT" not in page.page_source


# pynetdicom leaves the socket of a connection that is refused to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_parked_delivery_is_retried_and_a_silent_destination_says_why(page: Driver, address: str) -> None:
    page.get(f"{address}/console/destinations")
    tab_to(page, "C-ECHO to pacs")
    press(page, Keys.ENTER)
    wait(page).until(lambda d: "pacs did not answer" in body(d))
    page.get(f"{address}/console/deliveries?of=parked")
    tab_to(page, "Retry the delivery to pacs")
    press(page, Keys.ENTER)
    wait(page).until(lambda d: "The delivery waits again" in body(d))


def test_nothing_is_asked_of_another_host(page: Driver, address: str) -> None:
    for path, _, _ in MENU:
        page.get(f"{address}/console/{path}")
        asked = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert all(url.startswith((address, "data:")) for url in asked), asked
