"""CLIP score of rendered objects: how well what the pictures show agrees with the caption (arXiv 2104.08718).

A views folder holds its `scores.json`: {"format": "isotropic3d-scores/1", "encoder": which one, "pictures": number,
"objects": {uid: {"clip_score": cosine, "of": hash of the object's meta.json}}}.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING
from PIL import Image
from torch import Tensor

from conf.cli import check
from data.files import UserError, content_mark, read_json, write_json
from data.packing import check_meta
from data.processes import locked
from data.progress import Progress
from data.shards import decode_image

SCORES = "scores.json"
FORMAT = "isotropic3d-scores/1"
SAVE_EVERY_S = 60.0
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass
class ScoreConfig:
    """Settings of `data/score.py`."""

    views: str = MISSING  # folder that data/render.py wrote
    weights: str | None = (
        None  # open_clip's own file of `arch`, or a folder with open_clip_config.json; null: the hub's
    )
    arch: str = "ViT-B-32"  # open_clip architecture
    # open_clip weight tag: what the hub gives, or how the weights in a file were trained (activation, normalisation);
    # none: open_clip's defaults.
    pretrained: str = "laion2b_s34b_b79k"
    pictures: int = 4  # of an object, those nearest to its front
    batch: int = 16  # objects at a time
    device: str = "auto"  # or cpu, cuda, cuda:1 ...

    def __post_init__(self) -> None:
        check(1 <= self.pictures <= 1000, f"pictures={self.pictures} is outside 1..1000; 4 are usual")
        check(1 <= self.batch <= 100_000, f"batch={self.batch} is outside 1..100000; lower it where memory runs out")


@dataclass(frozen=True)
class Clip:
    """Both towers of an open_clip model, in evaluation mode."""

    model: torch.nn.Module
    prepare: Callable[[Image.Image], Tensor]  # RGB picture -> (3, S, S), normalised
    tokenize: Callable[[list[str]], Tensor]  # N captions -> (N, length) int
    mark: str  # which weights, so that scores of different encoders are not mixed
    device: torch.device


def load_clip(config: ScoreConfig) -> Clip:
    """By open_clip, from the hub, a local file or a local folder; nothing is unpickled.

    UserError when it cannot be had, or is of a kind that is not read.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    path = None if config.weights is None else Path(config.weights).expanduser()
    name = config.arch
    tag = open_clip.get_pretrained_cfg(config.arch, config.pretrained)  # empty for an unknown tag
    if path is not None:
        require_local_clip(path)
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        )
        if path is not None and path.is_dir():
            name, mark = f"local-dir:{path}", folder_mark(path)
            model = open_clip.create_model(name, require_pretrained=True, pretrained_text=False)
        elif path is not None:
            mark = f"{config.arch} {config.pretrained} {content_mark(path)}"
            model = open_clip.create_model(
                name,
                load_weights=False,
                pretrained_text=False,
                force_quick_gelu=bool(tag.get("quick_gelu", False)),
                force_preprocess_cfg=merge_preprocess_dict({}, tag),
            )
            open_clip.load_checkpoint(model, str(path), weights_only=True)
        else:
            mark = f"{config.arch} {config.pretrained}"
            model = open_clip.create_model(name, pretrained=config.pretrained, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
        model = model.to(device).eval().requires_grad_(False)
    except Exception as error:  # open_clip, torch and the hub raise many kinds; all mean the same to the user
        reason = " ".join(str(error).split())[:400]
        raise UserError(
            f"the encoder weights={config.weights} arch={config.arch} pretrained={config.pretrained} "
            f"device={config.device} cannot be had: {reason}; connect to the hub once, or give weights= a local "
            "open_clip file with its arch=, or a folder with open_clip_config.json"
        ) from error
    prepare = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    return Clip(model, prepare, tokenizer, mark, device)


def require_local_clip(path: Path) -> None:
    """Refuses kinds of weights that are not read safely, and folders that would have something fetched or run."""
    if path.is_file():
        if path.suffix not in WEIGHT_SUFFIXES:
            raise UserError(f"weights={path} is not one of {' '.join(WEIGHT_SUFFIXES)}; give open_clip's own file")
        return
    if not path.is_dir():
        raise UserError(f"weights={path} does not exist; give open_clip's own file, or a folder of it")
    config = read_json(path / "open_clip_config.json", f"weights={path}")
    model = config.get("model_cfg") if isinstance(config, dict) else None
    text, vision = (model.get("text_cfg"), model.get("vision_cfg")) if isinstance(model, dict) else (None, None)
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise UserError(f"weights={path}/open_clip_config.json has no model_cfg with vision_cfg and text_cfg")
    # The tokenizer's arguments reach transformers, where one of them would let code of the folder run.
    foreign = set(text.get("tokenizer_kwargs") or {}) - {"clean", "strip_sep_token"}
    if foreign or ":" in str(vision.get("timm_model_name") or "") or text.get("hf_model_name"):
        raise UserError(
            f"weights={path}/open_clip_config.json names a network or a tokenizer that would be fetched from elsewhere "
            "or run code; give weights=FILE with arch="
        )


def folder_mark(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", *WEIGHT_SUFFIXES))
    return hashlib.sha256("".join(name + content_mark(folder / name) for name in names).encode()).hexdigest()


# --- scores ---


def front_views(meta: dict[str, Any], count: int) -> list[str]:
    """File names of the `count` pictures of an object that were taken from nearest to its front.

    Of the references, which are drawn around the front; of the ring views where there are none.
    """
    views = [view for view in meta["views"] if view["role"] == "reference"] or meta["views"]
    from_front = [(abs((view["azimuth_deg"] + 180) % 360 - 180), view["file"]) for view in views]
    return [file for _, file in sorted(from_front)[:count]]


def read_front_views(folder: Path, meta: dict[str, Any], count: int) -> list[Image.Image]:
    """RGB pictures on white."""
    pictures = []
    for file in front_views(meta, count):
        rgba = decode_image((folder / file).read_bytes(), int(meta["resolution"])).astype(np.float32)
        alpha = rgba[..., 3:] / 255
        pictures.append(Image.fromarray((rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)))
    return pictures


@torch.no_grad()
def cosines(clip: Clip, pictures: Sequence[Sequence[Image.Image]], captions: Sequence[str]) -> list[float]:
    """For each object the mean, over its pictures, of the cosine between picture and caption embedding, in [-1, 1]."""
    pixels = torch.stack([clip.prepare(picture) for own in pictures for picture in own]).to(clip.device)
    image = clip.model.encode_image(pixels, normalize=True).float()  # type: ignore[operator]
    tokens = clip.tokenize(list(captions)).to(clip.device)
    text = clip.model.encode_text(tokens, normalize=True).float()  # type: ignore[operator]
    owners = torch.tensor([i for i, own in enumerate(pictures) for _ in own], device=clip.device)
    similarity = (image * text[owners]).sum(dim=1)
    return [float(similarity[owners == i].mean()) for i in range(len(captions))]


def clip_scores(views: Path, config: ScoreConfig) -> dict[str, float]:
    """{uid: CLIP score} of the objects in a views folder, which are kept in its scores.json.

    Objects scored before with the same encoder and unchanged since are not scored again.  Objects without a caption
    or with damaged pictures are named and have no score.  UserError when no object can be scored.
    """
    if not views.is_dir():
        raise UserError(f"views={views} is not a folder; make it with python data/render.py source=... out={views}")
    folders = sorted(path.parent for path in views.glob("[!.]*/meta.json"))  # not what a killed render left half done
    if not folders:
        raise UserError(f"views={views} holds no <uid>/meta.json; render first with python data/render.py out={views}")
    with locked(views):
        clip = load_clip(config)
        known = read_entries(views, clip.mark, config.pictures)
        marks = {folder.name: meta_mark(folder) for folder in folders}
        scores = {uid: entry for uid, entry in known.items() if entry["of"] == marks.get(uid)}
        missing = [folder for folder in folders if folder.name not in scores]
        skipped: dict[str, str] = {}
        saved = time.monotonic()
        try:
            with Progress("CLIP scores", len(folders), "object", start=len(scores)) as progress:
                for first in range(0, len(missing), config.batch):
                    batch = missing[first : first + config.batch]
                    found = score_batch(clip, batch, config.pictures, skipped)
                    scores |= {uid: {"clip_score": score, "of": marks[uid]} for uid, score in found.items()}
                    progress.update(len(batch), skipped=str(len(skipped)))
                    if time.monotonic() - saved > SAVE_EVERY_S:
                        write_entries(views, clip.mark, config.pictures, scores)
                        saved = time.monotonic()
        finally:  # interrupted too: what is done is kept
            write_entries(views, clip.mark, config.pictures, scores)
    report_skipped(views, skipped)
    if not scores:
        raise UserError(f"views={views}: no object could be scored; {next(iter(skipped.values()))}")
    return {uid: entry["clip_score"] for uid, entry in scores.items()}


def score_batch(clip: Clip, folders: Sequence[Path], count: int, skipped: dict[str, str]) -> dict[str, float]:
    """{uid: score}; what cannot be scored goes into `skipped` with the reason."""

    def read(folder: Path) -> tuple[list[Image.Image], str] | str:
        try:
            meta, _ = check_meta(folder)
            caption = meta.get("caption")
            if not isinstance(caption, str) or not caption.strip():
                return "it has no caption"
            return read_front_views(folder, meta, count), caption
        except (UserError, OSError) as error:
            return str(error)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return f"{folder}/meta.json is damaged ({error!r}); delete the folder and render again"

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 16)) as pool:
        read_objects = list(pool.map(read, folders))
    good = []
    for folder, found in zip(folders, read_objects, strict=True):
        if isinstance(found, str):
            skipped[folder.name] = found
        else:
            good.append((folder.name, *found))
    if not good:
        return {}
    values = cosines(clip, [pictures for _, pictures, _ in good], [caption for _, _, caption in good])
    if not all(math.isfinite(value) for value in values):
        raise UserError(f"the encoder {clip.mark} gives scores that are no numbers; its weights are damaged")
    return {uid: value for (uid, _, _), value in zip(good, values, strict=True)}


