"""Lists the objects of a source and what is known of them, without rendering.

    python data/list_assets.py source=objects/
    python data/list_assets.py source=objaverse select.licenses=[CC0-1.0,CC-BY-*] select.split=val out=val.csv

Selects as data/render.py does with the same `select` keys; `out` gets a line an object with all that is known.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields

import numpy as np
from omegaconf import MISSING

from conf.cli import check, run
from data.assets import Asset, list_assets
from data.files import atomic_file
from data.selection import SPLITS, SelectConfig, count_categories, select_assets, split_of, with_faces


@dataclass
class ListConfig:
    source: str = MISSING  # as data/render.py's: a folder, a .sh3f library, objaverse or objaverse:UIDS.txt
    names: list[str] = field(default_factory=list)  # only these objects (uid or file name without suffix); empty: all
    select: SelectConfig = field(default_factory=SelectConfig)
    count_faces: bool = False  # in the files, where the source does not tell: opens each file
    rows: int = 12  # of each table: the most frequent values
    cache: str | None = None  # where a .sh3f library is unpacked; null: beside it
    out: str | None = None  # a .csv file for all columns of all objects

    def __post_init__(self) -> None:
        check(self.rows >= 1, f"rows={self.rows} must be at least 1")
        check(self.out is None or self.out.endswith(".csv"), f"out={self.out} must be the name of a .csv file")


def main(config: ListConfig) -> None:
    assets = select_assets(list_assets(config.source, config.cache, config.names), config.select)
    if config.count_faces:
        assets = with_faces(assets)
    splits = [split_of(asset.uid, config.select.val_share, config.select.test_share) for asset in assets]
    print(summary(assets, splits, config.rows))
    if config.out is not None:
        write_csv(config.out, assets, splits)
        print(f"\nall {len(assets)} in {config.out}")


def summary(assets: Sequence[Asset], splits: Sequence[str], rows: int) -> str:
    """Counts by licence, category and split, and quantiles of the face counts that are known."""
    faces = [asset.faces for asset in assets if asset.faces is not None]
    lines = [f"{len(assets)} objects"]
    lines += table("licence", Counter(asset.license for asset in assets), rows)
    lines += table("category", count_categories(Counter(asset.category for asset in assets)), rows)
    lines += table("split", Counter({split: splits.count(split) for split in SPLITS}), rows)
    lines += ["", f"faces, known of {len(faces)}"]
    if faces:
        shares = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
        values = np.quantile(faces, shares, method="nearest")
        lines += [f"  {f'{share:.0%}':>8}  {value}" for share, value in zip(shares, values, strict=True)]
    return "\n".join(lines)


def table(title: str, counts: Counter[str], rows: int) -> list[str]:
    """A count and a value a line, most frequent first; what is beyond `rows` is one line."""
    shown = counts.most_common(rows)
    # Captions and names come from outside: what a terminal would obey is shown escaped.
    lines = [f"  {count:>8}  {value if value.isprintable() else repr(value)}" for value, count in shown if value]
    lines += [f"  {count:>8}  (unknown)" for value, count in shown if not value]
    rest = counts.total() - sum(count for _, count in shown)
    return ["", title, *lines, *([f"  {rest:>8}  ({len(counts) - len(shown)} more)"] if rest else [])]


def write_csv(path: str, assets: Sequence[Asset], splits: Sequence[str]) -> None:
    """One line an object: every field of Asset, and its split."""
    names = [column.name for column in fields(Asset)]
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "split"])
        for asset, split in zip(assets, splits, strict=True):
            row = dict(zip(names, astuple(asset), strict=True))
            row["rotation"] = " ".join(f"{value:g}" for value in asset.rotation)
            writer.writerow([*row.values(), split])


if __name__ == "__main__":
    run(ListConfig, "data/list_assets", main)
