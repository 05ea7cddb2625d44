"""The page's figures as files of their own, for documents and slides.

Each file holds the page's drawing with its style inside. PNG files are rendered from it where
resvg is installed (`pip install perta[png]`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from perta.report._svg import Figure, drawing

_NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'
_WANTED = re.compile(r"\.(figure|shape|step|s\d|r-|hue-)")
_FONTS = (
    '"Segoe UI", "Helvetica Neue", Arial, "Liberation Sans", "DejaVu Sans", "Noto Sans", sans-serif'
)
_ZOOM = 2


def write_figures(figures: Iterable[Figure], css: str, folder: Path) -> None:
    """Write figures as SVG, and as PNG where that can be rendered."""
    style = inline_style(css)
    for figure in figures:
        text = document(figure, style)
        (folder / f"{figure.name}.svg").write_text(text, "utf-8")
        image = _png(text)
        if image is not None:
            (folder / f"{figure.name}.png").write_bytes(image)


def document(figure: Figure, style: str) -> str:
    """A figure as a whole SVG file on white ground."""
    opening, _, rest = drawing(figure).partition(">")
    opening = opening.replace("<svg", f"<svg {_NAMESPACE}", 1)
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return f"{opening}><style>{style}</style>{ground}{rest}\n"


def inline_style(css: str) -> str:
    """The rules that figures need, in the light palette.

    Programs other than browsers know no custom properties, so their values are filled in; that
    of a mark's own colour (`--c`) becomes the current colour.
    """
    palette = dict(re.findall(r"--([\w-]+): ([^;]+);", css[: css.index("}")]))
    palette |= {"paper": "#ffffff", "sans": _FONTS}
    part = css[css.index("/* Figures */") : css.index("/* Answers */")]
    rules = [
        f"{selector.strip()} {{{body}}}"
        for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", part)
        if _WANTED.match(selector.strip())
    ]
    text = "\n".join(rules).replace("--c:", "color:").replace("var(--c)", "currentColor")
    return re.sub(r"var\(--([\w-]+)\)", lambda match: " ".join(palette[match[1]].split()), text)


def _png(text: str) -> bytes | None:
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        return None
    return bytes(svg_to_bytes(svg_string=text, zoom=_ZOOM))
