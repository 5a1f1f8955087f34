"""RESULTS.md and results.html of a study: a table for each question, with intervals and the command beside it."""

from __future__ import annotations

import datetime
import itertools
import os
import platform
import shlex
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.files import atomic_file, read_json
from distill import report
from distill.evaluation.summary import by_azimuth, interval, paired_difference, share_interval, spread
from study.config import Distillation, StudyConfig, words_of
from study.figure import differences, figure
from study.held_out import TWIN, parted, without_twins
from study.variants import BASE, BASELINES, DRAWN_ALL_WAYS, LONGEST, NOISE, Variant, chosen

STAGE_WORDS = {"stage1": "stage 1 alone", "stage2": "both stages"}
CAVEAT = (
    "A small-scale study without pretrained weights: a model of {millions:.1f} million parameters, trained from "
    "scratch on {objects} objects at {size} px, with a random image encoder whose last layer was fitted. It can show "
    "whether a choice matters in this regime, and in which direction; it cannot say what the full-size method does, "
    "nor rank it among others."
)


def objects_of(out: Path, names: list[str], share: float, choosing: bool = False) -> dict[str, dict[str, float]]:
    """By uid, the mean of each figure over `names`, the folders of the seeds.

    Objects that are judged; or those that settings are chosen on, `share` of all.
    """
    runs: list[Any] = [read_json(out / "samples" / name / "samples.json", "samples")["objects"] for name in names]
    keys = ("psnr", "ssim", "identified", *BASELINES, *(f"{name}_identified" for name in BASELINES))
    known = parted(runs[0], share)[choosing]
    return {uid: {key: float(np.mean([run[uid][key] for run in runs])) for key in keys} for uid in sorted(known)}


def told_of_both(out: Path, seeds: list[int]) -> Any:
    return read_json(out / "samples" / f"{BASE}-{seeds[0]}" / "samples.json", "samples")


def what_of(name: str) -> str:
    return chosen([name], with_base=False)[0].what


def twins_of(out: Path, seeds: list[int]) -> list[str]:
    told = told_of_both(out, seeds)["objects"]
    return sorted(told.keys() - without_twins(told).keys())


def column(objects: dict[str, dict[str, float]], key: str) -> dict[str, float]:
    return {uid: values[key] for uid, values in objects.items()}


def cell(values: dict[str, float], digits: int = 2) -> str:
    return spanned(float(np.mean(list(values.values()))), interval(list(values.values())), f".{digits}f")


def share(values: dict[str, float]) -> str:
    """Of objects."""
    mean = float(np.mean(list(values.values())))
    return spanned(mean, share_interval(mean, len(values)), ".2f")


def spanned(mean: float, span: tuple[float, float] | None, form: str) -> str:
    """ "1.00 [0.90, 1.10]", or without an interval where there is none."""
    return f"{mean:{form}}" + (f" [{span[0]:{form}}, {span[1]:{form}}]" if span else "")


def gain(a: dict[str, float], b: dict[str, float]) -> str:
    """How much better the objects of both are in a."""
    return spanned_mean(paired_difference(a, b), "+.2f")


def table(headers: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [headers, ["---"] * len(headers), *rows]]
    return "\n".join(lines)


def of_variants(
    found: dict[str, dict[str, dict[str, float]]], variants: list[Variant], config: StudyConfig
) -> dict[str, str]:
    """By question, a table of its variants against what they are compared with, and what makes each row again."""
    psnr = {name: column(objects, "psnr") for name, objects in found.items()}
    rows: dict[str, list[list[str]]] = defaultdict(list)
    for variant in variants:
        mine = found[variant.name]
        compared = variant.name != BASE and variant.after in psnr  # which itself may have failed
        difference = gain(psnr[variant.name], psnr[variant.after]) if compared else ""
        if compared and variant.after != BASE:
            difference += f" (against {what_of(variant.after)})"
        rows[variant.question].append([
            variant.what, cell(psnr[variant.name]), difference, cell(column(mine, "ssim"), 3),
            share(column(mine, "identified")),
            f"`{command_of(replace(config, variants=[variant.name], distil=0))}`",
        ])  # fmt: skip
    headers = ["", "PSNR, dB", "against both stages", "SSIM", "identified", "made by"]
    both = next(iter(rows.values()))[0]
    return {question: table(headers, mine if both in mine else [both, *mine]) for question, mine in rows.items()}


