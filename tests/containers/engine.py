"""Podman and buildah from Debian's packages, with all their data in one folder and their network in a namespace.

Nothing of it needs systemd or a running daemon. `podman system service` answers Docker's API on a socket, through which
docker-compose starts its containers. Nobody runs health checks without systemd, so a thread does.
"""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from tests.containers.isolation import FOLDER, run, use_own_places

PACKAGES = ("podman", "buildah", "runc", "catatonit", "netavark", "aardvark-dns", "debootstrap", "iproute2", "iptables")
NAMESPACE = "avatar-containers"
CHECK_S = 3.0
# crun, podman's default, refuses a machine with both versions of cgroups.
CONTAINERS = """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
pids_limit = 0
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""
STORAGE = """
[storage]
driver = "overlay"
graphroot = "{folder}/images"
runroot = "{folder}/run"
"""


class Engine:
    """Runs podman, buildah and docker-compose with a folder and a network namespace of their own.

    base_image: name of the image that the Dockerfile begins from, once it is made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base_image = ""
        self.socket = folder / "podman.sock"
        (folder / "containers.conf").write_text(CONTAINERS.format(folder=folder), encoding="utf-8")
        (folder / "storage.conf").write_text(STORAGE.format(folder=folder), encoding="utf-8")
        self.environment = {
            **os.environ,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "DISABLE_HC_SYSTEMD": "true",
            "DOCKER_HOST": f"unix://{self.socket}",
            "TMPDIR": str(folder),
        }

    def run(
        self,
        *command: str | Path,
        timeout_s: float = 600,
        is_checked: bool = True,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """Run a command inside the network namespace; return its output. RuntimeError with the output if it fails."""
        # nsenter and not `ip netns exec`, which also hides the machine's cgroups.
        inside = ("nsenter", f"--net=/run/netns/{NAMESPACE}")
        return self.run_outside(*inside, *command, timeout_s=timeout_s, is_checked=is_checked, variables=variables)

    def run_outside(
        self,
        *command: str | Path,
        timeout_s: float = 600,
        is_checked: bool = True,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """Run a command in the machine's network, for downloads, and return its output. RuntimeError as above."""
        done = subprocess.run(
            [*map(str, command)],
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
        if is_checked and done.returncode:
            last = "\n    ".join(done.stdout.strip().splitlines()[-30:])
            raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n    {last}")
        return done.stdout

    def podman(self, *arguments: str, timeout_s: float = 600, is_checked: bool = True) -> str:
        """Run podman and return its output without its warnings."""
        output = self.run("podman", *arguments, timeout_s=timeout_s, is_checked=is_checked)
        return "\n".join(line for line in output.splitlines() if not line.startswith("time=")).strip()

    def build(self, target: str, mounts: dict[Path, Path], folder: Path) -> None:
        """Build the Dockerfile's target as avatar/TARGET:0.1.0. mounts: paths in the build by paths of this machine."""
        volumes = [f"--volume={here}:{there}:ro" for there, here in mounts.items()]
        options = ("--runtime", "runc", "--format", "docker", "--layers", "--network", "host", *volumes)
        tag = f"docker.io/avatar/{target}:0.1.0"
        self.run_outside(
            "buildah", "--runtime", "runc", "bud", *options, "--target", target, "-t", tag, folder, timeout_s=1800
        )

    def size_mb(self, image: str) -> float:
        """Return an image's size in MB."""
        return int(self.podman("image", "inspect", "--format", "{{.Size}}", image)) / 1e6

    def running(self, name: str) -> list[str]:
        """Return the names of running containers whose name contains `name`."""
        return self.podman("ps", "--format", "{{.Names}}", "--filter", f"name={name}").split()


@contextmanager
def engine() -> Iterator[Engine]:
    """Run an engine while the body runs, in an isolated run, with which all that it started ends."""
    use_own_places()
    run("ip", "netns", "add", NAMESPACE)
    made = Engine(FOLDER)
    try:
        made.run("ip", "link", "set", "lo", "up")
        made.run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        with _service(made), _health_checks(made):
            yield made
    finally:
        made.podman("rm", "--all", "--force", "--time", "0", is_checked=False)  # and their cgroups


@contextmanager
def _service(made: Engine) -> Iterator[None]:
    command = ("nsenter", f"--net=/run/netns/{NAMESPACE}", "podman", "system", "service", "--time=0")
    with (made.folder / "service.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"unix://{made.socket}"], env=made.environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while not made.socket.exists():
                if process.poll() is not None:
                    raise RuntimeError((made.folder / "service.log").read_text(errors="replace"))
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait()


@contextmanager
def _health_checks(made: Engine) -> Iterator[None]:
    """Run each container's health check every few seconds while the body runs."""
    is_over = threading.Event()

    def check() -> None:
        while not is_over.wait(CHECK_S):
            with suppress(subprocess.TimeoutExpired):
                for name in made.podman("ps", "--format", "{{.Names}}", is_checked=False).split():
                    made.podman("healthcheck", "run", name, timeout_s=30, is_checked=False)

    thread = threading.Thread(target=check)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def missing() -> str:
    """Return why containers cannot run here, empty if they can; install Debian's packages where they are missing."""
    if os.geteuid() != 0:
        return "needs root"
    if all(shutil.which(each) for each in ("podman", "buildah", "runc", "catatonit", "debootstrap", "iptables")):
        return ""
    if not shutil.which("apt-get"):
        return "needs podman, buildah, runc and debootstrap, and there is no apt-get to install them"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", "-qq")
    subprocess.run(
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES],
        env=environment,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return ""
