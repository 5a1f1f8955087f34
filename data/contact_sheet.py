"""`contact_sheet.html` of a views folder: thumbnails of the objects, and why others are not there."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from data.files import UserError, atomic_file, read_json
from data.render_ledger import Verdict, printable

STRIP = "contact.webp"
SIDE = 96  # pixels of a thumbnail
MOST_OBJECTS, MOST_ROWS = 2000, 2000  # a browser stays quick with so many; the ledger has all
STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
figure { display: inline-block; margin: 0 12px 12px 0; vertical-align: top; width: 480px }
figure img { background: #eee; display: block } figcaption { overflow-wrap: anywhere }
small { color: #666 } td, th { text-align: left; padding: 2px 12px 2px 0; vertical-align: top; overflow-wrap: anywhere }
"""


def draw_strip(folder: Path, views: list[dict[str, Any]]) -> None:
    """Writes `contact.webp`: four views of the first ring, 90 degrees apart, and the first reference, side by side."""
    ring = [view for view in views if view["role"] == "ring" and view["ring"] == 0]
    chosen = [*ring[:: len(ring) // 4][:4], next(view for view in views if view["role"] == "reference")]
    strip = Image.new("RGBA", (SIDE * len(chosen), SIDE))
    for index, view in enumerate(chosen):
        with Image.open(folder / view["file"]) as picture:
            strip.paste(picture.convert("RGBa").resize((SIDE, SIDE)).convert("RGBA"), (SIDE * index, 0))
    strip.save(folder / STRIP, quality=75)


def write_contact_sheet(out: Path, present: Collection[str], verdicts: dict[str, Verdict]) -> Path:
    """Writes and returns `out/contact_sheet.html`: objects that are `present` or that the ledgers call rendered.

    Of many objects, MOST_OBJECTS evenly chosen ones; pictures are loaded as they come into sight.
    """
    uids = sorted(set(present) | {uid for uid, verdict in verdicts.items() if verdict.status == "rendered"})
    step = -(-len(uids) // MOST_OBJECTS) or 1
    shown = [figure for figure in (draw_object(out, uid) for uid in uids[::step]) if figure]
    left_out = sorted((v for v in verdicts.values() if v.status != "rendered" and v.uid not in present), key=order)
    counts = Counter(verdict.status for verdict in left_out)
    title = f"{len(uids)} objects rendered" + "".join(f", {count} {status}" for status, count in counts.items())
    path = out / "contact_sheet.html"
    with atomic_file(path) as temporary:
        temporary.write_text(
            f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>\n<h1>{title}</h1>\n"
            f"<p>{len(shown)} of {len(uids)} objects are shown: four views of a ring and a reference each.</p>\n"
            + "\n".join(shown)
            + (draw_table(left_out) if left_out else ""),
            encoding="utf-8",
        )
    return path


def order(verdict: Verdict) -> tuple[str, str]:
    return verdict.status, verdict.uid


def escape(value: object) -> str:
    return html.escape(printable(str(value)))


def draw_object(out: Path, uid: str) -> str:
    """Nothing for an object whose folder has gone since."""
    try:
        meta = read_json(out / uid / "meta.json", "views")
    except UserError:
        return ""
    known = ((key, meta.get(key)) for key in ("category", "license", "creator", "faces"))
    facts = ", ".join(f"{key} {escape(value)}" for key, value in known if value)
    link = escape(quote(f"{uid}/{STRIP}"))
    return (
        f'<figure><img loading=lazy width={5 * SIDE} height={SIDE} src="{link}" alt="">'
        f"<figcaption>{escape(uid)}: {escape(meta.get('caption', ''))}<br><small>{facts}</small></figcaption></figure>"
    )


def draw_table(left_out: list[Verdict]) -> str:
    rows = "\n".join(
        f"<tr><td>{escape(v.status)}<td>{escape(v.uid)}<td>{escape(v.reason)}" for v in left_out[:MOST_ROWS]
    )
    more = f"<p>{len(left_out) - MOST_ROWS} more are in the ledger.</p>" if len(left_out) > MOST_ROWS else ""
    return f"\n<h2>Not rendered</h2>\n<table><tr><th>status<th>uid<th>reason\n{rows}\n</table>{more}\n"
