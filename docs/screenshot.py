"""Picture of a report for the README.

    perta demo --output perta-demo
    perta report perta-demo --output report.html
    python docs/screenshot.py report.html docs/images/report.png

Needs Chromium (Debian's package, or the path in CHROMIUM) and playwright.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT, SCALE = 1180, 1220, 1.5
COLOURS = 160
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def main(page: Path, picture: Path) -> None:
    """Photograph the top of a report."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as api:
        browser = api.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        view = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE
        )
        view.goto(page.resolve().as_uri())
        raw = Path(folder) / "raw.png"
        view.screenshot(path=raw)
        browser.close()
        picture.parent.mkdir(parents=True, exist_ok=True)
        # A page of text needs few colours, and the repository keeps every version.
        Image.open(raw).convert("RGB").quantize(COLOURS).save(picture, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
