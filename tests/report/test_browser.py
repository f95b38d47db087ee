"""Pages in a real browser, that of a real run first: Debian's packages chromium and chromium-driver."""

import json
import shutil
from dataclasses import asdict

import pytest

from samtune.sharpness.measure import Measures
from samtune.sharpness.report import write as write_sharpness
from tests.conftest import image_bytes, samtune, write_image_folder
from tests.report.test_run_page import value_at
from tests.support.run_folders import write_sweep

pytestmark = pytest.mark.browser

# Of all text that is seen: the contrast with the first background that is not transparent, by WCAG 2.2.
CONTRASTS = """
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (rgb) => {
  const [r, g, b] = rgb.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const background = (element) => {
  for (; element; element = element.parentElement) {
    const rgb = numbers(getComputedStyle(element).backgroundColor);
    if (rgb.length === 3 || rgb[3] > 0) return rgb;
  }
  return null;
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || element.closest("style, title, desc")) continue;
  const style = getComputedStyle(element);
  const text = light(numbers(element.closest("svg") ? style.fill : style.color));
  const behind = light(background(element));
  const contrast = (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05);
  found.push([contrast, walker.currentNode.textContent.trim().slice(0, 40)]);
}
return found;
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs, with all that a page may show."""
    data = write_image_folder(tmp_path_factory.mktemp("data") / "pets", {"train": 24, "test": 16})
    folder = tmp_path_factory.mktemp("runs") / "r1"
    done = samtune(
        *("run", "--model", "resnet10t", "--no-pretrained", "--img-size", 32, "--epochs", 2, "--workers", 0),
        *("--model-ema", "--sam-start", "50%", "--dataset", data, "--output", folder),
    )
    assert done.returncode == 0, done.stderr
    assert f"page    {folder / 'report.html'}" in done.stderr
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module", params=["sweep", "comparison"])
def other(request, tmp_path_factory):
    """(page, its report) of a sweep and of a comparison of its runs."""
    folder = tmp_path_factory.mktemp("sweep")

    def wrong(run):
        more = (1 + run.seed % 2) * (run.arm == "sgd") + round(10 * run.point.get("rho", 0))
        return range(run.seed, 4 + 3 * run.seed + more)

    write_sweep(
        folder / "s", 'seeds = 3\nbudgets = ["100 passes", "200 passes"]\n[sweep.grid]\nrho=[0.05, 0.1]\n', wrong
    )
    given = [folder / "s"]
    if request.param == "comparison":
        given = [folder / "s" / "runs" / f"b100p-final-{arm}-seed{seed}" for arm in ("sgd", "sam") for seed in range(3)]
    done = samtune("report", *given, "--output", folder / "out")
    assert done.returncode == 0, done.stderr
    name = "report" if request.param == "sweep" else "comparison"
    return folder / "out" / f"{name}.html", json.loads((folder / "out" / f"{name}.json").read_text())


def look(browser, folder, *, width=1000, scheme="light", name="report.html"):
    """Open a page afresh; returns what the browser's logs say of it."""
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get((folder / name).as_uri())
    return browser.get_log("browser"), [json.loads(row["message"])["message"] for row in browser.get_log("performance")]


def look_alone(browser, page, **how):
    """Open a page, which renders without errors and asks for nothing but itself."""
    said, events = look(browser, page.parent, name=page.name, **how)
    assert said == []
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert not [event for event in events if event["method"] == "Network.loadingFailed"]


def open_details(browser):
    browser.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")


def width_of(browser):
    return browser.execute_script("return document.documentElement.scrollWidth")


def legible(browser):
    """The number of texts, all of which stand out from their ground."""
    found = browser.execute_script(CONTRASTS)
    assert [(round(contrast, 2), text) for contrast, text in found if contrast < 4.5] == []
    return len(found)


def numbers_of(browser, report):
    """(path, value, text) of the page's numbers; the values are those of its report."""
    shown = browser.execute_script(
        "return [...document.querySelectorAll('data')].map(e => [e.dataset.path, e.value, e.innerText])"
    )
    assert shown
    assert all(json.loads(value) == value_at(report, path) for path, value, _ in shown)
    return shown


