"""Build the images and run them: `make test-containers`, or `make test-containers FULL=1` for all images and a film.

Prints one line a step. Where the machine can't run containers, which takes root and Debian's packages, all is SKIPPED
with the reason and the status is 0; where it can, the first step that fails ends it with status 1. Afterwards nothing
is left but Debian's packages.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

import yaml

from tests.containers.base_images import ROOT, make_python_image, make_redis_image, pip_mounts
from tests.containers.engine import NAMESPACE, Engine, engine, missing
from tests.deploy.test_kubernetes import objects

GATEWAY_MB, WORKER_MB = 250, 1500
# A process that serves nobody ends within this time after SIGTERM.
STOP_S = 2.0
PROBE_CPU_MS = 30
CLIENT = Path(sys.executable)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="all images, compose and a film")
    flags = parser.parse_args()
    if reason := missing():
        print(f"SKIPPED: {reason}")
        return
    # A checkout of a careful user: whatever the image's user reads must be made readable by the Dockerfile.
    os.umask(0o077)
    with engine() as made:
        mounts = pip_mounts(made)
        with step("Python and Valkey images"):
            make_python_image(made)
            make_redis_image(made, compose_file()["services"]["redis"]["image"])
        with step("gateway image") as notes:
            made.build("gateway", mounts, ROOT)
            notes.append(check_size(made, "gateway", GATEWAY_MB))
        with step("gateway alone") as notes:
            notes.append(check_gateway(made))
        if flags.full:
            with step("CPU worker image") as notes:
                made.build("worker-cpu", mounts, ROOT)
                notes.append(check_size(made, "worker-cpu", WORKER_MB))
            check_suite(made)
            with step("the VAE's pod of Kubernetes, by podman kube play") as notes:
                notes.append(check_pod(made))


def compose_file() -> dict[str, dict[str, dict[str, str]]]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@contextmanager
def step(name: str) -> Iterator[list[str]]:
    """Print a line with the body's time and notes; end the program if it fails."""
    started_s, notes = time.monotonic(), list[str]()
    try:
        yield notes
    except (RuntimeError, AssertionError, subprocess.TimeoutExpired) as error:
        print(f"FAILED   {name}: {error}")
        sys.exit(1)
    print(f"{time.monotonic() - started_s:7.1f} s  {name}" + "".join(f"; {each}" for each in notes), flush=True)


def check_size(made: Engine, target: str, most_mb: float) -> str:
    size_mb = made.size_mb(f"avatar/{target}:0.1.0")
    assert size_mb <= most_mb, f"the image has {size_mb:.0f} MB, at most {most_mb} are allowed"
    return f"{size_mb:.0f} of {most_mb} MB"


def check_gateway(made: Engine) -> str:
    """Start the gateway's container beside Redis, call it, measure its health check, and stop it."""
    redis = compose_file()["services"]["redis"]["image"]
    made.podman("network", "create", "alone")
    made.podman("run", "--detach", "--network=alone", "--name=redis", "--user=999:1000", redis, "valkey-server")
    given = {"REDIS_URL": "redis://redis:6379", "AUDIO": "audio:7000", "DENOISERS": "denoiser:7000", "VAE": "vae:7000"}
    variables = [f"--env=AVATAR_{name}={value}" for name, value in given.items()]
    hardened = ("--read-only", "--tmpfs=/tmp", "--cap-drop=all", "--publish=7000:7000")
    made.podman("run", "--detach", "--network=alone", "--name=gateway", *hardened, *variables, "avatar/gateway:0.1.0")
    until_healthy(made, "gateway")
    answer = made.run(CLIENT, "-c", CALL).strip()
    assert answer == "audio: no worker answers at audio:7000", answer
    cpu_ms = health_check_cpu_ms(made, "gateway")
    assert cpu_ms <= PROBE_CPU_MS, f"a health check took {cpu_ms:.0f} CPU-ms, at most {PROBE_CPU_MS} are allowed"
    seconds = stop(made, "gateway", STOP_S)
    made.podman("rm", "--force", "--time=0", "redis", "gateway")
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


