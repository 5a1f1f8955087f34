"""The README's picture: the best and the worst distilled object, as study/meshes.py drew them, with words beside."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROWS = ("truth", "2D samples", "NeRF", "mesh")
MARGIN, TITLE = 84, 28  # pixels left of the rows, and above each object
FONT = 14


def figure(objects: list[tuple[str, Path]]) -> Image.Image:
    """One under the other.  objects: (title, picture of four rows, the reference at the left of the first)."""
    pictures = [Image.open(path).convert("RGB") for _, path in objects]
    width = MARGIN + max(picture.width for picture in pictures)
    whole = Image.new("RGB", (width, sum(TITLE + picture.height for picture in pictures)), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(FONT)
    top = 0
    for (title, _), picture in zip(objects, pictures, strict=True):
        draw.text((4, top + 6), title, "black", font)
        top += TITLE
        whole.paste(picture, (MARGIN, top))
        height = picture.height / len(ROWS)
        for number, name in enumerate(ROWS):
            draw.text((4, top + (number + 0.5) * height - FONT / 2), name, "black", font)
        top += picture.height
    return whole
