"""The study: objects -> renders -> shards -> a training for each variant -> samples and meshes -> RESULTS.md.

    python study/run.py [out=runs/study] [variants=[stage1,no_reference]] [limit=8 stage1='["steps=20"]' ...]

Each step is the command a user would type; it is run once, and again only when it or a step before it has changed, or
where it could not do all of its objects.
Interrupted at any point, the study goes on where it was.  Several may share one out=, as the jobs of slurm/study.sh do;
one that wants a step which another is at ends and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.cli import run
from data.assets import list_assets
from data.files import UserError, require_writable, write_json
from data.processes import locked
from demo.objects import NotFetched, fetch_library
from demo.run import ACCELERATE, PYTHON, ROOT, Step, run_step
from study.config import Distillation, StudyConfig
from study.held_out import parted
from study.jobs import jobs_of, work_off
from study.variants import BASE, BASELINES, DRAWN_ALL_WAYS, Variant, beginning_of, chosen

# Two samples a pixel: at 64 px each pixel is the mean of 16.  With eight, 80 views took 69 s of CPU and not 30.
RENDER = [
    "resolution=256", "samples=2", "max_bounces=2", "diffuse_bounces=1", "glossy_bounces=1", "rings=2",
    "views_per_ring=8", "references=4", "fov_deg=[38,42]", "framing=[0.55,0.57]", "select.test_share=0",
]  # fmt: skip
# Overrides of training that change what precomputed latents and embeddings are.
ENCODERS = ("model.autoencoder.", "model.image_encoder.")


class Plan:
    """Runs steps one after the other.  A step's fingerprint is that of what it is made from, and of itself."""

    def __init__(self, config: StudyConfig):
        self.config, self.out, self.number = config, Path(config.out), 0
        self.marks: dict[str, str] = {}
        self.failed: dict[str, UserError] = {}

    def run(
        self, name: str, command: list[str], makes: str, *made_from: str, passes: tuple[int, ...] = (0,),
        removes: bool = True,
    ) -> None:  # fmt: skip
        """passes, removes: see demo/run.py."""
        if name in self.failed:  # told already, for another that needs it
            raise self.failed[name]
        self.number += 1
        before = "".join(self.marks[one] for one in made_from)
        step = Step(name, command, self.out / makes, passes, removes)
        try:
            with locked(self.out / "steps" / name):
                self.marks[name] = run_step(step, self.number, 0, self.out, before)
        except UserError as error:
            self.failed[name] = error
            raise


def fetched(config: StudyConfig) -> list[Path]:
    paths = [Path(config.cache, f"{name}.sh3f") for name in config.libraries]
    for path in paths:
        if not path.is_file():
            try:
                fetch_library(path)
            except NotFetched as reason:
                raise UserError(f"the study's objects cannot be fetched: {reason}; put {path.name} into {path.parent}"
                                " yourself") from None  # fmt: skip
    return paths


def of_two_libraries(sources: list[Path]) -> list[str]:
    """A sentence on the objects that have one name in two libraries."""
    seen, twice = set[str](), list[str]()
    for source in sources:
        uids = {asset.uid for asset in list_assets(source)}
        twice += sorted(seen & uids)
        seen |= uids
    return [f"Of the objects that two libraries have under one name the later library's are used: {', '.join(twice)}."
            ] if twice else []  # fmt: skip


def render(plan: Plan, sources: list[Path]) -> None:
    """views_val with eval rings, views_train without, and shards of both.

    The libraries' objects lie in one folder: what changes any of them makes all anew, the first removing what is there.
    """
    config, out = plan.config, plan.out
    plan.marks["libraries"] = " ".join(config.libraries)
    share, limit = f"select.val_share={config.val_share}", f"limit={config.limit}"
    for split, evaluated in (("val", 8), ("train", 0)):
        names: list[str] = []
        for source in sources:
            name = f"render_{split}_{source.stem}"
            command = [*PYTHON, "data/render.py", f"source={source}", f"out={out}/views_{split}", *RENDER, share, limit,
                       f"select.split={split}", f"eval_views={evaluated}", *config.render]  # fmt: skip
            plan.run(name, command, f"views_{split}", *(names[-1:] or ["libraries"]), removes=not names)
            names.append(name)
        pack(plan, split, names[-1])


