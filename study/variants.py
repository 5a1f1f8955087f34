"""What is trained: each variant differs from what it is compared with in what its question asks, in nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

# What needs no model; keys of samples.json.
BASELINES = {"white": "white picture", "mean_object": "mean of the held-out objects, itself among them",
             "nearest_trained": "nearest object trained on"}  # fmt: skip
BASE = "both"  # the method as it is: stage 1, then stage 2 with the default attention
LONGEST = "longer"  # the same, with more steps


@dataclass(frozen=True)
class Variant:
    name: str
    question: str  # heading of its table
    what: str  # its row
    stage1: tuple[str, ...] | None = None  # overrides; None: the stage 1 of `after`
    stage2: tuple[str, ...] | None = ()  # None: stage 1's export is judged
    parts: tuple[str, ...] = field(default=())  # of models/small.py, where it has an autoencoder or encoder of its own
    image_size: int | None = None  # where it is not the study's
    share: float = 1.0  # of the training objects
    times: int = 1  # the steps of each stage that it has; where it takes another's stage 1, as that one
    after: str = BASE  # what it is compared with, and whose stage 1 it goes on from where it has none of its own

    @staticmethod
    def words(given: tuple[str, ...], seed: int) -> list[str]:
        """Overrides; {other_seed} becomes one that no other variant is trained with."""
        return [word.format(other_seed=seed + 1000) for word in given]


NOISE = "How much does another training differ?"
STAGES, EMA = "Stage 1 alone or both stages?", "Which Explicit Multi-view Attention?"
LONGER, EMBEDDING, AMOUNT = "How much training?", "Which embedding?", "How many objects?"
RESOLUTION = "Which resolution?"
DRAWN_ALL_WAYS = (STAGES, LONGER)  # with each guidance and number of steps, not with those chosen alone

VARIANTS = (
    Variant(BASE, STAGES, "both stages", stage1=()),
    Variant("stage1", STAGES, "stage 1 alone", stage2=None),
    # Stage 2's steps, schedule and shares of multi-view training, and nothing of its attention to a reference.
    Variant("no_reference", STAGES, "as many steps, without a reference",
            stage2=("objective.reference_probability=0",)),
    # The same three once more, of a model that was given more time.
    Variant(LONGEST, LONGER, "five times the steps", stage1=(), times=5),
    Variant("longer_stage1", LONGER, "five times the steps, stage 1 alone", stage2=None, times=5, after=LONGEST),
    Variant("longer_no_reference", LONGER, "five times the steps, without a reference",
            stage2=("objective.reference_probability=0",), times=5, after=LONGEST),
    # What no other row's difference can be told from.
    Variant("other_seed", NOISE, "both stages with another seed", stage1=("seed={other_seed}",),
            stage2=("seed={other_seed}",)),
    Variant("other_seed2", NOISE, "stage 2 alone with another seed", stage2=("seed={other_seed}",)),
    Variant("always", EMA, "a reference at every multi-view step", stage2=("objective.reference_probability=1",)),
    Variant("clean_timestep", EMA, "the reference at timestep 0", stage2=("model.ema.timestep=zero",)),
    Variant("own_camera", EMA, "the reference with its camera", stage2=("model.ema.camera=own",)),
    Variant("one_way", EMA, "only the views read the reference", stage2=("model.ema.reads_views=false",)),
    Variant("finest", EMA, "at the finest resolution alone", stage2=("model.ema.downscales=[1]",)),
    Variant("two_references", EMA, "two references", stage2=("model.ema.references=2",)),
    Variant("width16", EMBEDDING, "16 numbers", stage1=("model.unet.cross_attention_dim=16",),
            stage2=("model.unet.cross_attention_dim=16",), parts=("embed_dim=16",)),
    Variant("width192", EMBEDDING, "192 numbers", stage1=("model.unet.cross_attention_dim=192",),
            stage2=("model.unet.cross_attention_dim=192",), parts=("embed_dim=192",)),
    Variant("tokens", EMBEDDING, "patch tokens, not one pooled",
            stage1=("model.image_encoder.tokens=patches", "model.unet.embedding_dim=192"),
            stage2=("model.image_encoder.tokens=patches", "model.unet.embedding_dim=192")),
    Variant("quarter", AMOUNT, "a quarter of the objects", stage1=(), share=0.25),
    Variant("half", AMOUNT, "half of the objects", stage1=(), share=0.5),
    Variant("px32", RESOLUTION, "32 pixels, as many latent cells", stage1=("model.autoencoder.downscale=8",),
            stage2=("model.autoencoder.downscale=8",), parts=("patch_size=8",), image_size=32),
    Variant("px128", RESOLUTION, "128 pixels, as many latent cells", stage1=("model.autoencoder.downscale=32",),
            stage2=("model.autoencoder.downscale=32",), parts=("patch_size=32",), image_size=128),
)  # fmt: skip


def chosen(names: list[str], with_base: bool = True) -> list[Variant]:
    """Those of `names`, or all; and what they are compared with."""
    wanted = {one.name for one in VARIANTS if not names or one.name in names}
    if with_base:
        wanted |= {BASE} | {one.after for one in VARIANTS if one.name in wanted}
    return [one for one in VARIANTS if one.name in wanted]


def beginning_of(variant: Variant) -> Variant:
    """Whose stage 1 it begins with: its own, or that of another."""
    return variant if variant.stage1 is not None else chosen([variant.after], with_base=False)[0]