def of_samplings(out: Path, config: StudyConfig, variants: list[Variant]) -> str:
    """Each model's samples by guidance and steps, against those of both stages that begin with the same stage 1, drawn
    the same; and what draws the objects for choosing best."""
    compared = [one for one in variants if one.question in DRAWN_ALL_WAYS]
    rows, choices = [], defaultdict[str, dict[str, float]](dict)
    for name, guidance, steps in [("", config.guidance, config.sample_steps), *config.samplings()]:
        tail = f"-{name}" if name else ""
        folders = {one.name: [f"{one.name}-{seed}{tail}" for seed in config.seeds] for one in compared}
        found = {name: column(objects_of(out, some, config.choose_share), "psnr") for name, some in folders.items()}
        for one in compared:
            mine = objects_of(out, folders[one.name], config.choose_share)
            choosing = column(objects_of(out, folders[one.name], config.choose_share, choosing=True), "psnr")
            compares = one.stage1 is None and one.after in found
            against = gain(found[one.name], found[one.after]) if compares else ""
            rows.append([f"{guidance:g}", str(steps), one.what, *([cell(choosing)] if choosing else []),
                         cell(found[one.name]), against, cell(column(mine, "ssim"), 3),
                         share(column(mine, "identified"))])  # fmt: skip
            if choosing and one.stage1 is not None:
                choices[one.what][f"guidance {guidance:g} and {steps} steps"] = float(np.mean(list(choosing.values())))
    many = [f"PSNR of the {len(choosing)} objects for choosing, dB"] if choosing else []
    text = table(["guidance", "DDIM steps", "model", *many, "PSNR, dB", "against both stages from the same stage 1",
                  "SSIM", "identified"], rows)  # fmt: skip
    best = [f"{what}: {max(means, key=lambda one: means[one])}" for what, means in choices.items()]
    if best:
        text += (f"\n\nThe objects for choosing are drawn best with: {'; '.join(best)}. The other tables have guidance "
                 f"{config.guidance:g} and {config.sample_steps} steps.")  # fmt: skip
    return text + "\n\nStage 1 alone has had fewer steps of training than what is made from it."


def of_baselines(objects: dict[str, dict[str, float]]) -> str:
    rows = [["samples, both stages", cell(column(objects, "psnr")), "", share(column(objects, "identified"))]]
    for key, words in BASELINES.items():
        better = gain(column(objects, "psnr"), column(objects, key))
        rows.append([words, cell(column(objects, key)), better, share(column(objects, f"{key}_identified"))])
    return table(["", "PSNR, dB", "samples are better by", "identified"], rows)


def by_kind(out: Path, objects: dict[str, dict[str, float]]) -> str:
    """Quality by category and by number of faces."""
    metas: dict[str, Any] = {uid: read_json(out / "views_val" / uid / "meta.json", "views") for uid in objects}
    levels = ("fewest", "middle", "most")
    groups: dict[str, dict[str, float]] = defaultdict(dict, {f"faces: {level} third": {} for level in levels})
    edges = np.quantile([metas[uid]["faces"] for uid in objects], [1 / 3, 2 / 3])
    for uid, values in objects.items():
        level = int(np.searchsorted(edges, metas[uid]["faces"]))
        groups[f"faces: {levels[level]} third"][uid] = values["psnr"]
    for uid, values in objects.items():
        groups[f"category: {metas[uid]['category'].split(';')[0]}"][uid] = values["psnr"]
    rows = [[name, str(len(mine)), cell(mine)] for name, mine in groups.items() if len(mine) >= 3]
    return table(["", "objects", "PSNR, dB"], rows)


