"""The report is one file that needs nothing else, shows what it was given and runs nothing it was given."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from data.files import UserError
from distill import report

HOSTILE = "<script>alert(1)</script> \" onload='x' & <b>"
VOID = {"meta", "img", "br", "link"}


class Reader(HTMLParser):
    """Every element with its attributes; checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(document: str) -> Reader:
    reader = Reader()
    reader.feed(document)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def glb(tmp_path: Path) -> Path:
    mesh = trimesh.creation.box()
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=np.full((len(mesh.vertices), 4), 200, np.uint8))
    mesh.export(tmp_path / "box.glb")
    return tmp_path / "box.glb"


def rewritten(glb: Path, path: Path, change: Any) -> Path:
    """The GLB with its JSON changed by `change(gltf)`."""
    content = glb.read_bytes()
    (size,) = struct.unpack_from("<I", content, 12)
    gltf, rest = json.loads(content[20 : 20 + size]), content[20 + size :]
    change(gltf)
    text = json.dumps(gltf).encode()
    text += b" " * (-len(text) % 4)
    header = struct.pack("<4sII", b"glTF", 2, 20 + len(text) + len(rest))
    path.write_bytes(header + struct.pack("<I4s", len(text), b"JSON") + text + rest)
    return path


def everything(glb: Path, tmp_path: Path, text: str) -> str:
    """A page with one of each piece, every text of which is `text`."""
    video = tmp_path / "v.mp4"
    video.write_bytes(b"\0\0\0\x18ftypisom" + bytes(12))
    pixels = np.zeros((8, 8, 3), np.uint8)
    pieces = [
        report.paragraphs(text),
        report.gallery([report.picture(pixels, text, text), report.video(video, text), report.glb_viewer(glb, text)]),
        report.line_chart({text: [(0, 1), (1, float("nan")), (2, 3)]}, text, text, text),
        report.table([text, "n"], [[text, 1.5], [text, None]], text, highlight=1),
        report.matrix([text, "b"], [[1, 2], [3, 4]], text),
        report.verdict(False, text) + report.code(text),
    ]
    return report.page(text, text, [(text, piece) for piece in pieces])


def test_hostile_text_stays_text(glb: Path, tmp_path: Path) -> None:
    plain, hostile = (read(everything(glb, tmp_path, text)) for text in ("plain", HOSTILE))
    assert [name for name, _ in hostile.elements] == [name for name, _ in plain.elements]
    for (_, one), (_, other) in zip(plain.elements, hostile.elements, strict=True):
        assert one.keys() == other.keys()
    assert HOSTILE in hostile.text