def test_it_renders_without_errors_and_asks_for_nothing(browser, finished):
    look_alone(browser, finished / "report.html")
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('svg, img')].map(e => [e.tagName, e.getBoundingClientRect().height,"
        " e.tagName == 'IMG' ? e.naturalWidth : 1])"
    )
    assert len([kind for kind, _, _ in sizes if kind == "svg"]) == 5
    assert any(kind == "IMG" for kind, _, _ in sizes)
    assert all(height > 50 and natural > 0 for _, height, natural in sizes)


def test_its_numbers_are_those_of_report_json(browser, finished):
    look(browser, finished)
    report = json.loads((finished / "report.json").read_text())
    shown = numbers_of(browser, report)
    headline = browser.execute_script("return document.querySelector('.headline').innerText")
    test = report["test"]
    assert f"{test['top1_error']:.2f}\N{NO-BREAK SPACE}%" in headline
    assert f"{test['wrong']} of {test['n']} images wrong" in " ".join(headline.split())
    for path in ("test.top1_error", "val.top1_error", "ema.test.top1_error", "train_seconds"):
        assert path in {path for path, _, _ in shown}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(browser, finished, scheme):
    look(browser, finished, scheme=scheme)
    open_details(browser)
    ground = browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")
    assert legible(browser) > 300


def test_the_keyboard_reaches_the_content_and_opens_every_table(browser, finished):
    from selenium.webdriver import ActionChains, Keys

    look(browser, finished)

    def press(key):
        ActionChains(browser).send_keys(key).perform()
        return browser.switch_to.active_element

    skip = press(Keys.TAB)
    assert skip.text == "Skip to the content"
    assert skip.rect["x"] >= 0
    assert browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", skip) == "solid"
    assert press(Keys.ENTER)
    assert browser.current_url.endswith("#main")
    details = browser.execute_script("return document.querySelectorAll('details').length")
    assert details == 6
    opened = 0
    for _ in range(100):
        focused = press(Keys.TAB)
        if focused.tag_name == "summary":
            assert browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", focused) == "solid"
            press(Keys.ENTER)
            opened += 1
        if focused.tag_name == "body":
            break
    assert opened == details
    assert browser.execute_script("return document.querySelectorAll('details[open] table').length") == details


@pytest.mark.parametrize("width", [320, 1000])
def test_no_page_is_wider_than_its_screen(browser, finished, width):
    look(browser, finished, width=width)
    open_details(browser)
    assert width_of(browser) <= width
    out = (
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll > *, .skip, svg *') &&"
        " e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80))"
    )
    assert browser.execute_script(out) == []


def test_other_pages_render_in_light_and_dark_and_on_a_narrow_screen(browser, other):
    page, _ = other
    for width, scheme in ((1000, "light"), (1000, "dark"), (320, "light")):
        look_alone(browser, page, width=width, scheme=scheme)
        open_details(browser)
        assert width_of(browser) <= width
        heights = browser.execute_script(
            "return [...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().height)"
        )
        assert len(heights) >= 3
        assert min(heights) > 50
        legible(browser)


def test_the_numbers_of_other_pages_are_those_of_their_reports(browser, other):
    page, report = other
    look(browser, page.parent, name=page.name)
    for path, _, text in numbers_of(browser, report):
        seen = float(text.replace(",", "").replace("\N{MINUS SIGN}", "-"))
        assert seen == pytest.approx(value_at(report, path), rel=0.006, abs=0.00501)
    if "verdict" in report:
        headline = browser.execute_script("return document.querySelector('.headline').innerText")
        said = headline.replace("\N{MINUS SIGN}", "-").replace("\N{NO-BREAK SPACE}", " ")
        assert said == report["verdict"][0]


@pytest.fixture(scope="module")
def predicted(finished, tmp_path_factory):
    """A page of predictions: small pictures, large ones, one with a long name, and a file that is none."""
    folder = tmp_path_factory.mktemp("predicted")
    write_image_folder(folder / "photos", {"new": 9})
    (folder / "photos" / ("a_long_name_" * 12 + ".png")).write_bytes(image_bytes(5, (640, 300)))
    (folder / "photos" / "none.jpg").write_bytes(b"none")
    arguments = ("--html", folder / "predictions.html", "--output", folder / "p.csv", "--on-bad-image", "skip")
    done = samtune("predict", finished, folder / "photos", *arguments)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_page_of_predictions_shows_every_picture_on_any_screen(browser, predicted):
    for width, scheme in ((1200, "light"), (1200, "dark"), (400, "light"), (400, "dark")):
        look_alone(browser, predicted / "predictions.html", width=width, scheme=scheme)
        assert width_of(browser) <= width
        legible(browser)
    shown = browser.execute_script("return [...document.querySelectorAll('img')].map(e => [e.naturalWidth, e.alt])")
    assert len(shown) == 19
    assert all(natural > 0 and alt for natural, alt in shown)
    first = browser.execute_script(
        "return [...document.querySelectorAll('.pictures figcaption')].map(e => e.innerText)"
    )
    certain = [float(text.splitlines()[0].split()[-1]) for text in first]
    assert certain == sorted(certain)
    assert "none.jpg" in browser.execute_script("return document.querySelector('#bad').parentElement.innerText")


@pytest.fixture(scope="module")
def sharpness(tmp_path_factory):
    """The page of three models with every chart that there is, but for planes, which replace lines."""
    numbers = {
        "eigenvalues": [9.0, 4.0],
        "residuals": [1e-3, 2e-4],
        "converged": True,
        "products": 9,
        "parameters": 50,
        "ratio_1_to_5": None,
    }
    moments = {key: {"mean": 0.1, "standard_error": None} for key in ("moment_1", "moment_2")}
    density = {"parameters": 50, "nodes": [[-1, 0, 9], [-1, 0.1, 9]], "weights": [[0.1, 0.8, 0.1]] * 2, **moments}
    entry = {"groups": 4, "loss": 0.5, "one_step": 0.1, "maximum": 0.2, "not_converged": 0.25}
    checkpoints = [
        {
            "run": f"a run with a long name, and its seed {i}",
            "label": f"a run with a long name, and its seed {i}, step {step}",
            "step": step,
            "dataset": "pets",
            "images": 64,
            "pixels_sha256": f"{i}",
            "loss": 0.5,
            "top1_error": 12.5,
            "m_sharpness": [{"m": m, **entry, "maximum": 0.1 * (1 + i) / m} for m in (1, 16)],
            "hessian": numbers,
            "density": density,
            "slices": {"at": [-1, 0, 1], "loss": [2.0, 0.5, 1.0 + i], "top1_error": [50, 12.5, 30]},
        }
        for i in range(4)
        for step in (4, 8)
    ]
    result = {
        "split": "train",
        "interrupted": True,
        "measures": asdict(Measures(m=(1, 16), top=2, probes=1, slices=1)),
        "checkpoints": checkpoints,
        "line": {"from": "a", "to": "b", "at": [0, 0.5, 1], "loss": [1, 2, 1], "top1_error": [1, 2, 1]},
        "gaps": [{"checkpoint": 2 * i + 1, "gap": 3.0 + i} for i in range(4)],
        "correlation": [{"m": m, "runs": 4, "tau": 0.5, "p_value": 0.2, "ci95": (-0.2, 0.9)} for m in (1, 16)],
    }
    folder = tmp_path_factory.mktemp("sharpness")
    write_sharpness(folder, result)
    planes = [one | {"slices": {"at": [-1, 0, 1], "loss": [[2, 1, 2], [1, 0.1, 1], [2, 1, 2]]}} for one in checkpoints]
    (folder / "planes").mkdir()
    write_sharpness(folder / "planes", {**result, "checkpoints": planes[1::4], "gaps": []})
    return folder


@pytest.mark.parametrize(("name", "charts"), [("sharpness.html", 7), ("planes/sharpness.html", 5)])
def test_the_page_of_sharpness_draws_each_measure_on_any_screen(browser, sharpness, name, charts):
    for width, scheme in ((1000, "light"), (1000, "dark"), (320, "light")):
        look_alone(browser, sharpness / name, width=width, scheme=scheme)
        open_details(browser)
        assert width_of(browser) <= width
        legible(browser)
    heights = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().height)"
    )
    assert len(heights) == charts
    assert min(heights) > 50
    text = browser.execute_script("return document.body.textContent")
    assert "mathdefault" not in text  # TeX is for other readers
    assert browser.execute_script("return document.querySelectorAll('figure details table').length") == charts