def of_meshes(out: Path, distilled: list[Distillation], seeds: list[int]) -> str | None:
    """Distilled objects by model, stage and guidance scale; then what the same objects reach without distillation."""
    if not distilled:
        return None
    asked = len(read_json(out / "distilled.json", "distilled objects"))
    rows = []
    runs: dict[str, Any] = {one.name: read_json(out / "judged" / one.name / "meshes.json", "judged meshes")
                            for one in distilled}  # fmt: skip
    for one in distilled:
        judged, told = runs[one.name], read_json(out / "evaluations" / one.name / "evaluation.json", "evaluation")
        means: Any = told["means"]
        rows.append([
            training_of(one), STAGE_WORDS[one.stage], f"{one.scale:g}", f"{len(judged['mesh'])} of {asked}",
            cell(column(judged["mesh"], "psnr")), cell(column(judged["field"], "psnr")),
            share(column(judged["mesh"], "identified")),
            *(spanned_mean(means[k]) if k in means else "not measured"
              for k in ("mask_iou", "lpips", "clip_similarity", "janus", "janus_truth")),
        ])  # fmt: skip
    headers = ["training", "distilled from", "guidance", "objects", "mesh, dB", "NeRF, dB", "mesh identified",
               "mask IoU", "LPIPS", "encoder's cosine", "Janus", "Janus of the truth"]  # fmt: skip
    text = [table(headers, rows), *meshes_compared(distilled, runs)]
    for model in dict.fromkeys(one.model for one in distilled):
        text += beside_meshes(out, [one for one in distilled if one.model == model], runs, seeds)
    return "\n\n".join(text)


def beside_meshes(out: Path, distilled: list[Distillation], runs: dict[str, Any], seeds: list[int]) -> list[str]:
    """Of one model: the first one's meshes, against that model's samples of the same objects and the baselines."""
    shared = sorted(set.intersection(*(set(runs[one.name]["mesh"]) for one in distilled)))
    first, what = distilled[0], training_of(distilled[0])
    if not shared:
        return [f"{what}: no object has a mesh of each."]
    samples: Any = read_json(out / "samples" / f"{first.model}-{seeds[0]}" / "samples.json", "samples")["objects"]
    mesh = {uid: runs[first.name]["mesh"][uid] for uid in shared}
    others = {f"2D samples, {what_of(first.model)}": {uid: samples[uid]["psnr"] for uid in shared}}
    others |= {words: column(mesh, key) for key, words in BASELINES.items()}
    rows = [[words, cell(values), gain(column(mesh, "psnr"), values)] for words, values in others.items()]
    rows.insert(0, [f"meshes, {told(first)}", cell(column(mesh, "psnr")), ""])
    words = f"The {len(shared)} objects that have a mesh of each, {what}, and what they reach without distillation:"
    return [words, table(["", "PSNR, dB", "the meshes are better by"], rows)]


def training_of(one: Distillation) -> str:
    return "the usual steps" if one.model == BASE else what_of(one.model)


def told(one: Distillation) -> str:
    return f"{training_of(one)}, distilled from {STAGE_WORDS[one.stage]} with guidance {one.scale:g}"


def spanned_mean(told: dict[str, Any], form: str = ".2f") -> str:
    return spanned(told["mean"], None if told["low"] is None else (told["low"], told["high"]), form)


def meshes_compared(distilled: list[Distillation], runs: dict[str, Any]) -> list[str]:
    """A sentence for each two that differ in the stage alone or in the training alone, seed by seed."""
    found = []
    for one, other in itertools.permutations(distilled, 2):
        stages = (one.stage, other.stage, one.model) == ("stage2", "stage1", other.model)
        trainings = (one.model, other.model, one.stage) == (LONGEST, BASE, other.stage)
        both = runs[one.name]["mesh"].keys() & runs[other.name]["mesh"].keys()
        if (stages or trainings) and (one.scale, one.seed) == (other.scale, other.seed) and both:
            better = gain(column(runs[one.name]["mesh"], "psnr"), column(runs[other.name]["mesh"], "psnr"))
            found.append(f"Meshes of \"{told(one)}\" are better than those of \"{told(other)}\" by {better} dB, on "
                         f"{len(both)} objects.")  # fmt: skip
    return found


def azimuths(out: Path, variants: list[Variant], config: StudyConfig) -> dict[str, list[list[tuple[float, float]]]]:
    """Of each variant, and of what needs no model: each object's views as (azimuth from the reference, dB)."""
    found = {one.what: sides_of(out, one.name, config, "by_view") for one in variants}
    return found | {words: sides_of(out, BASE, config, f"{key}_by_view") for key, words in BASELINES.items()}


def sides_of(out: Path, name: str, config: StudyConfig, key: str) -> list[list[tuple[float, float]]]:
    objects: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for seed in config.seeds:
        told: Any = read_json(out / "samples" / f"{name}-{seed}" / "samples.json", "samples")
        for uid, values in parted(told["objects"], config.choose_share)[0].items():
            objects[uid] += zip(values["azimuth_deg"], values[key], strict=True)
    return list(objects.values())


