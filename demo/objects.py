"""Objects for the demo: a CC0 library from Debian's archive, or parametric ones where that cannot be had."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

from data.blender_pool import check_blender, find_blender, script_command
from data.files import UserError, atomic_file, atomic_folder
from data.progress import Progress

PACKAGE = "sweethome3d-furniture"
LIBRARY = "BlendSwap-CC-0.sh3f"
PARAMETRIC = Path(__file__).resolve().parent.parent / "data" / "parametric.py"
MAKERS = ("mug", "chair", "tree", "snowman", "rocket", "lamp", "table", "mushroom")


class NotFetched(Exception):
    """The package cannot be had here; the message says why."""


def fetch_objects(cache: Path) -> tuple[Path, str]:
    """The demo's source, a .sh3f library or a folder of GLBs in `cache`, and a line that says which and why."""
    library = cache / LIBRARY
    if library.is_file():
        return library, f"objects: {library}, from Debian's {PACKAGE} (CC0), fetched before"
    folder = cache / "parametric"
    if all((folder / f"{name}.glb").is_file() for name in MAKERS):
        return folder, f"objects: {len(MAKERS)} parametric ones, made before; remove {folder} to try {PACKAGE} again"
    try:
        fetch_library(library)
        return library, f"objects: {library}, from Debian's {PACKAGE} (CC0)"
    except NotFetched as reason:
        make_parametric(folder)
        return (
            folder,
            f"objects: {len(MAKERS)} parametric ones in {folder}, because {PACKAGE} cannot be fetched: {reason}",
        )


def fetch_library(library: Path) -> None:
    """Downloads the package with apt and copies the library of this name out of it; installs nothing.

    Raises NotFetched.
    """
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise NotFetched(f"there is no {program} here")
    work = library.parent / f".{PACKAGE}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {library.parent}: {error.strerror}; give another cache=") from None
    try:
        print(f"objects: downloading Debian's {PACKAGE} (120 MB)", flush=True)
        package = download(work.absolute())
        command(["dpkg-deb", "-x", str(package), str(work / "unpacked")])
        found = work / "unpacked" / "usr" / "share" / "sweethome3d" / "furniture" / library.name
        if not found.is_file():
            raise NotFetched(f"{package.name} holds no {library.name}")
        with atomic_file(library) as temporary:
            shutil.copyfile(found, temporary)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def download(work: Path) -> Path:
    """The .deb, through the machine's package lists or, where these lack it, through lists fetched into `work`.

    Package lists of its own need no root and leave the machine's alone; apt checks the archive's signatures either way.
    """
    try:
        apt_download([], work)
    except NotFetched:
        lists, archives = work / "lists", work / "archives"
        (lists / "partial").mkdir(parents=True)
        (archives / "partial").mkdir(parents=True)
        own = [f"-oDir::State::lists={lists}", f"-oDir::Cache={archives}", "-oDebug::NoLocking=1"]
        if os.geteuid() == 0:
            own.append("-oAPT::Sandbox::User=root")  # the user _apt cannot write here
        command(["apt-get", *own, "update"], cwd=work)
        apt_download(own, work)
    packages = list(work.glob(f"{PACKAGE}_*.deb"))
    if not packages:
        raise NotFetched("apt-get left no .deb")
    return packages[0]


def apt_download(options: list[str], work: Path) -> None:
    """`apt-get download` into `work`, with progress: it grows the .deb in place."""
    # One line: 'address' filename bytes hash
    described = command(["apt-get", *options, "download", "--print-uris", PACKAGE], cwd=work).split()
    megabytes = round(int(described[2]) / 1e6) if len(described) > 2 and described[2].isdigit() else 0
    finished = threading.Event()

    def watch() -> None:
        with Progress("downloading", megabytes, "MB", show=megabytes > 0) as progress:
            while not finished.wait(0.5):
                here = sum(path.stat().st_size for path in work.glob("*.deb*"))
                progress.update(min(round(here / 1e6), megabytes) - progress.done)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        command(["apt-get", *options, "download", PACKAGE], cwd=work)
    finally:
        finished.set()
        watcher.join()


def command(words: list[str], cwd: Path | None = None) -> str:
    """What the command printed.  Raises NotFetched with its last line when it fails."""
    try:
        environment = os.environ | {"LC_ALL": "C"}
        done = subprocess.run(
            words, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace", timeout=1800, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotFetched(f"{words[0]}: {error}") from None
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise NotFetched(f"{words[0]} ended with status {done.returncode}: {lines[-1] if lines else 'it said nothing'}")
    return done.stdout


def make_parametric(folder: Path) -> None:
    """Eight GLB objects in `folder`, made by Blender; UserError when Blender cannot start."""
    if all((folder / f"{name}.glb").is_file() for name in MAKERS):
        return
    blender = find_blender()
    check_blender(blender)
    with atomic_folder(folder) as temporary:
        try:
            command([*script_command(blender, PARAMETRIC), str(temporary.absolute())])
        except NotFetched as error:
            raise UserError(f"the parametric objects could not be made: {error}") from None
        missing = [name for name in MAKERS if not (temporary / f"{name}.glb").is_file()]
        if missing:
            raise UserError(f"Blender made no {', '.join(missing)}; run `{PARAMETRIC}` in it by hand to see why")
        facts = {name: {"license": "CC0-1.0", "category": "parametric", "caption": f"a {name}"} for name in MAKERS}
        (temporary / "assets.json").write_text(json.dumps(facts, indent=1))