def check_suite(made: Engine) -> None:
    """Start docker-compose.yml's profile cpu, stream through it, break it, and stop it."""
    try:
        with step("docker compose --profile cpu up"):
            compose(made, "up", "--detach", "--no-build", "--wait", "--wait-timeout", "300")
        with step("a film from outside") as notes:
            notes.append(make_film(made))
        with step("one of two replicas of a level killed under sessions") as notes:
            compose(made, "up", "--detach", "--no-build", "--wait", "--scale", "denoiser-2=2")
            notes.append(check_kill(made))
        with step("one worker again, under sessions") as notes:
            notes.append(check_restart(made))
        with step("SIGTERM to a worker that loads its weights") as notes:
            notes.append(check_early_stop(made))
        with step("SIGTERM to the gateway under sessions") as notes:
            notes.append(check_drain(made))
        compose(made, "down", "--volumes", "--timeout", "5")
        with step("tenants, and TLS between all") as notes:
            notes.append(check_trust(made))
    finally:
        compose(made, "down", "--volumes", "--timeout", "5", is_checked=False)


def compose(made: Engine, *arguments: str, secrets: Path | None = None, is_checked: bool = True) -> str:
    """Run docker-compose on docker-compose.yml's profile cpu and return its output. RuntimeError has the logs, too.

    secrets: folder of tenants and certificates, for deploy/compose.trust.yaml.
    """
    files = ["docker-compose.yml", *(["deploy/compose.trust.yaml"] if secrets else [])]
    variables = {"AVATAR_SECRETS": str(secrets)} if secrets else {}
    names = [f"--file={ROOT / name}" for name in files]
    command = ("docker-compose", f"--project-directory={ROOT}", *names, "--profile=cpu")
    try:
        return made.run(*command, *arguments, is_checked=is_checked, variables=variables)
    except RuntimeError as error:
        raise RuntimeError(f"{error}\n{made.run(*command, 'logs', '--no-color', '--tail=20')}") from error


def make_film(made: Engine, *options: str) -> str:
    """Stream the shipped clip from outside, with the example; return its number and size of frames."""
    film = made.folder / "film.mp4"
    files = (ROOT / "assets/speech.wav", ROOT / "assets/portrait.png", film)
    output = made.run(CLIENT, ROOT / "examples/wav_to_mp4.py", *files, *options)
    assert film.stat().st_size > 10_000
    film.unlink()
    return output.strip().rpartition(": ")[2]


@contextmanager
def streaming() -> Iterator[subprocess.Popen[str]]:
    """Stream sessions from outside while the body runs, which begins when each has its first frame."""
    command = ("nsenter", f"--net=/run/netns/{NAMESPACE}", CLIENT, "-m", "tests.containers.sessions", "127.0.0.1:7000")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    try:
        lines = []
        while (line := process.stdout.readline()) != "streaming\n":
            lines.append(line)
            if not line:
                raise RuntimeError(f"the sessions ended with {process.wait()}: {''.join(lines)}")
        yield process
    finally:
        process.kill()
        process.wait()


def outcome(process: subprocess.Popen[str]) -> str:
    """Return the line that sessions print at their end. AssertionError if one lost a frame."""
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output.strip()


def check_kill(made: Engine) -> str:
    replicas = made.podman("ps", "--format={{.Names}}", "--filter=name=denoiser-2").split()
    assert len(replicas) == 2, replicas
    with streaming() as sessions:
        made.podman("kill", "--signal=KILL", replicas[0])
        return outcome(sessions)


def check_restart(made: Engine) -> str:
    """Kill the only VAE worker, which restarts, under sessions that wait for it."""
    (worker,) = made.podman("ps", "--format={{.Names}}", "--filter=name=vae").split()
    with streaming() as sessions:
        started_s = time.monotonic()
        made.podman("kill", "--signal=KILL", worker)
        made.podman("start", worker, is_checked=False)  # as an engine's daemon does, by `restart: unless-stopped`
        until_healthy(made, worker)
        restarted_s = time.monotonic() - started_s
        return f"healthy again after {restarted_s:.1f} s; {outcome(sessions)}"