def pack(plan: Plan, name: str, made_from: str) -> None:
    command = [
        *PYTHON,
        "data/pack.py",
        "shard_mb=16",
        f"views={plan.out}/views_{name}",
        f"out={plan.out}/shards_{name}",
    ]
    plan.run(f"pack_{name}", command, f"shards_{name}", made_from)


def encode(plan: Plan, variant: Variant, shards: str, parts: str, size: int) -> str:
    """Latents and embeddings of what the variant is trained on, so that no step decodes pictures of 256 px.

    The name of the step.
    """
    out = plan.out
    own = [word.removeprefix("model.") for word in variant.stage1 or () if word.startswith(ENCODERS)]
    latents = f"latents_{variant.name}" if own or variant.parts or variant.image_size else f"latents_{shards}"
    if latents not in plan.marks:
        command = [
            *PYTHON, "data/precompute.py", f"shards={out}/shards_{shards}", f"out={out}/{latents}",
            f"image_size={size}", f"autoencoder.weights={out}/{parts}/vae",
            f"image_encoder.weights={out}/{parts}/image_encoder", "autoencoder.downscale=16",
            "autoencoder.latent_channels=64", *own,
        ]  # fmt: skip
        plan.run(latents, command, latents, parts, f"pack_{shards}")
    return latents


def fit_parts(plan: Plan, variant: Variant, size: int) -> str:
    """Codec and image encoder, of all objects trained on.  The name of the step."""
    parts = f"parts_{variant.name}" if variant.parts else "parts"
    if parts not in plan.marks:
        words = [f"shards={plan.out}/shards_train", f"out={plan.out}/{parts}", f"image_size={size}",
                 *plan.config.small, *variant.parts]  # fmt: skip
        plan.run(parts, [*PYTHON, "models/small.py", *words], parts, "pack_train")
    return parts


def prepare(plan: Plan, sources: list[Path]) -> None:
    """What all variants share, that jobs beside each other need not wait for one another."""
    base = chosen([BASE])[0]
    encode(plan, base, "train", fit_parts(plan, base, plan.config.image_size), plan.config.image_size)
    render_nearest(plan, sources)


