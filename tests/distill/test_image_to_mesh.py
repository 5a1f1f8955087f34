"""One process from images to meshes: what goes in, what memory, disks, signals and odd numbers do to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from tiny_model import config

from data.files import UserError, read_json
from distill import distillation, image_to_mesh, isotropy
from distill.config import GenerateConfig, MeshConfig, TurntableConfig
from distill.glb import load_glb
from distill.image_to_mesh import images_to_meshes, what_can_be_built
from distill.snapshot import FILE, load_result


@pytest.fixture
def settings(checkpoint: Path, tmp_path: Path) -> list[GenerateConfig]:
    """Of two pictures."""
    made = []
    for number, grey in enumerate((40, 200)):
        picture = np.full((40, 40, 3), 255, dtype=np.uint8)
        picture[8:32, 8:32] = grey
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        one = config(tmp_path / f"out{number}", steps=4)
        one.checkpoint, one.image, one.device, one.dtype = (
            str(checkpoint),
            str(tmp_path / f"{number}.png"),
            "cpu",
            "auto",
        )
        one.mesh = MeshConfig(resolution=24, texture_size=0)
        one.turntable = TurntableConfig(frames=2, size=16, views=1)
        made.append(one)
    return made


def losses(one: GenerateConfig) -> Any:
    return json.loads((Path(one.out) / "losses.json").read_text())


def result(one: GenerateConfig) -> Any:
    return read_json(Path(one.out) / "result.json", "result")


def test_no_reference_pixel_reaches_the_loss(settings: list[GenerateConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """With one embedding for both, two pictures give the same numbers; with their own, others."""
    assert images_to_meshes(settings) == {}
    assert losses(settings[0]) != losses(settings[1])
    monkeypatch.setattr(image_to_mesh, "embed_image", lambda encoder, pictures: torch.ones(1, 1, 24))
    for one in settings:
        shutil.rmtree(one.out)
        assert images_to_meshes([one]) == {}
    assert losses(settings[0]) == losses(settings[1]) and len(losses(settings[0])) == 4


def test_bf16_and_what_is_never_loaded(settings: list[GenerateConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoencoder's decoder is not there, and the image encoder is gone when the first step begins."""
    seen: list[Any] = []
    step = distillation.step_together

    def look(scenes: Any, model: Any, *rest: Any) -> None:
        seen.append((model.vae.decoder, model.vae.post_quant_conv, model.image_encoder))
        step(scenes, model, *rest)

    monkeypatch.setattr(distillation, "step_together", look)
    settings[0].dtype = "bfloat16"
    assert images_to_meshes(settings[:1]) == {}
    assert seen == [(None, None, None)] * 4
    assert result(settings[0])["dtype"] == "torch.bfloat16" and result(settings[0])["peak_memory_gib"] > 0.1
    assert all(np.isfinite(row["loss"]) for row in losses(settings[0]))
    assert len(load_glb(Path(settings[0].out) / "mesh.glb").faces) > 0


def test_an_embedding_instead_of_a_picture(settings: list[GenerateConfig], checkpoint: Path, tmp_path: Path) -> None:
    """With weights that have no image encoder, and an embedding of no words beside it."""
    shutil.copytree(checkpoint, tmp_path / "text")
    shutil.rmtree(tmp_path / "text" / "image_encoder")
    one, other = settings
    for each, empty in ((one, {}), (other, {"unconditional": torch.ones(3, 24)})):
        each.checkpoint, each.image, each.embedding = str(tmp_path / "text"), None, f"{each.out}.safetensors"
        save_file({"embedding": torch.linspace(-1, 1, 72).view(3, 24), **empty}, each.embedding)
        assert images_to_meshes([each]) == {}
    assert losses(one) != losses(other) and "<canvas" in (Path(one.out) / "report.html").read_text()
    stamp = (Path(one.out) / "mesh.glb").stat().st_mtime_ns
    assert images_to_meshes([one]) == {} and (Path(one.out) / "mesh.glb").stat().st_mtime_ns == stamp
    save_file({"embedding": torch.ones(30)}, tmp_path / "wide.safetensors")
    one.embedding, one.out = str(tmp_path / "wide.safetensors"), str(tmp_path / "wide")
    with pytest.raises(UserError, match=r"has 30 numbers a token and .* takes 24"):
        images_to_meshes([one])


