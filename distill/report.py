"""One HTML file that shows a run: pictures, videos, turning meshes, charts and tables, all inside it.

Each function returns a piece of HTML whose every text is escaped; `page` joins the pieces and `write` puts the file
down whole.  The file opens from disk without a network, and its content security policy lets no script run but the mesh
viewer's, so that a caption found on the internet stays a caption.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
import struct
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from data.files import UserError, atomic_file

PathLike = str | os.PathLike[str]

SMALL_PIXELS = 160  # pictures smaller than this on both sides are enlarged, pixel by pixel
ENLARGED_PIXELS = 256
CHART_POINTS = 500  # at most this many points are drawn of a series
SMOOTHED_FROM_POINTS = 40  # shorter series are drawn as they are
HUGE = 1e100  # beyond it a value has diverged: a gap in the chart, like NaN
CHART_WIDTH, CHART_HEIGHT = 640, 320
CHART_LEFT, CHART_RIGHT, CHART_TOP, CHART_BOTTOM = 68, 14, 10, 46
SERIES_COLOURS = 7  # report.css names them s0..s6
GLB_EXTENSIONS = {"KHR_materials_unlit", "KHR_mesh_quantization"}  # those a file may require and the viewer draws
PICTURE_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}  # shown by every browser as they are
BEST = ' class="best">★ '
BUTTONS = [(" ", "Turn or stop", "⟳"), ("+", "Closer", "+"), ("-", "Farther", "−"), ("Home", "Front", "Front")]
SHADINGS = ["Lit", "Colours alone", "Shape", "Normals"]  # in the order of the viewer's uMode


# ---- the page ----


def page(title: str, intro: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole document: `title` and `intro` are text, blank lines part paragraphs; a section is (heading, HTML)."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    script = Path(__file__).with_name("report_viewer.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    links = "".join(f'<li><a href="#part-{i}">{_text(heading)}</a></li>' for i, (heading, _) in enumerate(sections, 1))
    bodies = "\n".join(
        f'<section id="part-{i}" aria-labelledby="name-{i}"><h2 id="name-{i}">{_text(heading)}</h2>\n{body}\n</section>'
        for i, (heading, body) in enumerate(sections, 1)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
{paragraphs(intro)}
</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{bodies}
</main>
<script>{script}</script>
</body>
</html>
"""


