import base64
import csv
import io
import json
import re
import shutil
import time

import cv2
import numpy as np
import pytest

from dinov2.eval.features import FeatureTable
from dinov2.eval.visualize import explorer
from dinov2.eval.visualize.figures import MissingExtra

plotly = pytest.importorskip("plotly")

PAGE_COUNT = 120


def make_page(folder, paths=None):
    """A page of 120 cells in three columns of points; cell i has the grey level 2 i."""
    count = PAGE_COUNT
    points = np.stack([np.arange(count) % 3, np.arange(count) // 3 / 10], axis=1).astype(np.float32)
    columns = {
        "class": [["basophil", "blast", "monocyte"][i % 3] for i in range(count)],
        "source": ["</script><b>" if i % 2 else "scanner" for i in range(count)],
    }
    neighbours = (np.arange(count)[:, None] + np.arange(1, 5)) % count
    sheets = explorer.thumbnail_sheets(lambda i: np.full((20, 20, 3), 2 * i, np.uint8), count, 32, progress=False)
    paths = paths or [f"/data/smears/{i:03d}.png" for i in range(count)]
    path = folder / "page.html"
    explorer.write_explorer(path, points, columns, paths, neighbours, sheets, size=32, title="Cells & <more>")
    return path


def payload(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_the_page_holds_points_names_neighbours_and_pictures(tmp_path):
    data = payload(make_page(tmp_path))
    assert data["count"] == PAGE_COUNT
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(data["x"]), "<f4")[:4], [0, 1, 2, 0])
    column = data["columns"][1]
    codes = np.frombuffer(base64.b64decode(column["codes"]), "<u2")
    assert [column["names"][code] for code in codes[:2]] == ["scanner", "</script><b>"]
    neighbours = np.frombuffer(base64.b64decode(data["neighbours"]["rows"]), "<i4").reshape(-1, 4)
    assert neighbours[5].tolist() == [6, 7, 8, 9]
    assert data["prefix"] + data["paths"][7] == "/data/smears/007.png"
    sheet = cv2.imdecode(np.frombuffer(base64.b64decode(data["thumbnails"]["sheets"][0]), np.uint8), 1)
    assert sheet.shape == (8 * 32, 16 * 32, 3)
    assert abs(int(sheet[32 + 16, 3 * 32 + 16, 0]) - 2 * 19) < 4  # the picture of row 19


def test_the_page_fetches_nothing_and_escapes_names(tmp_path):
    text = make_page(tmp_path).read_text(encoding="utf-8")
    own = text.replace(explorer._plotly_source(), "")
    assert not re.search(r'(?:src|href)\s*=\s*["\']', own)
    assert "http" not in own
    assert "<title>Cells &amp; &lt;more&gt;</title>" in own
    assert own.count("</script>") == 3
    assert "@@" not in own


def test_lengths_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"4 points do not fit \{'paths': 3\}"):
        explorer.write_explorer(
            tmp_path / "x.html", np.zeros((4, 2)), {"class": ["a"] * 4}, ["p"] * 3, np.zeros((4, 1)), [], size=8
        )


def test_a_missing_plotly_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(MissingExtra, match=r"pip install 'dinov2\[explore\]'"):
        explorer._plotly_source()


def test_clusters_are_numbered_from_the_largest_and_predictions_ignore_unlabelled_neighbours():
    features = np.repeat(np.eye(3), [4, 12, 6], axis=0).astype(np.float32)
    names = explorer.cluster(features, 3)
    assert [names[0], names[4], names[16]] == ["cluster 3", "cluster 1", "cluster 2"]
    table = FeatureTable(features[:4], np.array([0, 1, -1, -1]), list("abcd"), ["x", "y"])
    neighbours = np.array([[1, 2], [0, 2], [1, 0], [2, 2]])
    assert explorer.predict_by_neighbours(table, neighbours) == ["y", "x", "y", "unlabelled"]


def test_pictures_get_smaller_the_more_there_are():
    assert [explorer.thumbnail_size(n) for n in (100, 10_000, 100_000)] == [96, 64, 40]


