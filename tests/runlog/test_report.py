"""The run's page, as a reader sees it in a browser."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from skimage import data

from mambair_ds.config import RunConfig, load_config
from mambair_ds.data.degradations import add_validation_noise, resize_uint8
from mambair_ds.runlog import Trackers, save_detail
from mambair_ds.runlog.report import write_report

HERE = Path(__file__).parent


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(HERE.parent.parent / "configs/demo.yml", [f"experiments_root={tmp_path}", "name=a_run"])


@pytest.fixture
def run(config: RunConfig) -> Path:
    """A folder of a run of 400 iterations that was interrupted at 230 and went on from 200."""
    folder = config.folder
    folder.mkdir(parents=True)
    (folder / "config.yml").write_text((HERE.parent.parent / "configs/demo.yml").read_text() + "\n# </script><b>\n")
    environment = {"python": "3.11", "gpus": [], "host": "node1", "world_size": 2, "launcher": "torchrun"}
    (folder / "environment.json").write_text(json.dumps(environment))
    random = np.random.default_rng(0)
    gt = data.chelsea()[:300, :450]
    lq = resize_uint8(gt, 0.5)
    for began, ended in ((0, 230), (200, 400)):
        trackers = Trackers(config, began, None)
        for i in range(began + 1, ended + 1):
            scalars = {"losses/l_pix": 0.08 / i**0.4 * random.uniform(0.8, 1.25), "lr": 2e-3 * (1 - i / 401)}
            scalars |= {"time/iteration": 0.4 + random.uniform(0, 0.05), "time/data": 0.002, "samples_per_second": 20.0}
            trackers.scalars(scalars | {"memory_mb": 900.0, "grad_norm": random.uniform(0.1, 0.3)}, i)
            if i % 100 == 0:
                for name, best in (("held_out", 36), ("Set5", 37)):
                    trackers.scalars({f"metrics/{name}/psnr": best - 100 / i, f"metrics/{name}/ssim": 0.9}, i)
                    restored = np.clip(resize_uint8(lq, 2) * (1 - 20 / i), 0, 255).astype(np.uint8)
                    save_detail(folder, name, "the cat", i, lq, restored, gt)
        if began == 0:
            trackers.event("skipped", 150, reason="the loss is not finite")
        trackers.close()
    return folder


def browser_path() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def browser() -> Iterator[object]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if browser_path() is None:
        pytest.skip("no Chromium on this machine (apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_curves_pictures_and_settings_without_a_network(run: Path, browser, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    wrong, asked = [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto((run / "report/index.html").as_uri())
    page.wait_for_load_state("networkidle")
    assert wrong == []
    assert all(url.startswith("file://") for url in asked)
    titles = page.locator(".card h3").all_inner_texts()
    assert {"Pixel loss", "PSNR (dB)", "Learning rate", "Samples per second", "Memory (MB)"} <= set(titles)
    # A restart and a skipped step in every curve, and both in the table.
    assert page.locator("section.card").first.locator("line.mark").count() == 2
    events = page.locator("#events").inner_text()
    assert "restart" in events
    assert "the loss is not finite" in events
    assert page.evaluate("[...document.querySelectorAll('#view img')].every(i => i.naturalWidth === 288)")
    # The divider follows the pointer, the pictures follow the validation.
    page.locator("#view").scroll_into_view_if_needed()
    box = page.locator("#view").bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 50)
    assert page.locator("#view").get_attribute("aria-valuenow") == "25"
    before = page.locator("#view img").first.get_attribute("src")
    page.locator("[aria-label=validation]").fill("0")
    assert before.endswith("network_0000400.png")
    assert page.locator("#view img").first.get_attribute("src").endswith("network_0000100.png")
    page.get_by_label("Left").select_option("gt")
    assert page.locator("#view img").nth(1).get_attribute("src").endswith("gt.png")
    page.get_by_text("Configuration").click()
    assert "</script><b>" in page.locator("pre").inner_text()
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{folder}/{scheme}_{width}.png", full_page=True)


def test_a_page_of_a_run_that_has_logged_nothing_says_so(config: RunConfig, browser) -> None:
    trackers = Trackers(config, 0, None)
    page = browser.new_page()
    page.goto((config.folder / "report/index.html").as_uri())
    assert "Nothing logged yet" in page.inner_text("body")
    trackers.close()


def test_a_report_that_cannot_be_written_is_said_once_and_stops_nothing(
    config: RunConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.folder.mkdir(parents=True)
    (config.folder / "report").write_text("in the way")
    monkeypatch.setattr(logging.getLogger("mambair_ds"), "propagate", True)
    trackers = Trackers(config, 0, None)
    trackers.scalars({"lr": 1.0}, 1)
    trackers.close()
    assert caplog.text.count("The report could not be brought up to date") == 1
    assert (config.folder / "log/metrics.jsonl").read_text().count("\n") == 2


def test_long_runs_make_small_pages(config: RunConfig) -> None:
    trackers = Trackers(config, 0, None)
    with (config.folder / "log/metrics.jsonl").open("a") as file:
        file.writelines(f'{{"iteration": {i}, "time": {i}, "losses/l_pix": 0.123456789}}\n' for i in range(1, 20001))
    assert write_report(config.folder).stat().st_size < 100_000
    trackers.close()


def test_noise_is_shown_as_a_picture(tmp_path: Path) -> None:
    gt = data.chelsea()
    save_detail(tmp_path, "set", "cat", 8, add_validation_noise(gt, 25), gt, gt)
    files = sorted(path.name for path in (tmp_path / "report/pictures/set/cat").iterdir())
    assert files == ["gt.png", "lq.png", "network_0000008.png"]
