"""From the command line to a typed dataclass: Hydra composes once, nothing after it sees a DictConfig."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.submitit_job import requeue
from data.files import UserError
from data.processes import REQUEUE

T = TypeVar("T")
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
CONF = str(Path(__file__).resolve().parent)
# Runs keep their own config.yaml in their own folder; Hydra is to make no folder and no log file beside it.
QUIET = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]


def run(schema: type[T], primary: str, main: Callable[[T], None]) -> None:
    """Compose `conf/<primary>.yaml`, check it against the dataclass `schema`, and call `main(config)`.

    primary: for instance "train/stage1": the folder's groups (experiment/, model/, ...) can be chosen on the command
    line.  Unknown keys, wrong types and failed `__post_init__` checks end in one line on stderr and status 2.
    """
    folder, name = primary.split("/")
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # hand us the exceptions, to say them in one line with the remedy

    given = {argument.split("=")[0] for argument in sys.argv[1:]}
    # Behind the last override: argparse wants them in one piece, before or after --multirun and the like.
    overrides = [n for n, argument in enumerate(sys.argv) if n and "=" in argument and not argument.startswith("-")]
    behind = overrides[-1] + 1 if overrides else len(sys.argv)
    sys.argv[behind:behind] = [quiet for quiet in QUIET if quiet.split("=")[0] not in given]

    def composed(cfg: DictConfig) -> None:
        try:
            refuse_unknown(cfg, schema)
            main(OmegaConf.to_object(cfg))  # type: ignore[arg-type]
        except UserError as error:
            _exit(str(error).rsplit("UserError: ", 1)[-1].strip())  # a data worker's comes with its traceback
        except (OmegaConfBaseException, ConfigError) as error:
            _exit(_explain(error, schema))
        except OSError as error:
            if error.errno not in STORAGE_ERRORS:
                raise
            _exit(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}; free space or move it")
        except SystemExit as end:
            if end.code == REQUEUE:
                requeue()
            raise

    try:
        hydra.main(version_base="1.3", config_path=f"{CONF}/{folder}", config_name=name)(composed)()
    except (hydra.errors.HydraException, OmegaConfBaseException) as error:
        _exit(_explain(error, schema))


class ConfigError(ValueError):
    """A configuration that cannot work: names key, value and remedy.  Raised by `__post_init__` checks."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def refuse_unknown(cfg: DictConfig, schema: Any) -> None:
    """`+key=value` lets Hydra add keys that no dataclass has; they would be ignored in silence."""
    known = set(known_keys(schema))

    def visit(node: Any, prefix: str) -> None:
        for key in node:
            if f"{prefix}{key}" not in known:
                raise ConfigError(_unknown(f"{prefix}{key}", schema))
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none():
                visit(child, f"{prefix}{key}.")

    visit(cfg, "")


def _exit(message: str) -> None:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # what all ranks meet, rank 0 says; the launcher ends the others meanwhile
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def known_keys(schema: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a nested dataclass."""
    keys: list[str] = []
    hints = get_type_hints(schema)
    for field in fields(schema):
        keys.append(prefix + field.name)
        if is_dataclass(hints[field.name]):
            keys += known_keys(hints[field.name], f"{prefix}{field.name}.")
    return keys


def _unknown(key: str, schema: Any) -> str:
    near = difflib.get_close_matches(key, known_keys(schema), n=1, cutoff=0.4)
    return f"unknown key {key}; " + (f"the nearest known key is {near[0]}" if near else "see --help for the keys")


def _explain(error: BaseException, schema: Any) -> str:
    chain, seen = [], error
    while seen is not None:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__  # type: ignore[assignment]
    for link in chain:
        if isinstance(link, ConfigError):
            return str(link)
    text = " ".join(line.strip() for link in reversed(chain) for line in str(link).splitlines())
    unknown = re.search(r"Key '([^']+)' (?:is )?not in", text) or re.search(r"Could not override '([^']+)'", text)
    if unknown:
        named = re.search(r"full_key: ([\w.]+)", text)
        key = named.group(1) if named else unknown.group(1)
        return _unknown(key, schema)
    absent = re.search(r"missing mandatory value: (\w+)", text)
    if absent:
        return f"{absent.group(1)} is not set; give {absent.group(1)}=..."
    full_key = re.search(r"full_key: ([\w.]+)", text)
    if full_key:
        return f"{full_key.group(1)}: {str(chain[-1]).splitlines()[0]}"
    return " ".join(str(error).split())
