"""A thread that fails leaves no checkpoint."""

from __future__ import annotations

import pytest
import torch

from data.files import UserError
from train.checkpoint_files import CheckpointFiles
from train.config import TrainConfig
from train.engine import memory_explained


@pytest.mark.parametrize("error", [MemoryError(), TypeError("odd"), OSError(28, "No space left on device")])
def test_an_error_of_any_kind_is_kept_and_the_rest_is_written(tmp_path, error) -> None:
    files = CheckpointFiles()
    files.begin(background=True)
    for name in "abc":

        def save(content, target, fails=name == "b"):
            if fails:
                raise error
            torch.save(content, target)

        files.hand_in({"x": torch.zeros(3)}, tmp_path / name, save)
    files.start()
    files.wait()
    assert len(files.errors) == 1 and "/b: " in files.errors[0]
    assert {path.name for path in files.written} == {"a", "c"} and not files.later


def test_what_was_not_written_is_an_error(tmp_path) -> None:
    files = CheckpointFiles()
    files.begin(background=True)
    files.save({"x": 1}, str(tmp_path / "a"))
    files.wait()  # without a thread, as if it had died
    assert files.errors == [f"{tmp_path}/a was not written"]


def test_out_of_memory_says_what_to_change() -> None:
    config = TrainConfig(batch_size=60, micro_batch_size=5, gradient_checkpointing=False, dry_run_processes=4)
    words = r"try, in this order: micro_batch_size=1, gradient_checkpointing=true; or, for"
    with pytest.raises(UserError, match=words), memory_explained(config):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(UserError, match="no main memory left"), memory_explained(config):
        raise MemoryError
    with pytest.raises(RuntimeError, match="another"), memory_explained(config):
        raise RuntimeError("another")
