"""Checks of docker-compose.yml's profile cpu: a film, lost workers, commands of the runbook, drain, and trust."""

import hashlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

import yaml

from tests.containers.base_images import ROOT
from tests.containers.engine import NAMESPACE, Engine
from tests.containers.sessions import SPEECH_S
from tests.containers.single import CLIENT, check_status, until_healthy
from tests.containers.steps import step

# Speech that a drain of 30 s is enough for, on a busy machine too.
BRIEF_S = 3.6


def check_suite(made: Engine) -> None:
    """Start docker-compose.yml's profile cpu, stream through it, break it, and stop it."""
    try:
        with step("docker compose --profile cpu up"):
            compose(made, "up", "--detach", "--no-build", "--wait", "--wait-timeout", "300")
        with step("a film from outside") as notes:
            notes.append(make_film(made))
        with step("one of two replicas of a level killed under sessions") as notes:
            compose(made, "up", "--detach", "--no-build", "--wait", "--scale", "denoiser-1=2")
            notes.append(check_kill(made))
        with step("one worker again, under sessions") as notes:
            notes.append(check_restart(made))
        with step("compose commands of the runbook") as notes:
            notes.append(check_runbook(made))
        with step("SIGTERM to the gateway under sessions, then to all workers") as notes:
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
def streaming(speech_s: float = SPEECH_S) -> Iterator[subprocess.Popen[str]]:
    """Stream sessions from outside while the body runs, which begins when each has its first frame."""
    program = ("-m", "tests.containers.sessions", "127.0.0.1:7000", f"--speech={speech_s}")
    command = ("nsenter", f"--net=/run/netns/{NAMESPACE}", CLIENT, *program)
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
    """Kill a replica of a level that has sessions, which continue at the other one."""
    (gateway,), replicas = made.running("gateway"), made.running("denoiser-1")
    assert len(replicas) == 2, replicas
    before = metric(made, gateway, "avatar_stream_rebuilt_total")
    with streaming() as sessions:
        made.podman(
            "kill", "--signal=KILL", max(replicas, key=lambda each: metric(made, each, "avatar_session_active"))
        )
        result = outcome(sessions)
    rebuilt = metric(made, gateway, "avatar_stream_rebuilt_total") - before
    assert rebuilt >= 1, "no stream was rebuilt"
    return f"{result}, {rebuilt:.0f} streams rebuilt"


def metric(made: Engine, container: str, name: str) -> float:
    """Return the sum of a process's series of one name."""
    program = "from urllib.request import urlopen; print(urlopen('http://127.0.0.1:9464/metrics').read().decode())"
    served = made.podman("exec", container, "python", "-c", program)
    return sum(map(float, re.findall(rf"^{name}\{{.*\}} (\S+)$", served, re.MULTILINE)))


def check_restart(made: Engine) -> str:
    """Kill the only VAE worker, which restarts, under sessions that wait for it."""
    (worker,) = made.running("vae")
    with streaming() as sessions:
        started_s = time.monotonic()
        made.podman("kill", "--signal=KILL", worker)
        made.podman("start", worker, is_checked=False)  # as an engine's daemon does, by `restart: unless-stopped`
        until_healthy(made, worker)
        restarted_s = time.monotonic() - started_s
        return f"healthy again after {restarted_s:.1f} s; {outcome(sessions)}"


def check_runbook(made: Engine) -> str:
    """Type the runbook's compose commands that change nothing, and compare what they print with nothing."""
    page = (ROOT / "docs/operations/runbook.md").read_text(encoding="utf-8")
    section = page.split("\n## Looking at a running suite\n")[1].split("\n## Draining a cell\n")[0]
    export = re.search(r"^    (export .*)$", section, re.MULTILINE)
    assert export
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    others = {name for name, service in services.items() if "cpu" not in service["profiles"]}
    typed = {each.strip() for each in re.findall(r"docker compose [^`|\n]+", section)}
    harmless = sorted(each for each in typed if each.split()[2] in ("ps", "logs", "config", "exec"))
    # Without `top`, which this podman refuses to compose, the recipe of TLS, and services of other profiles.
    harmless = [each for each in harmless if "AVATAR_TLS" not in each and not others & {*each.split()}]
    assert len(harmless) > 15, harmless
    # As the plugin of docker's command, which is not among Debian's packages of podman.
    docker = made.folder / "programs/docker"
    docker.parent.mkdir()
    docker.write_text('#!/bin/sh\nshift\nexec docker-compose "$@"\n', encoding="utf-8")
    docker.chmod(0o755)
    path = f"PATH={docker.parent}:{os.environ['PATH']}"
    for command in harmless:
        script = f"{export[1]}; cd {ROOT}; {command.replace(' exec ', ' exec -T ')}"
        output = made.run("env", path, "sh", "-c", script)
        # A health check that succeeds prints nothing.
        assert output.strip() or "avatar.rpc.health" in command, f"{command} prints nothing"
    return f"{len(harmless)} commands"


def check_drain(made: Engine) -> str:
    """Stop the gateway, which lets its sessions end; start it again, so that they can be deleted."""
    (gateway,) = made.running("gateway")
    with streaming(BRIEF_S) as sessions:
        compose(made, "stop", "gateway")
        check_status(made, gateway)
        compose(made, "start", "gateway")
        result = outcome(sessions)
    workers = [name for stage in ("audio", "denoiser", "vae") for name in made.running(stage)]
    made.podman("stop", "--time=40", *workers)
    for worker in workers:
        check_status(made, worker)
    return f"{result}; {len(workers)} workers ended with status 0"


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
