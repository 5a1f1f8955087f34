"""Pictures of a study: the best and the worst distilled object, and by how much variants differ."""

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


def differences(rows: list[tuple[str, float, float, float]], unit: str) -> Image.Image:
    """A line for each row: a point at its mean between the ends of its interval, and one upright line at zero.

    rows: (words, mean, low, high).
    """
    font = ImageFont.load_default(FONT)
    left = max(300, *(round(font.getlength(one[0])) + 12 for one in rows))  # pixels, as the others
    row, width, right = 24, 360, 70
    low, high = min(0.0, *(one[2] for one in rows)), max(0.0, *(one[3] for one in rows))
    scale = width / ((high - low) or 1.0)
    image = Image.new("RGB", (left + width + right, row * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(image)

    def at(value: float) -> float:
        return left + (value - low) * scale

    draw.line([(at(0), 0), (at(0), row * len(rows))], "gray")
    for number, (words, mean, least, most) in enumerate(rows):
        middle = row * (number + 0.5)
        draw.text((4, middle - FONT / 2), words, "black", font)
        draw.line([(at(least), middle), (at(most), middle)], "black", 2)
        draw.ellipse([at(mean) - 4, middle - 4, at(mean) + 4, middle + 4], "black")
        draw.text((left + width + 8, middle - FONT / 2), f"{mean:+.2f}", "black", font)
    draw.text((4, row * len(rows) + 4), f"{unit}; the line is at 0", "black", font)
    return image