def test_the_command_line_writes_a_page_from_a_table(cell_folder, tmp_path, capsys):
    paths = sorted(map(str, cell_folder.rglob("*.jpg")))
    labels = np.repeat(np.arange(4), 8)
    features = np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32)
    FeatureTable(features, labels, paths, ["a", "b", "c", "d"]).save(tmp_path / "table.npz")
    out = tmp_path / "cells.html"
    arguments = ["--embeddings", str(tmp_path / "table.npz"), "--out", str(out), "--method", "pca", "--k", "4"]
    assert explorer.main(arguments) == 0
    assert "32 cells" in capsys.readouterr().out
    assert [column["name"] for column in payload(out)["columns"]] == ["class", "prediction", "agreement", "cluster"]


# --------------------------------------------------------------------------- in a real browser


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in ("--headless=new", "--no-sandbox", "--window-size=1300,850", "--enable-unsafe-swiftshader"):
        options.add_argument(option)
    downloads = tmp_path / "downloads"
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chrome.downloads = downloads
    yield chrome
    chrome.quit()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    return value


PIXEL_OF = """
const map = document.getElementById("map"), box = map.getBoundingClientRect(), l = map._fullLayout;
return [box.x + l.xaxis._offset + l.xaxis.d2p(arguments[0]), box.y + l.yaxis._offset + l.yaxis.d2p(arguments[1])];
"""


@pytest.mark.slow
def test_in_a_browser_cells_can_be_hovered_clicked_selected_and_saved(browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    browser.get(make_page(tmp_path).as_uri())
    wait_for(lambda: browser.execute_script("return document.body.dataset.ready"))
    find = lambda selector: browser.find_element(By.CSS_SELECTOR, selector)  # noqa: E731

    def mouse_to(row):
        x, y = browser.execute_script(PIXEL_OF, row % 3, row // 3 / 10)
        actions = ActionChains(browser, duration=50)
        actions.w3c_actions.pointer_action.move_to_location(int(x), int(y))
        return actions

    mouse_to(61).perform()
    mouse_to(60).perform()
    wait_for(lambda: find("#tip").is_displayed())
    assert "060.png" in find("#tip").text
    assert "basophil" in find("#tip").text
    assert "url(" in find("#tip .thumb").get_attribute("style")

    mouse_to(60).click().perform()
    wait_for(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#neighbours figure")) == 4)
    rows = [f.get_attribute("data-row") for f in browser.find_elements(By.CSS_SELECTOR, "#neighbours figure")]
    assert rows == ["61", "62", "63", "64"]

    # a lasso around the middle column, which are all the blasts
    browser.execute_script("return Plotly.relayout('map', {dragmode: 'lasso'})")
    corners = [browser.execute_script(PIXEL_OF, x, y) for x, y in [(0.5, -0.2), (1.5, -0.2), (1.5, 4.2), (0.5, 4.2)]]
    lasso = ActionChains(browser, duration=30)
    for index, (x, y) in enumerate(corners):
        lasso.w3c_actions.pointer_action.move_to_location(int(x), int(y))
        if index == 0:
            lasso.w3c_actions.pointer_action.pointer_down()
    lasso.w3c_actions.pointer_action.pointer_up()
    lasso.perform()
    wait_for(lambda: find("#selected-count").text == "40")
    assert find("#tally").text == "blast 40"

    find("#save").click()
    saved = browser.downloads / "selected_cells.csv"
    wait_for(saved.exists)
    table = list(csv.DictReader(io.StringIO(saved.read_text(encoding="utf-8"))))
    assert len(table) == 40
    assert {row["class"] for row in table} == {"blast"}
    assert table[0]["path"] == "/data/smears/001.png"
    assert float(table[0]["x"]) == 1

    # another colouring keeps the selection and counts it anew
    browser.execute_script(
        "const s = document.getElementById('colour'); s.value = 1; s.dispatchEvent(new Event('change'))"
    )
    wait_for(lambda: "scanner 20" in find("#tally").text)
    find("#clear").click()
    wait_for(lambda: find("#selected-count").text == "0")
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
