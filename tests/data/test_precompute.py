"""Shards of latents: what the encoders make of the pictures, again after new renders, damaged bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.files import UserError
from data.packing import pack, verify
from data.precompute import PrecomputeConfig, main
from data.shards import read_manifest
from data.stream import ViewDataset, views_of
from models.autoencoder import load_autoencoder
from models.config import AutoencoderConfig, ImageEncoderConfig
from models.image_encoder import embed_image, load_image_encoder_folder


def config(tiny: Path, shards: Path, out: Path, **other: object) -> PrecomputeConfig:
    parts = {"autoencoder": AutoencoderConfig(weights=f"{tiny}/parts/vae"),
             "image_encoder": ImageEncoderConfig(weights=f"{tiny}/parts/image_encoder")}  # fmt: skip
    return PrecomputeConfig(
        str(shards), str(out), device="cpu", **{"image_size": 32, "dtype": "float32", **parts, **other}
    )


@pytest.fixture(scope="module")
def latents(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("precompute") / "latents"
    main(config(tiny, tiny / "shards", out))
    return out


@torch.no_grad()
def test_a_sample_is_what_the_encoders_make_of_the_pictures(tiny: Path, latents: Path) -> None:
    vae, encoder = load_autoencoder(f"{tiny}/parts/vae"), load_image_encoder_folder(tiny / "parts" / "image_encoder")
    ours, pictures = (
        ViewDataset(str(folder), 32, 4, seed=5, num_references=2) for folder in (latents, tiny / "shards")
    )
    for position in range(8):
        item, shown = ours[position], pictures[position]
        assert item["key"] == shown["key"]
        assert torch.equal(item["c2w"], shown["c2w"]) and torch.equal(item["reference_c2w"], shown["reference_c2w"])
        all_pictures = torch.cat([shown["images"], shown["references"] * 2 - 1])
        posterior = vae.encode(all_pictures).latent_dist
        torch.testing.assert_close(item["moments"], torch.cat([posterior.mean, posterior.logvar], dim=1))
        torch.testing.assert_close(item["embeddings"], embed_image(encoder, shown["references"][:1])[0])


def test_half_precision_keeps_the_cameras_whole(tiny: Path, tmp_path: Path) -> None:
    main(config(tiny, tiny / "shards", tmp_path / "latents", dtype="float16"))
    item = ViewDataset(str(tmp_path / "latents"), 32, 4, seed=5)[0]
    shown = ViewDataset(str(tiny / "shards"), 32, 4, seed=5)[0]
    assert torch.equal(item["c2w"], shown["c2w"]) and item["moments"].dtype == torch.float32


def test_objects_rendered_again_are_computed_again(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "views", tmp_path / "views")
    shutil.copytree(tiny / "shards", tmp_path / "shards")
    main(config(tiny, tmp_path / "shards", tmp_path / "latents"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "latents").glob("*.tar")}
    folder = tmp_path / "views" / "object1"
    meta = json.loads((folder / "meta.json").read_text())
    for view in meta["views"]:
        Image.fromarray(np.full((32, 32, 4), 255, dtype=np.uint8)).save(folder / view["file"])
    (folder / "meta.json").write_text(json.dumps(meta | {"caption": "rendered again"}))
    pack(tmp_path / "views", tmp_path / "shards", shard_mb=0.03)
    main(config(tiny, tmp_path / "shards", tmp_path / "latents"))
    manifest = read_manifest(tmp_path / "latents")
    assert sorted(key for shard in manifest.shards for key in shard.keys) == [f"object{n}" for n in range(4)]
    assert verify(str(tmp_path / "latents")) == []
    for shard in manifest.shards[:-1]:
        assert (tmp_path / "latents" / shard.name).read_bytes() == before[shard.name], "what was there stays"
    ours, views = (ViewDataset(str(tmp_path / name), 32, 4, seed=0) for name in ("latents", "shards"))
    for number in range(4):
        with ours.open(number) as stored, views.open(number) as shown:
            assert (stored.meta["uid"], stored.meta["caption"]) == (shown.meta["uid"], shown.meta["caption"])


def test_every_flipped_byte_of_latents_is_noticed(latents: Path, tmp_path: Path) -> None:
    shutil.copytree(latents, tmp_path / "latents")
    shard = read_manifest(latents).shards[0]
    whole = (latents / shard.name).read_bytes()
    dataset = ViewDataset(str(tmp_path / "latents"), 32, 4, seed=0)
    with dataset.open(0) as stored:
        places, told, meta = stored.members.places, stored.meta["latents"], stored.meta
    begin = shard.offsets[0] + places["latents.safetensors"][0]
    spots = {name: begin + told[name]["offset"] + 3 for name in ("moments", "embeddings", "c2w")}
    spots["the .json"] = shard.offsets[0] + places["json"][0] + 5
    for name, spot in spots.items():
        content = bytearray(whole)
        content[spot] ^= 4
        (tmp_path / "latents" / shard.name).write_bytes(content)
        said = verify(str(tmp_path / "latents"))
        assert any(shard.keys[0] in line and shard.name in line for line in said), (name, said)
        with pytest.raises(UserError, match=shard.keys[0]), dataset.open(0) as stored:
            stored.moments(views_of(meta, "ring")), stored.cameras(views_of(meta, "ring"))
            stored.embedding(views_of(meta, "reference")[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_size": 30}, "image_size=30 must be a multiple of the autoencoder's"),
        ({"autoencoder": AutoencoderConfig()}, r"autoencoder\.weights is not set"),
        ({"shards": "nowhere"}, "nowhere is not a folder"),
    ],
)
def test_bad_settings_are_told(tiny: Path, tmp_path: Path, change: dict, said: str) -> None:
    wrong = config(tiny, tiny / "shards", tmp_path / "out")
    for key, value in change.items():
        setattr(wrong, key, value)
    with pytest.raises(UserError, match=said):
        main(wrong)


def test_latents_are_not_encoded_again_nor_mixed(tiny: Path, latents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are latents already"):
        main(config(tiny, latents, tmp_path / "out"))
    with pytest.raises(UserError, match="holds other latents"):
        main(config(tiny, tiny / "shards", latents, image_size=64))


def test_only_rank_0_writes_the_manifest_and_every_rank_looks_first(tiny: Path, latents: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError, match="holds other latents"):
            main(config(tiny, tiny / "shards", latents, image_size=64))
        with pytest.raises(UserError, match="is the folder of the shards"):
            main(config(tiny, tiny / "shards", tiny / "shards" / ".." / "shards"))
    assert verify(str(latents)) == [] and verify(str(tiny / "shards")) == []


def test_mended_shards_come_back_and_too_much_damage_is_an_error(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "shards", tmp_path / "shards")
    shard = read_manifest(tmp_path / "shards").shards[0]
    whole = (tmp_path / "shards" / shard.name).read_bytes()
    damaged = bytearray(whole)
    damaged[shard.offsets[0] + 600] ^= 1
    (tmp_path / "shards" / shard.name).write_bytes(damaged)
    given = config(tiny, tmp_path / "shards", tmp_path / "latents")
    with pytest.raises(
        UserError, match=rf"1 of 4 objects are damaged, more than max_damaged=0.01 .*\({shard.keys[0]}\)"
    ):
        main(given)
    assert not (tmp_path / "latents" / "manifest.json").exists()
    given.max_damaged = 0.3
    main(given)
    assert read_manifest(tmp_path / "latents").count == 3
    (tmp_path / "shards" / shard.name).write_bytes(whole)
    main(given)
    assert read_manifest(tmp_path / "latents").count == 4 and verify(str(tmp_path / "latents")) == []


def test_other_settings_leave_no_moment_without_whole_latents(tiny: Path, tmp_path: Path) -> None:
    """Shards are named by what they hold, so that a run that is killed in between has changed nothing."""
    out = tmp_path / "latents"
    main(config(tiny, tiny / "shards", out))
    before = {shard.name for shard in read_manifest(out).shards}
    main(config(tiny, tiny / "shards", out, dtype="float16"))
    after = {shard.name for shard in read_manifest(out).shards}
    assert not before & after and {path.name for path in out.glob("*.tar")} == after
    assert verify(str(out)) == []
