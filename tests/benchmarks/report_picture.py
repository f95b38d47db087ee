"""The picture of a report page in the README: `python -m tests.benchmarks.report_picture RUN recipes/report.png`.

Needs Debian's packages chromium and chromium-driver. The first screen of the page, in light colours, is stored with 64
colours, which keeps the file small.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver

WIDTH, HEIGHT = 1100, 1500  # pixels of the window
COLOURS = 64


def take_picture(page: Path) -> Image.Image:
    """The first screen of a page."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
            options.add_argument(argument)
        options.add_argument(f"--user-data-dir={profile}")
        options.add_argument(f"--window-size={WIDTH},{HEIGHT}")
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            browser.get(page.resolve().as_uri())
            return Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        finally:
            browser.quit()


if __name__ == "__main__":
    run, picture = map(Path, sys.argv[1:])
    take_picture(run / "report.html").quantize(COLOURS).save(picture, optimize=True)
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")