def test_nothing_outside_is_named_and_only_our_script_may_run(glb: Path, tmp_path: Path) -> None:
    document = everything(glb, tmp_path, "plain")
    without_data = re.sub(r"[A-Za-z0-9+/=]{200,}", "", document)
    assert not re.search(r"https?://|//cdn|@import|url\(", without_data)
    reader = read(document)
    for _, attributes in reader.elements:
        for name in ("src", "href", "srcset", "poster", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    policy = next(a["content"] for a in reader.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    scripts = re.findall(r"<script>(.*?)</script>", document, flags=re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert policy and "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    targets = {a["href"] for a in reader.all("a")}
    assert targets == {f"#{a['id']}" for a in reader.all("section")}


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_viewer_is_valid_javascript() -> None:
    viewer = Path(report.__file__).with_name("report_viewer.js")
    done = subprocess.run(["node", "--check", str(viewer)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_glb_is_embedded_whole(glb: Path) -> None:
    document = report.glb_viewer(glb, "a box", vertex_colours="srgb")
    match = re.search(r'<script type="model/gltf-binary">([^<]*)</script>', document)
    assert match and base64.b64decode(match[1]) == glb.read_bytes()
    assert "12 triangles, 8 vertices" in document and 'data-vertex-colours="srgb"' in document
    assert 'data-save="box.glb"' in document


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: g.update(extensionsRequired=["KHR_draco_mesh_compression"]), "KHR_draco_mesh_compression"),
        (lambda g: g["buffers"][0].update(uri="box.bin"), "outside itself"),
        (lambda g: g.update(images=[{"uri": "https://example.org/a.png"}]), "outside itself"),
        (lambda g: g["bufferViews"][0].update(byteLength=10**9), "fewer bytes"),
        (lambda g: g.update(meshes=[]), "no vertices"),
        (lambda g: g.pop("meshes"), "not valid glTF"),
        (lambda g: g["meshes"][0]["primitives"][0]["attributes"].update(POSITION=99), "not valid glTF"),
        (lambda g: g.update(meshes="no"), "not valid glTF"),
    ],
)
def test_unshowable_glb_is_refused_with_its_reason(glb: Path, tmp_path: Path, change: Any, says: str) -> None:
    bad = rewritten(glb, tmp_path / "bad.glb", change)
    with pytest.raises(UserError, match=says) as caught:
        report.glb_viewer(bad, "")
    assert str(bad) in str(caught.value)


def test_every_truncation_of_a_glb_is_refused(glb: Path, tmp_path: Path) -> None:
    content, bad = glb.read_bytes(), tmp_path / "cut.glb"
    for length in range(0, len(content), 13):
        bad.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.glb"):
            report.glb_viewer(bad, "")


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    missing, text = tmp_path / "gone", tmp_path / "text.txt"
    text.write_text("not a picture")
    for path in (missing, text, tmp_path):
        for make in (
            lambda p: report.picture(p, "", ""),
            lambda p: report.video(p, ""),
            lambda p: report.glb_viewer(p, ""),
        ):
            with pytest.raises(UserError, match=re.escape(str(path))):
                make(path)


def embedded(document: str) -> tuple[str, bytes]:
    match = re.search(r'src="data:([^;]+);base64,([^"]*)"', document)
    assert match
    return match[1], base64.b64decode(match[2])


@pytest.mark.parametrize("channels", [3, 4])
def test_pictures_keep_every_pixel(tmp_path: Path, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, channels), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True, exact=True)
    Image.fromarray(pixels).save(tmp_path / "a.tiff")
    sources: list[tuple[np.ndarray | Path, str]] = [
        (pixels, "png"),
        (tmp_path / "a.webp", "webp"),
        (tmp_path / "a.tiff", "png"),
    ]
    for source, kind in sources:
        media, content = embedded(report.picture(source, "", ""))
        path = tmp_path / "back"
        path.write_bytes(content)
        with Image.open(path) as image:
            assert media == f"image/{kind}"
            assert np.array_equal(np.asarray(image)[..., :channels], pixels)


def test_only_small_pictures_grow() -> None:
    small = report.picture(np.zeros((32, 64, 3), np.uint8), "", "")
    assert 'width="256" height="128"' in small and "pixelated" in small
    large = report.picture(np.zeros((512, 400, 3), np.uint8), "", "")
    assert 'width="400" height="512"' in large and "pixelated" not in large
    assert 'width="16"' in report.picture(np.zeros((32, 32, 3), np.uint8), "", "", scale=0.5)


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_that_are_no_pictures_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        report.picture(array, "", "")


def test_thinning_keeps_ends_and_extremes() -> None:
    y = np.random.default_rng(0).normal(size=20_001)
    y[7000], y[13000], y[500:900] = 50, -50, np.nan
    keep = report.thinned(y)
    assert len(keep) <= report.CHART_POINTS and np.all(np.diff(keep) > 0)
    assert {0, 7000, 13000, 20_000} <= set(keep.tolist())
    assert np.isfinite(y[keep]).all()
    assert report.thinned(y[:300]).tolist() == list(range(300))
    assert report.thinned(np.full(9, np.nan)).size == 0


def test_running_mean_matches_its_definition() -> None:
    y = np.random.default_rng(0).normal(size=60)
    y[[5, 20, 21]], y[40:55] = np.nan, np.nan
    mean = report.smoothed(y, window=7)
    for i in range(60):
        near = y[max(0, i - 3) : i + 4]
        near = near[np.isfinite(near)]
        if np.isfinite(y[i]) or len(near) > 3:
            assert mean[i] == pytest.approx(near.mean())
        else:
            assert np.isnan(mean[i])
    assert np.isnan(mean[43:52]).all() and np.isfinite(mean[20])


def lines(chart: str, kind: str) -> list[str]:
    figure = chart.partition('<ul class="legend">')[0]
    return re.findall(rf'<path class="{kind} [^>]* d="([^"]*)"', figure)


def test_charts_break_at_gaps_and_count_them() -> None:
    points = [(float(i), float("nan") if i == 2 else 1.0 + i) for i in range(5)]
    chart = report.line_chart({"a": points}, "t", "x", "y")
    (path,) = lines(chart, "line")
    assert path.count("M") == 2 and path.count("L") == 2
    assert "a: 1 of 5 values are not finite" in chart
    logarithmic = report.line_chart({"a": [(0, 10.0), (1, 0.0), (2, 1000.0)]}, "t", "x", "y", log_y=True)
    assert "1 values at or below 0" in logarithmic and ">100<" in logarithmic


def test_long_series_are_drawn_faint_under_their_mean() -> None:
    rng = np.random.default_rng(0)
    chart = report.line_chart({"loss": [(i, float(v)) for i, v in enumerate(rng.random(100_000))]}, "t", "x", "y")
    (raw,), (mean,) = lines(chart, "raw"), lines(chart, "line")
    for path in (raw, mean):
        assert path.count("L") + path.count("M") <= report.CHART_POINTS
    heights = [[float(v) for v in re.findall(r"[ML][\d.]+ ([\d.]+)", path)] for path in (raw, mean)]
    assert np.ptp(heights[1]) < 0.5 * np.ptp(heights[0])
    assert len(chart) < 40_000


@pytest.mark.parametrize(
    "values",
    [[], [float("nan")], [5.0], [0.0, 0.0], [1e-300, 1e300], [-1e99, 1e99], [float("inf"), 1.0], [1e9, 1e9 + 1e-6]],
)
@pytest.mark.parametrize("log_y", [False, True])
def test_awkward_series_still_make_a_chart(values: list[float], log_y: bool) -> None:
    chart = report.line_chart({"a": list(enumerate(values))}, "t", "x", "y", log_y)
    read(chart)
    assert "nan" not in re.sub(r"<figcaption>.*", "", chart)


def test_ticks_are_round_and_inside() -> None:
    chart = report.line_chart({"a": [(0, 0.0), (20_000, 1.0)]}, "t", "x", "y")
    for label in (">0<", ">5k<", ">20k<", ">0.2<", ">1<"):
        assert label in chart


def test_tables_align_numbers_and_mark_rows() -> None:
    document = report.table(["name", "PSNR"], [["a", 24.12345], ["b", None], ["c", 123456.7]], "c", highlight=[2])
    assert '<td class="number">24.12</td>' in document and '<td class="number">–</td>' in document
    assert '<tr class="highlight"><td>c</td><td class="number">123457</td>' in document
    with pytest.raises(ValueError, match="2 headers"):
        report.table(["a", "b"], [[1]], "c")


def test_matrix_marks_the_best_of_each_row() -> None:
    nan, inf = float("nan"), float("inf")
    document = report.matrix(["a", "b", "c"], [[24, 12, 9], [inf, 5, nan], [nan, nan, nan]], "PSNR")
    assert re.findall(r"★ ([\d.∞]+)", document) == ["24.0", "∞"]
    assert document.count("–") == 4
    with pytest.raises(ValueError, match="square"):
        report.matrix(["a"], [[1, 2]], "")


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "report.html"
    report.write(path, report.page("first ✓", "", []))
    assert "first ✓" in path.read_text(encoding="utf-8")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(UserError, match=r"report\.html"):
        report.write(path, "second")
    assert "first ✓" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