def write(path: PathLike, document: str) -> None:
    """Puts `document` at `path`, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(document, encoding="utf-8")


def paragraphs(text: str) -> str:
    return "\n".join(f"<p>{_text(part)}</p>" for part in re.split(r"\n\s*\n", text.strip()) if part)


def gallery(figures: Iterable[str]) -> str:
    """Pieces side by side, as many in a row as fit."""
    return f'<div class="gallery">{"".join(figures)}</div>'


def verdict(ok: bool, text: str) -> str:
    kind, word = ("pass", "✓ Pass") if ok else ("fail", "✗ Fail")
    return f'<div class="verdict {kind}"><strong>{word}</strong><span>{_text(text)}</span></div>'


def code(text: str) -> str:
    return f'<pre tabindex="0"><code>{_text(text)}</code></pre>'


def _text(value: object) -> str:
    """Escaped for element content and for quoted attributes; characters no file should hold become U+FFFD."""
    clean = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "�", str(value))
    return escape(clean, quote=True)


# ---- pictures, videos, meshes ----


def picture(source: np.ndarray | PathLike, caption: str, alt: str, scale: float | None = None) -> str:
    """An (H, W, 3 or 4) uint8 array or a picture's path; `scale` is CSS pixels a pixel; small ones grow."""
    content, kind, (width, height) = _encoded(source) if isinstance(source, np.ndarray) else _picture_file(Path(source))
    longest = max(width, height)
    if scale is None:
        scale = max(1, ENLARGED_PIXELS // longest) if longest < SMALL_PIXELS else 1
    pixelated = ' class="pixelated"' if scale > 1 else ""
    size = f'width="{round(width * scale)}" height="{round(height * scale)}"'
    return (
        f'<figure class="picture"><img{pixelated} src="{_data_url(kind, content)}" alt="{_text(alt)}" {size}>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def video(path: PathLike, caption: str) -> str:
    """An MP4 or WebM, playing, looping and silent."""
    content = _file_bytes(Path(path), "the video")
    if content[4:8] == b"ftyp":
        kind = "video/mp4"
    elif content[:4] == b"\x1aE\xdf\xa3":
        kind = "video/webm"
    else:
        raise UserError(f"the video: {path} is neither MP4 nor WebM; encode it as H.264 in MP4")
    return (
        f'<figure><video controls autoplay loop muted playsinline src="{_data_url(kind, content)}"></video>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def glb_viewer(path: PathLike, caption: str, vertex_colours: Literal["linear", "srgb"] = "linear") -> str:
    """A mesh to turn and zoom.  COLOR_0 is linear by the glTF standard; say "srgb" for files that hold sRGB there."""
    path = Path(path)
    content = _file_bytes(path, "the mesh")
    gltf = _checked_glb(content, path)
    vertices, triangles = _mesh_size(gltf)
    size = f"{triangles:,} triangles, {vertices:,} vertices, {len(content) / 1e3:,.0f} kB"
    buttons = "".join(
        f'<button type="button" data-key="{key}" aria-label="{label}">{sign}</button>' for key, label, sign in BUTTONS
    )
    modes = "".join(f'<option value="{i}">{m}</option>' for i, m in enumerate(SHADINGS))
    keys = "drag or arrow keys turn it, wheel (once clicked) or + and - zoom, space starts and stops"
    return f"""<figure class="glb" data-vertex-colours="{vertex_colours}">
<div class="glb-stage">
<canvas tabindex="0" role="application" aria-label="{_text(caption)}: {keys}" title="{keys}"></canvas>
<p class="glb-message" role="status">Loading the mesh. It needs JavaScript and WebGL 2.</p></div>
<div class="glb-controls">{buttons}<select aria-label="Shading">{modes}</select>\
<button type="button" data-save="{_text(path.name)}">Save GLB</button></div>
<script type="model/gltf-binary">{base64.b64encode(content).decode()}</script>
<figcaption>{_text(caption)} ({size})</figcaption></figure>"""


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _file_bytes(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read: {error.strerror or error}") from None


def _encoded(array: np.ndarray) -> tuple[bytes, str, tuple[int, int]]:
    """(PNG, media type, (width, height)) of an (H, W, 3 or 4) uint8 array."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (3, 4) or array.size == 0:
        raise ValueError(f"a picture is (H, W, 3 or 4) uint8, not {array.shape} {array.dtype}")
    return _png(Image.fromarray(np.ascontiguousarray(array)))


def _png(image: Image.Image) -> tuple[bytes, str, tuple[int, int]]:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue(), PICTURE_TYPES["PNG"], image.size


def _picture_file(path: Path) -> tuple[bytes, str, tuple[int, int]]:
    """The file's own bytes where browsers show its format, else a PNG of it; every pixel is decoded once to be sure."""
    content = _file_bytes(path, "the picture")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if image.format in PICTURE_TYPES:
                return content, PICTURE_TYPES[image.format], image.size
            return _png(image.convert("RGBA"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"the picture: {path} cannot be decoded: {error}; give a PNG, JPEG or WebP") from None


def _checked_glb(content: bytes, path: Path) -> dict[str, Any]:
    """The glTF JSON of a GLB the viewer can draw; UserError with the first reason why not."""

    def refuse(reason: str) -> UserError:
        return UserError(f"the mesh: {path} {reason}")

    magic, version, length = struct.unpack_from("<4sII", content) if len(content) >= 12 else (b"", 0, 0)
    if magic != b"glTF" or version != 2:
        raise refuse("is not binary glTF 2.0; export it as .glb")
    chunks: dict[bytes, bytes] = {}
    offset = 12
    while offset + 8 <= min(length, len(content)):
        size, kind = struct.unpack_from("<I4s", content, offset)
        chunks.setdefault(kind, content[offset + 8 : offset + 8 + size])
        offset += 8 + size
    if length > len(content) or offset > len(content):
        raise refuse("is cut short; make it anew")
    try:
        gltf = json.loads(chunks[b"JSON"])
        extensions = set(gltf.get("extensionsRequired", [])) - GLB_EXTENSIONS
        if extensions:
            raise refuse(f"needs {', '.join(sorted(extensions))}, which the report's viewer has not; export it without")
        if any("uri" in b for b in gltf["buffers"]) or any(
            not i.get("uri", "data:").startswith("data:") for i in gltf.get("images", [])
        ):
            raise refuse("refers to files outside itself; export it as one .glb")
        if any(v.get("byteOffset", 0) + v["byteLength"] > len(chunks.get(b"BIN\0", b"")) for v in gltf["bufferViews"]):
            raise refuse("holds fewer bytes than it declares; make it anew")
        if _mesh_size(gltf)[0] == 0:
            raise refuse("has no vertices; there is no mesh to show")
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise refuse(f"is not valid glTF: {type(error).__name__}: {error}") from None
    return gltf


def _mesh_size(gltf: dict[str, Any]) -> tuple[int, int]:
    """(vertices, triangles) over all primitives that are triangles."""
    vertices = triangles = 0
    for primitive in (p for mesh in gltf["meshes"] for p in mesh["primitives"]):
        mode = primitive.get("mode", 4)
        if mode in (4, 5, 6):
            count = gltf["accessors"][primitive["attributes"]["POSITION"]]["count"]
            corners = gltf["accessors"][primitive["indices"]]["count"] if "indices" in primitive else count
            vertices += count
            triangles += corners // 3 if mode == 4 else max(0, corners - 2)
    return vertices, triangles


# ---- tables ----


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    caption: str,
    highlight: int | Collection[int] | None = None,
) -> str:
    """Rows of text and numbers, which stand to the right; `highlight` is the index, or the indices, of rows to mark."""
    bad = next((row for row in rows if len(row) != len(headers)), None)
    if bad is not None:
        raise ValueError(f"a row of {len(bad)} cells under {len(headers)} headers: {bad}")
    marked = {highlight} if isinstance(highlight, int) else set(highlight or ())
    numeric = [bool(rows) and all(_is_number(row[i]) or row[i] is None for row in rows) for i in range(len(headers))]
    head = "".join(f'<th scope="col"{_right(numeric[i])}>{_text(header)}</th>' for i, header in enumerate(headers))
    body = "".join(_row(row, numeric, i in marked) for i, row in enumerate(rows))
    return (
        f'<div class="scroll"><table><caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def matrix(labels: Sequence[str], values: np.ndarray | Sequence[Sequence[float]], caption: str) -> str:
    """A square table, row against column, darker where higher, the greatest of each row framed and starred."""
    square = np.asarray(values, dtype=float)
    if square.shape != (len(labels), len(labels)):
        raise ValueError(f"{len(labels)} labels need a square of values, not {square.shape}")
    finite = square[np.isfinite(square)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    heat = np.clip((square - low) / (high - low) if high > low else np.full_like(square, 0.5), 0, 1)
    heat = np.where(np.isnan(square), 0, np.where(np.isposinf(square), 1, heat))
    head = "".join(f'<th scope="col">{_text(label)}</th>' for label in labels)
    lines = []
    for label, row, row_heat in zip(labels, square, heat, strict=True):
        best = np.nanmax(row) if np.any(~np.isnan(row)) else None
        cells = "".join(
            f'<td style="--heat:{warmth:.2f}"{BEST if value == best else ">"}{_heat_text(value)}</td>'
            for value, warmth in zip(row, row_heat, strict=True)
        )
        lines.append(f'<tr><th scope="row">{_text(label)}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="matrix"><caption>{_text(caption)} ★ marks the best of each row.</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _row(cells: Sequence[object], numeric: Sequence[bool], highlighted: bool) -> str:
    inside = "".join(
        f"<td{_right(column or _is_number(cell))}>{_text(_cell_text(cell))}</td>"
        for cell, column in zip(cells, numeric, strict=True)
    )
    return f'<tr class="highlight">{inside}</tr>' if highlighted else f"<tr>{inside}</tr>"


def _heat_text(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}".replace("inf", "∞")


def _right(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _cell_text(value: object) -> str:
    """Whole numbers as they are, others to four significant figures and never in the form 1.235e+04 below a million."""
    if value is None:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return f"{number:.0f}" if 1e3 <= abs(number) < 1e6 else f"{number:.4g}"
    return str(value)


# ---- charts ----


def line_chart(
    series: dict[str, list[tuple[float, float]]], title: str, x_label: str, y_label: str, log_y: bool = False
) -> str:
    """Lines over x: the raw values faint, a running mean on top where there are many.

    Values that are not finite, or not positive on a logarithmic axis, leave gaps, and the caption counts them.
    """
    curves, notes = {}, []
    for name, points in series.items():
        x, y = np.array(sorted(points, key=lambda p: p[0]), dtype=float).reshape(-1, 2).T
        y = np.where(np.isfinite(x) & np.isfinite(y) & (np.abs(y) < HUGE), y, np.nan)
        hidden = int((y <= 0).sum()) if log_y else 0
        if missing := int(np.isnan(y).sum()):
            notes.append(f"{name}: {missing} of {len(y)} values are not finite.")
        if hidden:
            notes.append(f"{name}: {hidden} values at or below 0 have no place on a logarithmic axis.")
        curves[name] = (x, np.log10(np.where(y > 0, y, np.nan)) if log_y else y)
    legend = "".join(_legend_item(i, name, curves[name][1], log_y) for i, name in enumerate(curves))
    svg = _chart_svg(curves, title, x_label, y_label, log_y)
    return (
        f'<figure class="chart"><p class="chart-title">{_text(title)}</p>{svg}'
        f'<ul class="legend">{legend}</ul><figcaption>{_text(" ".join(notes))}</figcaption></figure>'
    )


def thinned(y: np.ndarray, limit: int = CHART_POINTS) -> np.ndarray:
    """Rising indices of at most `limit` finite values: both ends, and the least and the greatest of every stretch."""
    finite = np.flatnonzero(np.isfinite(y))
    if len(finite) <= limit:
        return finite
    keep = {int(finite[0]), int(finite[-1])}
    for stretch in np.array_split(finite, (limit - 2) // 2):
        keep |= {int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])}
    return np.array(sorted(keep))


def smoothed(y: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values within `window` (odd) about each value; NaN where most of the window is missing."""
    finite = np.isfinite(y)
    ones = np.ones(window)
    half = window // 2
    total = np.convolve(np.where(finite, y, 0.0), ones)[half : half + len(y)]
    count = np.convolve(finite.astype(float), ones)[half : half + len(y)]
    return np.where(finite | (count > half), total / np.maximum(count, 1), np.nan)


def _chart_svg(
    curves: dict[str, tuple[np.ndarray, np.ndarray]], title: str, x_label: str, y_label: str, log_y: bool
) -> str:
    finite = [np.isfinite(y) for _, y in curves.values()]
    shown = [(x[ok], y[ok]) for (x, y), ok in zip(curves.values(), finite, strict=True)]
    x_low, x_high = _extent([x for x, _ in shown], margin=0)
    y_low, y_high = _extent([y for _, y in shown], margin=0.04)
    right, bottom = CHART_WIDTH - CHART_RIGHT, CHART_HEIGHT - CHART_BOTTOM

    def place(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        across = CHART_LEFT + (x - x_low) / (x_high - x_low) * (right - CHART_LEFT)
        return across, bottom - (y - y_low) / (y_high - y_low) * (bottom - CHART_TOP)

    pieces = []
    for value, label in _ticks(y_low, y_high, log_y):
        y_px = place(np.array(x_low), np.array(value))[1]
        pieces.append(f'<path class="grid" d="M{CHART_LEFT} {y_px:.1f}H{right}"/>')
        pieces.append(f'<text x="{CHART_LEFT - 7}" y="{y_px + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in _ticks(x_low, x_high, False):
        x_px = place(np.array(value), np.array(y_low))[0]
        pieces.append(f'<path class="frame" d="M{x_px:.1f} {bottom}v5"/>')
        pieces.append(f'<text x="{x_px:.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    pieces.append(f'<path class="frame" d="M{CHART_LEFT} {CHART_TOP}V{bottom}H{right}"/>')
    for i, (x, y) in enumerate(curves.values()):
        pieces.append(_curve(i, x, y, place))
    middle_x, middle_y = (CHART_LEFT + right) / 2, (CHART_TOP + bottom) / 2
    pieces.append(f'<text x="{middle_x}" y="{CHART_HEIGHT - 8}" text-anchor="middle">{_text(x_label)}</text>')
    upwards = f'transform="translate(14 {middle_y}) rotate(-90)"'
    pieces.append(f'<text {upwards} text-anchor="middle">{_text(y_label)}</text>')
    if not any(ok.any() for ok in finite):
        pieces.append(f'<text x="{middle_x}" y="{middle_y}" text-anchor="middle">no finite values</text>')
    label = _text(f"{title}: {y_label} against {x_label} of {', '.join(curves) or 'nothing'}")
    return f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{label}">{"".join(pieces)}</svg>'


def _extent(arrays: list[np.ndarray], margin: float) -> tuple[float, float]:
    """Least and greatest of all, apart even when equal, with `margin` of their distance added on either side."""
    values = np.concatenate([*arrays, np.array([])])
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        spare = abs(low) * 0.1 or 0.5
        low, high = low - spare, high + spare
    spare = (high - low) * margin
    return low - spare, high + spare


def _ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    """(place on the axis, label) of about five round values; on a logarithmic axis places are powers of ten."""
    if not log or high - low < 0.5:
        bounds = (10**low, 10**high) if log else (low, high)
        return [(math.log10(v) if log else v, _tick_label(v)) for v in _round_values(*bounds)]
    step = max(1, math.ceil((high - low) / 6))
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    decades = [e for e in range(math.floor(low), math.ceil(high) + 1) if e % step == 0]
    places = [(e + math.log10(f), f * 10.0**e) for e in decades for f in factors]
    return [(place, _tick_label(value)) for place, value in places if low <= place <= high]


def _round_values(low: float, high: float, about: int = 5) -> list[float]:
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(f for f in (1, 2, 5, 10) if f * power >= rough * 0.7)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick_label(value: float) -> str:
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e9:
            return f"{value / size:.6g}{suffix}"
    return f"{value:.6g}"


def _curve(index: int, x: np.ndarray, y: np.ndarray, place: Any) -> str:
    """The SVG paths of one series: itself, faint under its running mean where it is long."""
    colour = f"s{index % SERIES_COLOURS}"
    dash = _dash(index)
    points = int(np.isfinite(y).sum())
    if points < SMOOTHED_FROM_POINTS:
        return f'<path class="line {colour}"{dash} d="{_path(x, y, place)}"/>'
    mean = smoothed(y, window=2 * min(100, max(2, points // 50)) + 1)
    return (
        f'<path class="raw {colour}" d="{_path(x, y, place)}"/>'
        f'<path class="line {colour}"{dash} d="{_path(x, mean, place)}"/>'
    )


def _path(x: np.ndarray, y: np.ndarray, place: Any) -> str:
    """SVG path data through the thinned points, broken wherever values between two of them are missing."""
    keep = thinned(y)
    across, down = place(x[keep], y[keep])
    missing = np.cumsum(~np.isfinite(y))[keep]
    steps = []
    for i in range(len(keep)):
        joined = i > 0 and missing[i] == missing[i - 1]
        steps.append(f"{'L' if joined else 'M'}{across[i]:.1f} {down[i]:.1f}{'' if joined else 'h0'}")
    return "".join(steps)


def _dash(index: int) -> str:
    patterns = ("", ' stroke-dasharray="7 4"', ' stroke-dasharray="2 4"')
    return patterns[index // SERIES_COLOURS % len(patterns)]


def _legend_item(index: int, name: str, y: np.ndarray, log_y: bool) -> str:
    """The series' line, its name and its last finite value."""
    finite = np.flatnonzero(np.isfinite(y))
    last = ""
    if finite.size:
        value = float(y[finite[-1]])
        last = f" (last {_cell_text(10**value if log_y else value)})"
    line = f'<path class="line s{index % SERIES_COLOURS}"{_dash(index)} d="M1 5H25"/>'
    return f'<li><svg viewBox="0 0 26 10" aria-hidden="true">{line}</svg>{_text(name + last)}</li>'