def of_sides(sides: dict[str, list[list[tuple[float, float]]]]) -> str:
    rows = []
    for name, objects in sides.items():
        found = spread(objects)
        if found:
            rows.append([name, spanned(*found, ".2f")])
    return table(["", "spread over azimuth, dB"], rows)


def command_of(config: StudyConfig) -> str:
    """Where it works aside."""
    return shlex.join(["python", "study/run.py", *words_of(config, without=("out", "cache"))])


def device_of(config: StudyConfig) -> str:
    cores = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    if config.cpu:
        return cores
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU, not of the machine that wrote this"
    return f"{gpu}, {cores}"


def minutes_of(out: Path, steps: list[str]) -> str:
    """What each kind of these steps has taken, by its record; jobs beside each other count each for itself."""
    spent: dict[str, float] = defaultdict(float)
    for path in [path for name in steps if (path := out / "steps" / f"{name}.json").is_file()]:
        name = path.stem
        kind = ("rendering" if name.startswith("render") else "training" if name.endswith(("-stage1", "-stage2"))
                else "distilling" if name.startswith("distil") else "all else")  # fmt: skip
        spent[kind] += read_json(path, "a step's record")["seconds"]
    return ", ".join(f"{kind} {seconds / 60:.0f} min" for kind, seconds in spent.items())


def write_results(
    out: Path, config: StudyConfig, variants: list[Variant], failed: dict[str, str], steps: list[str], notes: list[str]
) -> Path:
    """failed: why others have no row, by name; steps: what all this was made by; notes: on the objects."""
    found = {one.name: objects_of(out, [f"{one.name}-{seed}" for seed in config.seeds], config.choose_share)
             for one in variants}  # fmt: skip
    sides = azimuths(out, variants, config)
    tables = of_variants(found, variants, config) | {"Against what needs no model": of_baselines(found[BASE])}
    tables["Which guidance and how many steps of the 2D samples?"] = of_samplings(out, config, variants)
    tables["Which objects?"] = by_kind(out, found[BASE])
    tables["Is it as good from all sides?"] = of_sides(sides)
    tables = {title: body for title, body in tables.items() if body.count("\n") > 1}  # of few objects some say nothing
    asked = [one for seed in config.seeds for one in config.distillations(seed)]
    distilled = [one for one in asked if f"judge_{one.name}" in steps]
    meshes = of_meshes(out, distilled, config.seeds)
    if meshes:
        tables["Meshes of held-out objects, by stage and guidance scale"] = meshes
    for name in ("differences.png", "study.png"):  # of a call before
        (out / name).unlink(missing_ok=True)
    if len(variants) > 1:
        write_differences(out, found, variants)
    trained = len(list((out / "views_train").glob("*/meta.json")))
    millions = told_of_both(out, config.seeds)["parameters"] / 1e6
    caveat = CAVEAT.format(size=config.image_size, objects=trained, millions=millions)
    twins, objects = twins_of(out, config.seeds), told_of_both(out, config.seeds)["objects"]
    choosing = len(objects) - len(twins) - len(found[BASE])
    held_out = f"{len(found[BASE])} held out and judged"
    if choosing:
        held_out += f", {choosing} more held out to choose guidance and steps on, which only their table has"
    if twins:
        held_out += f" ({len(twins)} left out, whose nearest by embedding is within {TWIN:g} dB: {', '.join(twins)})"
    held_out += f"; an object is identified among all {len(objects)} held-out ones"
    noise = (
        f', see "{NOISE}" for the usual number of steps'
        if any(variant.question == NOISE for variant in variants)
        else ""
    )
    facts = (f"{datetime.date.today()}, {device_of(config)}; {minutes_of(out, steps)}.  {trained} objects trained on, "
             f"{held_out}, seeds {config.seeds}; {config.sample_steps} DDIM steps, guidance {config.guidance:g}. "
             "Brackets: 95 % intervals over objects, by bootstrap; of fewer than ten Student's t, of shares Wilson's; "
             f"differences are of the same objects. How much another training changes is not in them{noise}. "
             f"`{command_of(config)}` makes all of it again.")  # fmt: skip
    facts += "".join(f"\n\n{words}" for words in [*notes, *(f"Not made: {one}: {why}" for one, why in failed.items())])
    parts = [f"# Results\n\n**{caveat}**\n\n{facts}\n"]
    if (out / "differences.png").is_file():
        words = "Samples of each variant against those of both stages, unless its words say otherwise:"
        parts.append(f"{words}\n\n![differences](differences.png)\n")
    parts += [f"## {title}\n\n*{caveat}* `{command_of(config)}`\n\n{body}\n" for title, body in tables.items()]
    with atomic_file(out / "RESULTS.md") as temporary:
        temporary.write_text("\n".join(parts))
    write_page(out, caveat, facts, sides, found[BASE], config.seeds[0], distilled if meshes else [])
    if meshes:
        longest = [one for one in distilled if (one.model, one.stage) == (LONGEST, "stage2")]
        write_figure(out, [*longest, *distilled][0], len(found[BASE]))
    return out / "RESULTS.md"


