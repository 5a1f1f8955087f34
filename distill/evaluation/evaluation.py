"""All objects: found, measured, summed up, written down."""

from __future__ import annotations

import platform
from collections import defaultdict
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchmetrics
import trimesh

from data.files import UserError, require_writable, write_json
from data.progress import Progress
from distill.evaluation.config import EvaluateConfig
from distill.evaluation.images import load_lpips
from distill.evaluation.measure import CONVENTIONS, Measured, Tools, measure
from distill.evaluation.objects import Item, find_objects, matched
from distill.evaluation.page import write_page
from distill.evaluation.summary import by_azimuth, means
from models.device import choose_device
from models.image_encoder import load_image_encoder_folder

SHOWN = 5  # names in a sentence
VERSION = 3  # of the protocol: a number rises when a figure would come out otherwise
LPIPS_OF = {"syncdreamer_gso": "vgg", "eschernet_gso": "alex"}


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Writes evaluation.json and evaluation.html into `config.out`, and returns what the JSON holds."""
    out = Path(config.out)
    if (out / "evaluation.json").exists():
        raise UserError(f"{out} holds an evaluation already; choose another out=")
    preds = find_objects(Path(config.pred), "pred")
    truths: dict[str, Item] = {}
    pairs: list[tuple[Item, Item | None]] = [(pred, None) for _, pred in sorted(preds.items())]
    if config.truth is not None:
        truths = find_objects(Path(config.truth), "truth")
        pairs = list(matched(preds, truths, config.pred, config.truth))
    require_writable(out, needed_mb=16)
    config = replace(config, lpips=LPIPS_OF.get(config.preset, config.lpips) if config.lpips != "none" else "none")
    tools, lacking = load_tools(config, pairs)
    measured: dict[str, Measured] = {}
    with Progress("evaluating", len(pairs), "object") as progress:
        for pred, truth in pairs:
            measured[pred.name] = measure(pred, truth, config, tools)
            progress.update()
    told = summed_up(config, measured, lacking)
    left = sorted(truths.keys() - preds.keys()) if len(truths) > 1 else []
    told["truth_without_prediction"] = left
    if left:
        told["not_measured"]["objects"] = f"the ground truth has {len(left)} more, which pred= lacks: {some_of(left)}"
    write_page(out / "evaluation.html", told, measured)
    write_json(out / "evaluation.json", told)  # last: it says that all is there
    for name, value in told["means"].items():
        span = "" if value["low"] is None else f"[{value['low']:.5f}, {value['high']:.5f}]  "
        print(f"{name:24} {value['mean']:10.5f}  {span}{value['objects']} objects")
    for name, why in told["not_measured"].items():
        print(f"{name}: not measured: {why}")
    print(f"{out}: evaluation.json, evaluation.html")
    return told


def some_of(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def load_tools(config: EvaluateConfig, pairs: list[tuple[Item, Item | None]]) -> tuple[Tools, dict[str, str]]:
    """The networks that can be had, and what cannot be measured and why."""
    device, _ = choose_device(config.device, "float32")
    lacking: dict[str, str] = {}
    lpips = None
    have_pictures = any(b is not None and (b.pictures or b.strip) for _, b in pairs)
    if config.lpips != "none" and have_pictures:
        try:
            lpips = load_lpips(config.lpips, config.lpips_backbone)
        except UserError as error:
            if config.lpips_backbone is not None:
                raise
            lacking["lpips"] = str(error)
    encoder = None
    if config.image_encoder is not None:
        encoder = load_image_encoder_folder(config.image_encoder).to(device)
    elif have_pictures and config.preset == "ours":
        lacking["clip_similarity"] = "no image_encoder= was given"
    return Tools(lpips, encoder, device), lacking


def summed_up(config: EvaluateConfig, measured: dict[str, Measured], lacking: dict[str, str]) -> dict[str, Any]:
    objects = {name: found.metrics for name, found in sorted(measured.items())}
    without: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, found in sorted(measured.items()):
        for what, why in found.lacking.items():
            without[what, why].append(name)
    for (what, why), names in without.items():
        of = "" if len(names) == len(objects) else f"{some_of(names)} ({len(names)} of {len(objects)} objects): "
        lacking[what] = f"{lacking[what]}; {of}{why}" if what in lacking else f"{of}{why}"
    return {
        "protocol": f"isotropic3d-{config.preset}/{VERSION}",
        "means": means(objects),
        "by_azimuth": by_azimuth([view for _, found in sorted(measured.items()) for view in found.views]),
        "objects": objects,
        "not_measured": lacking,
        "conventions": CONVENTIONS[config.preset],
        "settings": asdict(config),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "torchmetrics": torchmetrics.__version__,
            "scikit-image": version("scikit-image"), "trimesh": trimesh.__version__,
        },
    }  # fmt: skip