def report_skipped(views: Path, skipped: dict[str, str]) -> None:
    for uid, reason in list(skipped.items())[:20]:
        print(f"score: {uid} has no score: {reason}", file=sys.stderr)
    if len(skipped) > 20:
        print(f"score: and {len(skipped) - 20} more objects of {views}", file=sys.stderr)


# --- scores.json ---


def meta_mark(folder: Path) -> str:
    return hashlib.sha256((folder / "meta.json").read_bytes()).hexdigest()[:32]


def write_entries(views: Path, mark: str, pictures: int, objects: dict[str, dict[str, Any]]) -> None:
    ordered = dict(sorted(objects.items()))
    write_json(views / SCORES, {"format": FORMAT, "encoder": mark, "pictures": pictures, "objects": ordered})


def read_entries(views: Path, mark: str, pictures: int) -> dict[str, dict[str, Any]]:
    """What was scored before with this encoder; nothing where there is none.  UserError for a foreign file."""
    if not (views / SCORES).exists():
        return {}
    content = _read(views)
    return content["objects"] if (content["encoder"], content["pictures"]) == (mark, pictures) else {}


def read_scores(views: Path) -> dict[str, float]:
    """{uid: CLIP score} from the views folder's scores.json.  UserError when it is missing or damaged."""
    return {uid: entry["clip_score"] for uid, entry in _read(views)["objects"].items()}


def _read(views: Path) -> dict[str, Any]:
    content = read_json(views / SCORES, "scores")
    remedy = f"delete it and run python data/score.py views={views}"
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("objects"), dict):
        raise UserError(f"{views / SCORES} is not of format {FORMAT}; {remedy}")
    if not all(_is_entry(entry) for entry in content["objects"].values()) or not {"encoder", "pictures"} <= set(
        content
    ):
        raise UserError(f"{views / SCORES} is damaged; {remedy}")
    return content


def _is_entry(entry: Any) -> bool:
    score = entry.get("clip_score") if isinstance(entry, dict) else None
    return isinstance(score, float) and math.isfinite(score) and isinstance(entry.get("of"), str)


def quantiles(values: Iterable[float]) -> list[float]:
    """Smallest, quarter, median, three quarters and largest."""
    return [float(value) for value in np.quantile(list(values), (0, 0.25, 0.5, 0.75, 1))]
