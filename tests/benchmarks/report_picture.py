"""Pictures of report pages for the README and the recipes' page.

    python -m tests.benchmarks.report_picture RUN/report.html recipes/report.png
    python -m tests.benchmarks.report_picture FOLDER/sharpness.html recipes/slices.png slices

Needs Debian's packages chromium and chromium-driver. The picture is the first screen of the page, or the chart of the
section that is named, in light colours. It is stored with 64 colours, which keeps the file small.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver

WIDTH, HEIGHT = 1100, 1500  # pixels of the window
COLOURS = 64


def take_picture(page: Path, section: str | None) -> Image.Image:
    """The first screen of a page, or the chart of a section by the section's id."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
            options.add_argument(argument)
        options.add_argument(f"--user-data-dir={profile}")
        # A picture of a chart ends where the window ends.
        options.add_argument(f"--window-size={WIDTH},{HEIGHT if section is None else 4 * HEIGHT}")
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            browser.get(page.resolve().as_uri())
            seen = browser if section is None else browser.find_element("css selector", f"#{section} ~ figure svg")
            png = seen.get_screenshot_as_png() if section is None else seen.screenshot_as_png
            return Image.open(io.BytesIO(png)).convert("RGB")
        finally:
            browser.quit()


if __name__ == "__main__":
    page, picture = map(Path, sys.argv[1:3])
    take_picture(page, *sys.argv[3:] or [None]).quantize(COLOURS).save(picture, optimize=True)
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")