def test_a_nan_leaves_a_mesh_and_can_be_answered(
    settings: list[GenerateConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = settings[0]
    require = distillation.require_finite

    def nan_at_step_2(run: Any, found: dict[str, torch.Tensor]) -> None:
        require(run, found | ({"sds": torch.tensor(torch.nan)} if run.step == 2 else {}))

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "require_finite", nan_at_step_2)
        with pytest.raises(
            UserError, match=r"step 2: sds is not finite.*guidance\.scale.*mesh\.glb shows what its sound"
        ):
            images_to_meshes([one])
    assert result(one)["steps"] == 2 and result(one)["made_of"] is None
    one.guidance.scale = 3.0
    assert images_to_meshes([one]) == {}
    assert "goes on from step 2 with guidance.scale=3.0 (was 10.0)" in capsys.readouterr().out
    assert result(one)["steps"] == 4 and result(one)["made_of"]
    one.guidance.scale = 4.0  # of a sound run that is another experiment
    with pytest.raises(UserError, match=r"belongs to another configuration, but for guidance\.scale=4\.0 \(was 3\.0\)"):
        images_to_meshes([one])


def test_a_network_that_gives_nan_is_the_reason_that_is_told(
    settings: list[GenerateConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, asked = distillation.predict_noise_output, []

    def sick(*given: Any) -> torch.Tensor:
        asked.append(None)
        output = predict(*given)
        return output if len(asked) <= 2 else torch.full_like(output, torch.nan)

    for module in (distillation, isotropy):
        monkeypatch.setattr(module, "predict_noise_output", sick)
    with pytest.raises(UserError, match=r"step \d: sds is not finite.*mesh\.glb shows what its sound steps made"):
        images_to_meshes(settings[:1])
    told = result(settings[0])
    assert told["isotropy"]["spread"] is None and set(told["isotropy"]["error"]) == {None}
    assert "<canvas" in (Path(settings[0].out) / "report.html").read_text()


def test_memory_that_does_not_suffice(
    settings: list[GenerateConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, most = distillation.step_together, 1

    def small(scenes: Any, *rest: Any) -> None:
        if len(scenes) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore words.")
        step(scenes, *rest)

    monkeypatch.setattr(distillation, "step_together", small)
    assert images_to_meshes(settings) == {}
    assert "2 objects at once need too much memory; 1 from now on" in capsys.readouterr().out
    assert [len(losses(one)) for one in settings] == [4, 4]
    most = 0
    shutil.rmtree(settings[0].out)
    with pytest.raises(UserError, match=r"step 0: .*\(CUDA out of memory\.\).*volume\.samples_at_once"):
        images_to_meshes(settings[:1])


def test_a_full_disk_and_what_killed_writers_left(
    settings: list[GenerateConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise UserError("cannot write: No space left on device")

    out = Path(settings[0].out)
    (out / "snapshot").mkdir(parents=True)
    remains = [out / ".mesh.glb.0123abcd.tmp.glb", out / "snapshot" / ".latest.safetensors.0123abcd.tmp.safetensors"]
    for path in remains:
        path.write_text("half")
    (out / ".mine.tmp").write_text("not ours")
    monkeypatch.setattr(distillation, "save_snapshot", full)
    assert images_to_meshes(settings[:1]) == {}
    assert "no snapshot of step 3: cannot write: No space left" in capsys.readouterr().err
    assert not any(path.exists() for path in remains) and (out / ".mine.tmp").exists()


def test_an_error_in_one_mesh_costs_no_other(
    settings: list[GenerateConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extract, calls = image_to_mesh.extract_mesh, []

    def broken(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("surface level must be within volume data range")
        return extract(*arguments)

    monkeypatch.setattr(image_to_mesh, "extract_mesh", broken)
    failed = images_to_meshes(settings)
    assert failed == {settings[0].out: "ValueError: surface level must be within volume data range"}
    assert "Traceback" in capsys.readouterr().err and result(settings[1])["steps"] == 4


def test_all_refused_is_no_crash(settings: list[GenerateConfig]) -> None:
    for one in settings:
        (Path(one.out) / FILE).parent.mkdir(parents=True)
        (Path(one.out) / FILE).write_text("no snapshot")
    failed = images_to_meshes(settings)
    assert list(failed) == [one.out for one in settings]
    assert all("is not a snapshot that can be read" in words for words in failed.values())


def test_signals_outside_of_the_loop(
    settings: list[GenerateConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scheduler's ends at once, and Ctrl-C with a mesh of what there is, if there is anything."""
    one, before = settings[0], signal.getsignal(signal.SIGINT)

    def then(number: int, function: Any) -> Any:
        def after_signal(*arguments: Any, **named: Any) -> Any:
            os.kill(os.getpid(), number)
            return function(*arguments, **named)

        return after_signal

    with monkeypatch.context() as patch:
        patch.setattr(image_to_mesh, "load_export", then(signal.SIGINT, image_to_mesh.load_export))
        with pytest.raises(UserError, match="stopped before its first step"):
            images_to_meshes([one])
    for name in ("load_export", "extract_mesh"):
        with monkeypatch.context() as patch:
            patch.setattr(image_to_mesh, name, then(signal.SIGTERM, getattr(image_to_mesh, name)))
            with pytest.raises(SystemExit) as end:
                images_to_meshes([one])
        assert end.value.code == 75 and not (Path(one.out) / "mesh.glb").exists()
    with monkeypatch.context() as patch:
        patch.setattr(image_to_mesh, "extract_mesh", then(signal.SIGINT, image_to_mesh.extract_mesh))
        assert images_to_meshes([one]) == {}
    assert result(one)["continued"] is True and "ending with a mesh" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


class Recorder:
    """Stands for W&B's run of a mesh."""

    def __init__(self, *_: Any) -> None:
        self.heard: list[Any] = []

    def alert(self, title: str, words: str, level: str = "INFO") -> None:
        self.heard.append(title)

    def close(self, status: int = 0) -> None:
        self.heard.append(status)

    def log(self, *_: Any) -> None: ...
    def media(self, *_: Any) -> None: ...
    def artifact(self, *_: Any, **__: Any) -> None: ...


def test_who_watches_hears_how_it_ended(settings: list[GenerateConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    watching: list[Recorder] = []
    monkeypatch.setattr(image_to_mesh, "watch", lambda *_: watching.append(Recorder()) or watching[-1])
    step = distillation.step_together

    def leave(*arguments: Any) -> None:
        step(*arguments)
        os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "step_together", leave)
        with pytest.raises(SystemExit):
            images_to_meshes(settings)
    assert [one.heard for one in watching] == [["asked to end", 0]] * 2
    with monkeypatch.context() as patch:
        patch.setattr(image_to_mesh, "extract_mesh", lambda *_: (_ for _ in ()).throw(UserError("the field is empty")))
        assert len(images_to_meshes(settings)) == 2
    assert [one.heard for one in watching[2:]] == [["stopped", 1]] * 2
    assert images_to_meshes(settings) == {}
    assert [one.heard for one in watching[4:]] == [["finished", 0]] * 2


def test_without_a_compiler_it_is_plain_torch(
    settings: list[GenerateConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, gpu = settings[0], torch.device("cuda")
    monkeypatch.setattr(image_to_mesh, "no_compiler", lambda: "there is no C compiler")
    assert what_can_be_built(one, torch.device("cpu")) is one
    plain = what_can_be_built(one, gpu)
    assert (plain.backend, plain.compile) == ("torch", None) and "apt install gcc" in capsys.readouterr().err
    for key, value in (("backend", "triton"), ("compile", "inductor")):
        with pytest.raises(UserError, match=f"{key}={value}: there is no C compiler"):
            what_can_be_built(image_to_mesh.replace(one, **{key: value}), gpu)


def test_a_result_of_triton_is_looked_at_in_plain_torch(settings: list[GenerateConfig]) -> None:
    assert images_to_meshes(settings[:1]) == {}
    path = Path(settings[0].out) / "config.yaml"
    saved = OmegaConf.load(path)
    saved.backend = "triton"
    OmegaConf.save(saved, path)
    run, read = load_result(path.parent)
    assert run.field.backend.name == "torch" and read.backend == "triton" and run.step == 4
    assert all(state["step"].device.type == "cpu" for state in run.optimizer.state.values())
