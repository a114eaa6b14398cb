"""Namespaces and a folder that hold all that a run leaves, so that nothing is left, however the run ends.

Podman and its parts write to fixed places in /run, /etc/containers, /var/lib/containers and /dev/shm. A run sees copies
of them, in a mount namespace of its own. Its processes are in a process namespace, which ends with its first one.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

FOLDER = Path("/var/tmp/avatar-containers")
# Places that are not in FOLDER, although a setting would name another one.
PLACES = ("/run", "/etc/containers", "/var/lib")
LEFT = (
    *("/run/libpod", "/run/containers", "/run/runc", "/run/netns", "/run/podman", "/etc/containers"),
    *("/var/lib/containers", "/var/lib/cni", "/dev/shm/libpod_lock"),
)


def run_isolated(*command: str) -> int:
    """Run a command in namespaces of its own and return its exit status, 1 if it left something on this machine."""
    before = left()
    FOLDER.mkdir(exist_ok=True)
    FOLDER.chmod(0o755)
    folder = os.open(FOLDER, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("FAILED   another run is under way")
        return 1
    child = (sys.executable, "-m", "services.local.child", str(os.getpid()))
    namespaces = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    try:
        _empty(FOLDER)  # a run that was killed left it
        # catatonit is process 1, which gets the children of processes that ended.
        status = subprocess.call([*child, *namespaces, "catatonit", "--", *command])
    finally:
        _empty(FOLDER)
        FOLDER.rmdir()
        _remove_cgroups()
        os.close(folder)
    after = left()
    if changed := sorted({path for path, _ in before ^ after}):
        print(f"FAILED   the run changed {', '.join(changed)}")
        return 1
    return status


def left() -> set[tuple[str, int]]:
    """Return the places of LEFT, and what lies in them, with their times of change."""
    files = [file for place in map(Path, LEFT) for file in (place, *place.glob("*"))]
    return {(str(file), file.lstat().st_mtime_ns) for file in files if file.is_symlink() or file.exists()}


def _empty(folder: Path) -> None:
    for each in folder.iterdir():
        shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()


def _remove_cgroups() -> None:
    """Remove the cgroups of containers that have ended."""
    hierarchies = Path("/sys/fs/cgroup")
    for parent in (*hierarchies.glob("libpod_parent"), *hierarchies.glob("*/libpod_parent")):
        for folder, _, _ in os.walk(parent, topdown=False):
            with suppress(OSError):  # of containers that run
                Path(folder).rmdir()


def use_own_places() -> None:
    """Put what is written to PLACES and to shared memory into FOLDER; for the mount namespace of an isolated run."""
    for place in PLACES:
        written, work = (FOLDER / f"{kind}{place.replace('/', '-')}" for kind in ("written", "work"))
        written.mkdir()
        work.mkdir()
        run("mount", "-t", "overlay", "-o", f"lowerdir={place},upperdir={written},workdir={work}", "overlay", place)
    run("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
    # Names of network namespaces that this machine has are none here.
    for each in Path("/run/netns").glob("*"):
        each.unlink()


def run(*command: str) -> None:
    """Run a command. RuntimeError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
