"""Which assets are used: filters by what is known of them, and splits that an object never changes."""

from __future__ import annotations

import difflib
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise

from conf.cli import check
from data.assets import Asset
from data.faces import count_faces
from data.files import UserError

SPLITS = ("train", "val", "test")
THREADS = 16  # for counting faces: the disk is what is waited for


@dataclass
class SelectConfig:
    """What is asked of an asset; by default nothing.  In patterns case is ignored and `*` stands for any characters."""

    licenses: list[str] = field(default_factory=list)  # patterns such as CC0-1.0 or CC-BY-*; empty: all
    categories: list[str] = field(default_factory=list)  # patterns, of which one category must match one; empty: all
    caption: str = ""  # words that the caption holds, `*` for a gap; empty: all
    faces: list[int | None] = field(default_factory=lambda: [None, None])  # lowest and highest number; null: no bound
    split: str = ""  # train, val or test; empty: all objects
    val_share: float = 0.01  # of all objects, by hash of the uid
    test_share: float = 0.01

    def __post_init__(self) -> None:
        check(
            len(self.faces) == 2 and all(bound is None or bound >= 0 for bound in self.faces),
            f"select.faces={self.faces} must be [lowest, highest], where null is no bound",
        )
        low, high = self.faces
        check(low is None or high is None or low <= high, f"select.faces={self.faces} must ascend")
        check(self.split in ("", *SPLITS), f"select.split={self.split} must be {', '.join(SPLITS)}, or empty for all")
        shares = (self.val_share, self.test_share)
        check(
            all(share >= 0 for share in shares) and sum(shares) <= 1,
            f"select.val_share={self.val_share} and select.test_share={self.test_share} must be shares that sum to at "
            "most 1",
        )
        share = {"train": 1 - sum(shares), "val": self.val_share, "test": self.test_share}.get(self.split, 1)
        check(share > 0, f"select.split={self.split} has no objects, since its share is 0; raise the share")


def split_of(uid: str, val_share: float, test_share: float) -> str:
    """train, val or test: a function of the uid and the shares alone, so that an object stays where it is in any list.

    SHA-256 of the uid as a number in [0, 1): val from the bottom, test from the top.  Growing `val_share` moves objects
    from train to val only, growing `test_share` from train to test only.
    """
    place = int.from_bytes(hashlib.sha256(uid.encode()).digest()[:6], "big") / 2**48
    return "val" if place < val_share else "test" if place >= 1 - test_share else "train"


def matches(pattern: str, text: str) -> bool:
    """Whether `pattern` is all of `text`; case is ignored and `*` stands for any characters.  Linear in the text."""
    first, *rest = pattern.casefold().split("*")
    text = text.casefold()
    if not rest:
        return text == first
    *middle, last = rest
    if not text.startswith(first) or not text.endswith(last) or len(text) < len(first) + len(last):
        return False
    at, end = len(first), len(text) - len(last)
    for part in middle:
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


def split_categories(text: str) -> list[str]:
    """The names in an asset's `category`."""
    return [name.strip() for name in text.split(";")]


def count_categories(texts: Counter[str]) -> Counter[str]:
    """{name: number of objects} from {an asset's `category`: number of objects}."""
    counts: Counter[str] = Counter()
    for text, count in texts.items():
        for name in split_categories(text):
            counts[name] += count
    return counts


def select_assets(assets: Sequence[Asset], config: SelectConfig) -> list[Asset]:
    """Those of `assets` that `config` asks for, in their order.  Says on stderr what each filter leaves.

    UserError for a licence or category that no asset has, and when nothing is left.  Faces are counted in the files,
    of objects that the other filters leave and whose source does not tell; objects of unknown number are kept.
    """
    licenses = _chosen("licenses", config.licenses, Counter(asset.license for asset in assets))
    texts = Counter(asset.category for asset in assets)  # far fewer than assets
    categories = _chosen("categories", config.categories, count_categories(texts))
    wanted = {text for text in texts if not categories.isdisjoint(split_categories(text))}
    caption = f"*{config.caption}*"
    filters: list[tuple[str, bool, Callable[[Asset], bool]]] = [
        ("licenses", bool(config.licenses), lambda asset: asset.license in licenses),
        ("categories", bool(config.categories), lambda asset: asset.category in wanted),
        ("caption", bool(config.caption), lambda asset: matches(caption, asset.caption)),
        ("split", bool(config.split), lambda a: split_of(a.uid, config.val_share, config.test_share) == config.split),
    ]
    left, counts = list(assets), [("listed", len(assets))]
    for name, used, keep in filters:
        if used:
            left = [asset for asset in left if keep(asset)]
            counts.append((name, len(left)))
    if any(bound is not None for bound in config.faces):
        left, unknown = select_by_faces(left, config.faces)
        counts.append((f"faces ({unknown} of unknown number kept)" if unknown else "faces", len(left)))
    if not left and assets:
        removed = ", ".join(f"{name} {before - after}" for (_, before), (name, after) in pairwise(counts))
        raise UserError(f"select leaves none of {len(assets)} objects; removed by: {removed}; widen one of them")
    if len(counts) > 1:
        steps = ", ".join(f"{name} {count}" for name, count in counts)
        print(f"select: objects left after each filter: {steps}", file=sys.stderr, flush=True)
    return left


def select_by_faces(assets: Sequence[Asset], bounds: Sequence[int | None]) -> tuple[list[Asset], int]:
    """(those within `bounds`, both included, or of unknown number; how many are of unknown number)."""
    counted = with_faces(assets)
    low, high = bounds[0] or 0, bounds[1]
    left = [a for a in counted if a.faces is None or (a.faces >= low and (high is None or a.faces <= high))]
    return left, sum(asset.faces is None for asset in left)


def with_faces(assets: Sequence[Asset]) -> list[Asset]:
    """`assets` with `faces` from the files where the source does not tell it."""

    unknown = [asset for asset in assets if asset.faces is None]
    with ThreadPoolExecutor(THREADS) as pool:
        counts = dict(zip((a.uid for a in unknown), pool.map(lambda a: count_faces(a.path), unknown), strict=True))
    return [replace(a, faces=counts[a.uid]) if counts.get(a.uid) is not None else a for a in assets]


def _chosen(key: str, patterns: Sequence[str], known: Counter[str]) -> set[str]:
    """The values of `known` that one of `patterns` matches; UserError for a pattern that matches none."""
    chosen: set[str] = set()
    for pattern in patterns:
        found = {value for value in known if matches(pattern, value)}
        if not found:
            cased = {value.casefold(): value for value in known if value}
            near = [cased[value] for value in difflib.get_close_matches(pattern.casefold(), cased, n=3)]
            common = ", ".join(f"{value or '(unknown)'} ({count})" for value, count in known.most_common(12))
            remedy = f"near it: {', '.join(near)}; " if near else ""
            raise UserError(f"select.{key}: no object has {pattern!r}; {remedy}there are: {common}")
        chosen |= found
    return chosen
