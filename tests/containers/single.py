"""Checks of containers that run by themselves, beside Redis: start, health check, size, files and stop."""

import json
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.containers.base_images import ROOT
from tests.containers.engine import Engine

# A process that serves nobody ends within this time after SIGTERM.
STOP_S = 2.0
PROBE_CPU_MS = 30
CLIENT = Path(sys.executable)
# Exit statuses of a process that starts: SIGTERM ends it before it handles the signal, in order afterwards.
EITHER = ("143", "0")


def redis_image() -> str:
    """Return the name that docker-compose.yml has for Redis's image."""
    file = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    return str(file["services"]["redis"]["image"])


def check_image(made: Engine, target: str, most_mb: float, mounts: Collection[Path]) -> str:
    """Compare an image's size with a limit, and its files with the mounts of its build, which leave none."""
    size_mb = made.size_mb(f"avatar/{target}:0.1.0")
    assert size_mb <= most_mb, f"the image has {size_mb:.0f} MB, at most {most_mb} are allowed"
    program = "import os, sys; print(*filter(os.path.lexists, sys.argv[1:]))"
    command = ("run", "--rm", "--network=none", "--entrypoint=python")
    found, base = (
        made.podman(*command, image, "-c", program, *map(str, mounts)).split()
        for image in (f"avatar/{target}:0.1.0", made.base_image)
    )
    assert found == base, f"the build left {sorted({*found} - {*base})} in the image"
    return f"{size_mb:.0f} of {most_mb} MB"


@contextmanager
def alone(made: Engine, target: str, *command: str, **settings: str) -> Iterator[str]:
    """Run a container beside Redis while the body runs; yield its name once it is healthy.

    target: of the Dockerfile. command: in place of the image's own. settings: by name without AVATAR_.
    """
    given = {"REDIS_URL": "redis://redis:6379", **settings}
    variables = [f"--env=AVATAR_{name}={value}" for name, value in given.items()]
    hardened = ("--read-only", "--tmpfs=/tmp", "--cap-drop=all", "--publish=7000:7000")
    start = ("run", "--detach", "--network=alone", f"--name={target}", *hardened, *variables)
    with redis_alone(made):
        try:
            made.podman(*start, f"avatar/{target}:0.1.0", *command)
            until_healthy(made, target)
            yield target
        finally:
            made.podman("rm", "--force", "--time=0", target, is_checked=False)


@contextmanager
def redis_alone(made: Engine) -> Iterator[None]:
    """Run Redis in the network `alone` while the body runs."""
    made.podman("run", "--detach", "--network=alone", "--name=redis", "--user=999:1000", redis_image(), "valkey-server")
    try:
        yield
    finally:
        made.podman("rm", "--force", "--time=0", "redis", is_checked=False)


def check_gateway(made: Engine) -> str:
    """Call the gateway, measure its health check, and stop it."""
    workers = {"AUDIO": "audio:7000", "DENOISERS": "denoiser:7000", "VAE": "vae:7000"}
    with alone(made, "gateway", **workers) as gateway:
        answer = made.run(CLIENT, "-c", CALL).strip()
        assert answer == "audio: no worker answers at audio:7000", answer
        cpu_ms = health_check_cpu_ms(made, gateway)
        assert cpu_ms <= PROBE_CPU_MS, f"a health check took {cpu_ms:.0f} CPU-ms, at most {PROBE_CPU_MS} are allowed"
        seconds = stop(made, gateway)
    return f"answers {answer!r}; health check {cpu_ms:.0f} CPU-ms; stopped in {seconds:.1f} s"


# A gateway without workers answers this call by an error of its own.
CALL = """
import grpc
from avatar.v1 import avatar_service_pb2 as pb, avatar_service_pb2_grpc as services
with grpc.insecure_channel("127.0.0.1:7000") as channel:
    try:
        services.AvatarServiceStub(channel).GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)
    except grpc.RpcError as error:
        print(error.details())
"""


def check_voice(made: Engine) -> str:
    """Stop a voice worker, whose endpoint is asked only when something is to be spoken."""
    with alone(made, "voice", VOICE_URL="http://127.0.0.1:1/v1") as voice:
        return f"healthy; stopped in {stop(made, voice):.1f} s"


def check_stops(made: Engine) -> str:
    """Stop workers at several moments of their start, and one that serves."""
    early_s = []
    for after_s in (0.2, 1.0, 2.0, 4.0):
        made.podman("run", "--detach", "--name=early", "avatar/worker-cpu:0.1.0", "python", "-m", "services.denoiser")
        time.sleep(after_s)
        early_s.append(stop(made, "early", EITHER))
        made.podman("rm", "--force", "--time=0", "early")
    with alone(made, "worker-cpu", "python", "-m", "services.denoiser") as worker:
        healthy_s = stop(made, worker)
    return f"ended within {max(early_s):.1f} s while it starts, {healthy_s:.1f} s once it serves"


def until_healthy(made: Engine, name: str, within_s: float = 300) -> None:
    """Wait until a container is healthy."""
    ends_s = time.monotonic() + within_s
    while (status := made.podman("inspect", "--format", "{{.State.Healthcheck.Status}}", name)) != "healthy":
        if time.monotonic() > ends_s or made.podman("inspect", "--format", "{{.State.Running}}", name) != "true":
            raise RuntimeError(f"{name} is {status}:\n{made.podman('logs', name)}")
        time.sleep(0.5)


def health_check_cpu_ms(made: Engine, name: str, runs: int = 5) -> float:
    """Return the least CPU time of a health check inside a container, in milliseconds."""
    script = (
        "import resource as r, subprocess, sys\n"
        f"for _ in range({runs}):\n"
        "    before = r.getrusage(r.RUSAGE_CHILDREN)\n"
        "    subprocess.run(sys.argv[1:], check=True)\n"
        "    after = r.getrusage(r.RUSAGE_CHILDREN)\n"
        "    print((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000)\n"
    )
    kind, *check = json.loads(made.podman("inspect", "--format", "{{json .Config.Healthcheck.Test}}", name))
    assert kind == "CMD", kind
    return min(map(float, made.podman("exec", name, "python", "-c", script, *check).split()))


def stop(made: Engine, name: str, statuses: tuple[str, ...] = ("0",)) -> float:
    """Stop a container by SIGTERM and return the seconds that it took.

    AssertionError if it takes more than STOP_S, or ends with another status.
    """
    pid, started_s = made.podman("inspect", "--format", "{{.State.Pid}}", name), time.monotonic()
    made.podman("kill", "--signal=TERM", name)
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() - started_s > STOP_S:
            raise AssertionError(f"{name} still runs {STOP_S:g} s after SIGTERM:\n{made.podman('logs', name)}")
        time.sleep(0.02)
    stopped_s = time.monotonic() - started_s
    check_status(made, name, statuses)
    return stopped_s


def check_status(made: Engine, name: str, expected: tuple[str, ...] = ("0",)) -> None:
    """Compare the exit status of a container that is stopped with those expected."""
    made.podman("wait", name)
    status = made.podman("inspect", "--format={{.State.ExitCode}}", name)
    assert status in expected, (
        f"{name} ended with {status}, expected {' or '.join(expected)}:\n{made.podman('logs', name)}"
    )