def write_differences(out: Path, found: dict[str, dict[str, dict[str, float]]], variants: list[Variant]) -> None:
    """differences.png: PSNR of each variant against what it is compared with."""
    rows = []
    for variant in variants:
        if variant.name != BASE and variant.after in found:
            other = column(found[variant.after], "psnr")
            difference = paired_difference(column(found[variant.name], "psnr"), other)
            mean, low, high = difference["mean"], difference["low"], difference["high"]
            what = variant.what + (" (against all of it)" if variant.after != BASE else "")
            rows.append((what, mean, mean if low is None else low, mean if high is None else high))
    if not rows:
        return
    with atomic_file(out / "differences.png") as temporary:
        differences(rows, "PSNR against both stages, dB").save(temporary, format="PNG")


def write_figure(out: Path, shown: Distillation, held_out: int) -> None:
    """study.png: of the objects distilled, those whose samples by `both` add most and least to the baselines."""
    judged: Any = read_json(out / "judged" / shown.name / "meshes.json", "judged meshes")["mesh"]
    ranked = [uid for uid in read_json(out / "distilled.json", "distilled objects") if uid in judged]
    ends = {ranked[0]: "most", ranked[-1]: "least"} if len(ranked) > 1 else {ranked[0]: ""}
    rows = []
    for uid, end in ends.items():
        place = f"of {held_out} the object where samples of both stages add {end}" if end else f"of {held_out} objects"
        rows.append((f"{uid}, {place}; {what_of(shown.model)}", out / "judged" / shown.name / f"{uid}.png"))
    with atomic_file(out / "study.png") as temporary:
        figure(rows).save(temporary, format="PNG")


def write_page(
    out: Path,
    caveat: str,
    facts: str,
    sides: dict[str, list[list[tuple[float, float]]]],
    objects: dict[str, dict[str, float]],
    seed: int,
    distilled: list[Distillation],
) -> None:
    found = {name: by_azimuth([view for views in objects for view in views]) for name, objects in sides.items()}
    lines = {name: list(zip(told["azimuth_deg"], told["psnr"], strict=True)) for name, told in found.items() if told}
    shown = out / "samples" / f"{BASE}-{seed}" / "samples.png"
    ranked = sorted(objects, key=lambda uid: -objects[uid]["psnr"])
    rows = [[uid, *(round(objects[uid][k], 3) for k in ("psnr", "ssim", *BASELINES))] for uid in ranked]
    sections = [
        ("By azimuth", report.line_chart(lines, "PSNR by azimuth from the reference", "degrees", "dB")),
        ("From the best to the worst", report.gallery([
            report.picture(shown, "reference and samples, each over the renders they should match", "samples")
        ])),
        ("Objects", report.table(["object", "PSNR", "SSIM", *BASELINES.values()], rows, "Held out; both stages.")),
    ]  # fmt: skip
    chart = out / "differences.png"
    if chart.is_file():
        drawn = report.gallery([report.picture(chart, "samples of each variant against both stages", "differences")])
        sections.insert(0, ("Variants", drawn))
    for one in distilled:
        folder = out / "judged" / one.name
        mesh: Any = read_json(folder / "meshes.json", "judged meshes")["mesh"]
        pictures = [
            report.picture(folder / f"{uid}.png", f"{uid}: {mesh[uid]['psnr']:.1f} dB", uid)
            for uid in sorted(mesh, key=lambda uid: -mesh[uid]["psnr"])
        ]
        title = f"Meshes, {told(one)}: reference and truth, samples, NeRF, mesh"
        sections.append((title, report.gallery(pictures)))
    report.write(out / "results.html", report.page("Results", f"{caveat}\n\n{facts}", sections))
