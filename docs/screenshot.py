"""Pictures of a report and of an audit's page for the README.

    perta demo --output perta-demo
    perta report perta-demo --output report.html
    python docs/screenshot.py report.html docs/images/report.png 1180 1220
    perta audit CLEAN … --output AUDIT
    python docs/screenshot.py AUDIT/audit.html docs/images/audit.png 880 1000

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

SCALE = 1.5
COLOURS = 64
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def main(page: Path, picture: Path, width: int, height: int) -> None:
    """Photograph the top of a page."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as api:
        browser = api.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        view = browser.new_page(
            viewport={"width": width, "height": height}, device_scale_factor=SCALE
        )
        view.goto(page.resolve().as_uri())
        raw = Path(folder) / "raw.png"
        view.screenshot(path=raw)
        browser.close()
        picture.parent.mkdir(parents=True, exist_ok=True)
        # A page of text needs few colours, and the repository keeps every version; an octree keeps
        # rare ones, such as that of a single word.
        few = Image.open(raw).convert("RGB").quantize(COLOURS, Image.Quantize.FASTOCTREE)
        few.save(picture, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
