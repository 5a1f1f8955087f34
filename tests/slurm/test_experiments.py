"""The sweeps that are ready: what each of their jobs would run with."""

from __future__ import annotations

from typing import Any

import pytest
from cluster import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from distill.config import GenerateConfig
from train.config import TrainConfig


def swept(primary: str, schema: Any, *words: str) -> dict[str, Any]:
    """The configuration of each value that the experiment sweeps over."""
    folder, name = primary.split("/")
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    configs = {}
    with initialize_config_dir(str(ROOT / "conf" / folder), version_base="1.3"):
        ((key, values),) = compose(name, [*words], return_hydra_config=True).hydra.sweeper.params.items()
        for number, value in enumerate(values.split(",")):
            job = [*words, f"{key}={value}", f"hydra.job.num={number}"]
            whole = compose(name, job, return_hydra_config=True)
            HydraConfig.instance().set_config(whole)
            OmegaConf.set_struct(whole, False)
            del whole["hydra"]
            configs[value] = OmegaConf.to_object(whole)
    return configs


@pytest.mark.parametrize("stage", [1, 2])
def test_embedding_sizes(stage: int) -> None:
    words = ["experiment=embedding_size", "data.shards=shards", "init_from=weights/mvdream"]
    configs = swept(f"train/stage{stage}", TrainConfig, *words)
    sizes = {name: config.model.unet.embedding_dim for name, config in configs.items()}
    assert sizes == {"ViT-B-32": 512, "ViT-L-14": 768, "ViT-H-14": None}, "None is the UNet's own 1024"
    for name, config in configs.items():
        assert (config.name, config.model.image_encoder.arch) == (f"embedding-{name}", name)
        assert config.out == f"runs/embedding-{name}/stage{stage}"


def test_guidance_scales_and_one_stage_against_both() -> None:
    scales = swept("distill/generate", GenerateConfig, "experiment=guidance_scale", "name=mine", "image=chair.png")
    assert [config.guidance.scale for config in scales.values()] == [3, 5, 10, 20]
    assert {config.checkpoint for config in scales.values()} == {"runs/mine/stage2/export"}
    stages = swept("distill/generate", GenerateConfig, "experiment=stage1_or_both", "name=mine", "image=chair.png")
    assert [config.checkpoint for config in stages.values()] == [f"runs/mine/stage{n}/export" for n in (1, 2)]
    for configs in (scales, stages):
        assert len({config.out for config in configs.values()}) == len(configs), "each has a folder of its own"