def train(plan: Plan, variant: Variant, seed: int) -> str:
    """The name of the step that makes the export which is judged."""
    config, out = plan.config, plan.out
    size = variant.image_size or config.image_size
    shards = "train"
    if variant.share < 1:
        shards = f"train_{variant.share:g}"
        command = [*PYTHON, "-m", "study.subset", f"{out}/views_train", f"{out}/views_{shards}", str(variant.share)]
        plan.run(f"subset_{variant.share:g}", command, f"views_{shards}", "pack_train")
        pack(plan, shards, f"subset_{variant.share:g}")
    parts = fit_parts(plan, variant, size)
    latents = encode(plan, variant, shards, parts, size)
    launch = [*ACCELERATE, "--num_processes", str(config.processes), "--num_cpu_threads_per_process",
              str(config.threads), "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    # Alone, nobody shares what ZeRO would divide: without it a step takes two thirds of the time on a CPU.
    engine = ["deepspeed=zero0"] if config.processes == 1 else []
    common = [
        "experiment=small_world", *engine, f"cpu={str(config.cpu).lower()}", f"seed={seed}", f"data.image_size={size}",
        f"data.shards={out}/{latents}", f"model.autoencoder.weights={out}/{parts}/vae",
        f"model.image_encoder.weights={out}/{parts}/image_encoder",
    ]  # fmt: skip
    beginning = beginning_of(variant)
    first = f"{beginning.name}-{seed}-stage1"
    if first not in plan.marks:
        words = [*common, f"out={out}/{first}", *config.stage1, *beginning.words(beginning.stage1 or (), seed),
                 *more_steps("stage1", config.stage1, beginning.times)]  # fmt: skip
        plan.run(first, [*launch, "train/stage1.py", *words], first, latents)
    if variant.stage2 is None:
        return first
    second = f"{variant.name}-{seed}-stage2"
    words = [*common, f"out={out}/{second}", f"init_from={out}/{first}/export", *config.stage2,
             *variant.words(variant.stage2, seed),
             *more_steps("stage2", config.stage2, variant.times)]  # fmt: skip
    plan.run(second, [*launch, "train/stage2.py", *words], second, first)
    return second


def more_steps(stage: str, words: list[str], times: int) -> list[str]:
    """The override that trains so many times as long as `words` or the small world's values say."""
    if times == 1:
        return []
    usual: Any = OmegaConf.load(ROOT / "conf/train/experiment" / stage / "small_world.yaml")
    given = [word.partition("=")[2] for word in words if word.lstrip("+").startswith("steps=")] or [str(usual.steps)]
    if not given[-1].isdecimal():
        raise UserError(f"{stage}: steps={given[-1]} is not a whole number, of which {times} times could be trained")
    return [f"steps={times * int(given[-1])}"]


def judge(plan: Plan, name: str, trained: str, guidance: float, steps: int) -> None:
    config, out = plan.config, plan.out
    command = [
        *PYTHON, "-m", "study.samples", f"{out}/{trained}/export", f"{out}/views_val", f"{out}/samples/{name}",
        "--size", str(config.image_size), "--guidance", str(guidance), "--steps", str(steps),
        "--nearest", f"{out}/views_nearest",
    ]  # fmt: skip
    plan.run(f"samples_{name}", command, f"samples/{name}", trained, "render_nearest")


def render_nearest(plan: Plan, sources: list[Path]) -> None:
    """Of each held-out object the nearest one trained on, by embedding, from the held-out cameras."""
    config, out = plan.config, plan.out
    command = [*PYTHON, "-m", "study.nearest", f"{out}/parts/image_encoder", f"{out}/views_val", f"{out}/views_train",
               f"{out}/nearest.json", str(config.image_size)]  # fmt: skip
    plan.run("nearest", command, "nearest.json", "parts")
    names = {row["nearest"] for row in json.loads((out / "nearest.json").read_text()).values()}
    plan.marks["nearest_names"] = plan.marks["nearest"] + " ".join(sorted(names))
    before = "nearest_names"
    for source in sources:
        mine = sorted({asset.uid for asset in list_assets(source)} & names)
        if mine:
            # Only the evaluation views are looked at; and what was trained on is not judged anew from other sides.
            unused = ["rings=1", "views_per_ring=4", "references=1", "min_coverage=0", "reject_border=false"]
            words = [f"source={source}", f"out={out}/views_nearest", *RENDER, f"names=[{','.join(mine)}]",
                     "eval_views=8", *config.render, *unused]  # fmt: skip
            plan.run(f"render_nearest_{source.stem}", [*PYTHON, "data/render.py", *words], "views_nearest", before,
                     removes=before == "nearest_names")  # fmt: skip
            before = f"render_nearest_{source.stem}"
    plan.marks["render_nearest"] = plan.marks[before]


def distil(plan: Plan, seed: int) -> dict[str, str]:
    """Judged objects from the best to the worst, by both stages and by stage 1, by guidance scale and training.

    Why some of these could not be made or judged, by name.
    """
    config, out = plan.config, plan.out
    told = json.loads((out / "samples" / f"{BASE}-{config.seeds[0]}" / "samples.json").read_text())["objects"]
    told, _ = parted(told, config.choose_share)
    # By what the model adds: thin objects are nearly white, and near to every white picture.
    ranked = sorted(told, key=lambda uid: max(told[uid][name] for name in BASELINES) - told[uid]["psnr"])
    count = min(config.distil, len(ranked))
    uids = [ranked[round(i * (len(ranked) - 1) / max(count - 1, 1))] for i in range(count)]
    write_json(out / "distilled.json", uids)
    failed = {}
    for one in config.distillations(seed):
        export = f"{one.model}-{seed}-{one.stage}"
        if not {export, f"samples_{one.model}-{seed}"} <= plan.marks.keys():
            continue  # its training or its samples failed, which has been told
        try:
            distil_and_judge(plan, seed, uids, one, export)
        except UserError as error:
            print(f"error: meshes of {one.name}: {error}", file=sys.stderr, flush=True)
            failed[f"meshes of {one.name}"] = str(error)
    return failed


def distil_and_judge(plan: Plan, seed: int, uids: list[str], distillation: Distillation, export: str) -> None:
    config, out, name = plan.config, plan.out, distillation.name
    one = f"/{uids[0]}" if len(uids) == 1 else ""  # a single picture's mesh goes into out= itself
    pictures = [str(out / "samples" / f"{BASE}-{seed}" / "references" / f"{uid}.png") for uid in uids]
    folder = f"meshes/{name}"
    command = [
        *PYTHON,
        "distill/generate.py",
        "experiment=demo",
        f"checkpoint={out}/{export}/export",
        f"out={out}/{folder}{one}",
        f"guidance.scale={distillation.scale}",
        *config.generate,
        *pictures,
    ]
    # 1: some have no mesh, as the reason above says; the tables tell how many, and the next call tries them again.
    plan.run(f"distil_{name}", command, folder, export, f"samples_{BASE}-{seed}", passes=(0, 1))
    made = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / folder).glob("*/mesh.glb"))]
    plan.marks[f"meshes_{name}"] = plan.marks[f"distil_{name}"] + " ".join(made)
    command = [*PYTHON, "distill/evaluate.py", f"pred={out}/{folder}", f"truth={out}/views_val", "lpips=none",
               f"image_encoder={out}/parts/image_encoder", f"out={out}/evaluations/{name}",
               *config.evaluate]  # fmt: skip
    plan.run(f"evaluate_{name}", command, f"evaluations/{name}", f"meshes_{name}")
    command = [*PYTHON, "-m", "study.meshes", f"{out}/{folder}", f"{out}/views_val", f"{out}/judged/{name}",
               "--size", str(config.image_size), "--nearest", f"{out}/views_nearest",
               "--samples", f"{out}/samples/{distillation.model}-{seed}"]  # fmt: skip
    plan.run(f"judge_{name}", command, f"judged/{name}", f"meshes_{name}", "render_nearest",
             f"samples_{distillation.model}-{seed}")  # fmt: skip