def check_trust(made: Engine) -> str:
    """Follow the recipe of docs/operations/security.md, start compose with its result, and stream with a token."""
    page = (ROOT / "docs/operations/security.md").read_text(encoding="utf-8")
    (recipe,) = [block.partition("```")[0] for block in page.split("```bash\n")[1:] if "openssl req" in block]
    folder, token = made.folder / "trust", token_hex(32)
    folder.mkdir()
    subprocess.run(["bash", "-euc", recipe], cwd=folder, check=True, capture_output=True)
    tenants = f'[acme]\ntokens = ["{hashlib.sha256(token.encode()).hexdigest()}"]\nmax_sessions = 1\n'
    (folder / "secrets/tenants.toml").write_text(tenants, encoding="utf-8")
    compose(made, "up", "--detach", "--no-build", "--wait", "--wait-timeout", "300", secrets=folder / "secrets")
    secured = (f"--tls={folder / 'secrets/ca.crt'}", "--target=localhost:7000")
    film = make_film(made, *secured, f"--token={token}")
    with suppress(RuntimeError):
        make_film(made, *secured, "--token=another")
        raise AssertionError("another token was accepted")
    return film


def check_pod(made: Engine) -> str:
    """Start the VAE's Deployment and its ConfigMap as podman can, and ask the process for its health."""
    found = [*objects("cpu", "ConfigMap").values(), objects("cpu", "Deployment")["vae"]]
    for container in found[-1]["spec"]["template"]["spec"]["containers"]:
        container |= {"image": "docker.io/avatar/worker-cpu:0.1.0", "imagePullPolicy": "Never"}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            del container[probe]  # this podman has none by gRPC
    manifest = made.folder / "vae.yaml"
    manifest.write_text(yaml.safe_dump_all(found), encoding="utf-8")
    started_s = time.monotonic()
    made.podman("kube", "play", "--network=alone", str(manifest))
    try:
        (name,) = made.podman("ps", "--format={{.Names}}", "--filter=name=vae.*service").split()
        while made.podman("exec", name, "python", "-m", "avatar.rpc.health", "127.0.0.1:7000", is_checked=False):
            assert time.monotonic() - started_s < 120, made.podman("logs", name)
            time.sleep(1)
        return f"healthy after {time.monotonic() - started_s:.0f} s"
    finally:
        made.podman("kube", "down", str(manifest), is_checked=False)


def check_early_stop(made: Engine) -> str:
    """Stop workers at several moments of their start."""
    taken_s = []
    for after_s in (0.2, 1.0, 2.0, 4.0):
        made.podman("run", "--detach", "--name=early", "avatar/worker-cpu:0.1.0", "python", "-m", "services.denoiser")
        time.sleep(after_s)
        taken_s.append(stop(made, "early", STOP_S))
        made.podman("rm", "--force", "--time=0", "early")
    return f"ended within {max(taken_s):.1f} s"


def check_drain(made: Engine) -> str:
    """Stop the gateway, which lets its sessions end; start it again, so that they can be deleted."""
    (gateway,) = made.podman("ps", "--format={{.Names}}", "--filter=name=gateway").split()
    with streaming() as sessions:
        compose(made, "stop", "gateway")
        status = made.podman("inspect", "--format={{.State.ExitCode}}", gateway)
        assert status == "0", f"the gateway ended with {status}"
        compose(made, "start", "gateway")
        return outcome(sessions)


def until_healthy(made: Engine, name: str, within_s: float = 60) -> None:
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


def stop(made: Engine, name: str, within_s: float) -> float:
    """Stop a container by SIGTERM and return the seconds that it took. AssertionError if it takes longer."""
    pid, started_s = made.podman("inspect", "--format", "{{.State.Pid}}", name), time.monotonic()
    made.podman("kill", "--signal=TERM", name)
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() - started_s > within_s:
            raise AssertionError(f"{name} still runs {within_s:g} s after SIGTERM:\n{made.podman('logs', name)}")
        time.sleep(0.02)
    return time.monotonic() - started_s


if __name__ == "__main__":
    main()