def main(config: StudyConfig) -> None:
    os.chdir(ROOT)
    variants = chosen(config.variants, with_base=config.tables or config.distil > 0)
    if config.list_variants:
        for variant in variants:
            print(variant.name, beginning_of(variant).name)
        return
    require_writable(Path(config.out), needed_mb=4096)
    try:
        study(config, variants)
    except KeyboardInterrupt:
        raise UserError("interrupted; give the same command again, and the study goes on from here") from None


def study(config: StudyConfig, variants: list[Variant]) -> None:
    began = time.monotonic()
    plan = Plan(config)
    sources = fetched(config)
    render(plan, sources)
    prepare(plan, sources)
    if config.jobs > 1:
        work_off(jobs_of(config, variants), config.jobs, plan.out)
    failed: dict[str, str] = {}
    for seed in config.seeds:
        for variant in variants:
            try:
                train_and_judge(plan, variant, seed)
            except UserError as error:
                if variant.name == BASE:  # which all are compared with
                    raise
                print(f"error: {variant.name}: {error}", file=sys.stderr, flush=True)
                failed[variant.name] = str(error)
        if config.distil:
            failed |= distil(plan, seed)
    if config.tables:
        from study.results import write_results

        made = [one for one in variants if one.name not in failed]
        path = write_results(plan.out, config, made, failed, list(plan.marks), of_two_libraries(sources))
        print(f"study: {path} ({time.monotonic() - began:.0f} s this time)")
    if failed:
        raise UserError(f"the tables lack {', '.join(failed)}; the reasons are above")


def train_and_judge(plan: Plan, variant: Variant, seed: int) -> None:
    config = plan.config
    trained = train(plan, variant, seed)
    judge(plan, f"{variant.name}-{seed}", trained, config.guidance, config.sample_steps)
    for name, guidance, steps in config.samplings() if variant.question in DRAWN_ALL_WAYS else ():
        judge(plan, f"{variant.name}-{seed}-{name}", trained, guidance, steps)


if __name__ == "__main__":
    run(StudyConfig, "study/run", main)
