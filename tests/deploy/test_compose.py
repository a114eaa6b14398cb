"""docker-compose.yml matches the code: variables are settings, addresses are services, two ports are published."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from avatar.settings import DenoiserSettings, load
from docs.tables import SERVICES
from tests.deploy.test_images import STAGES

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "docs/operations/runbook.md").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
TRUST: dict[str, Any] = yaml.safe_load((ROOT / "deploy/compose.trust.yaml").read_text(encoding="utf-8"))
ALL: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in ALL.items() if "build" in service}
DEVICES = {"gpu-1": 1, "gpu-2": 2, "gpu-4": 4, "gpu-5": 5}
RUNNING = ["cpu", *DEVICES]
# Levels by profile: the embedded default's, and the public 14B network's.
LEVELS = {"cpu": 2, **dict.fromkeys(DEVICES, 4)}


def of(profile: str) -> dict[str, dict[str, Any]]:
    return {name: service for name, service in ALL.items() if profile in service["profiles"]}


def given(service: dict[str, Any]) -> dict[str, str]:
    """Return a service's environment with every variable at its default."""
    return {
        name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value)) for name, value in service.get("environment", {}).items()
    }


def served_by(service: dict[str, Any]) -> set[str]:
    """Return the names of the services that a container runs."""
    command = " ".join(service.get("command", [])) or STAGES[service["build"]["target"]]
    found = re.search(r"services\.(\w+)(.*)", command)
    assert found
    return set(found[2].replace(",", " ").split()) if found[1] == "device" else {found[1]}


def gateway_of(profile: str) -> dict[str, Any]:
    (found,) = (service for service in of(profile).values() if service.get("build", {}).get("target") == "gateway")
    return found


def levels_of(service: dict[str, Any]) -> set[int]:
    """Return the levels of a container that has a denoiser."""
    levels = given(service).get("AVATAR_LEVELS", "") if "denoiser" in served_by(service) else ""
    return set(range(4)) if levels == "all" else {int(each) for each in levels.split(",") if each}


def names(profile: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every network name of the suite's containers, with the container."""
    for name, service in of(profile).items():
        aliases = service.get("networks", {}).get("default", {}).get("aliases", [])
        yield from ((each, service) for each in (name, *aliases) if name in OURS)


def test_cpu_has_the_embedded_defaults_levels() -> None:
    config = json.loads((ROOT / "models/tiny/denoiser/config.json").read_text(encoding="utf-8"))
    assert len(config["schedule"]) - 1 == LEVELS["cpu"]


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_of_its_service(name: str) -> None:
    environment = {key: value for key, value in given(OURS[name]).items() if key.startswith("AVATAR_")}
    classes = [SERVICES[each] for each in served_by(OURS[name])]
    known = {field for cls in classes for field in cls.model_fields}
    assert {key.removeprefix("AVATAR_").lower() for key in environment} <= known
    for cls in classes:
        assert load(cls, environment).drain_s < float(OURS[name]["stop_grace_period"].removesuffix("s"))


@pytest.mark.parametrize("profile", RUNNING)
def test_the_gateway_finds_every_stage(profile: str) -> None:
    found = dict(names(profile))
    environment = given(gateway_of(profile))
    assert "audio" in served_by(found[environment["AVATAR_AUDIO"].removesuffix(":7000")])
    assert "vae" in served_by(found[environment["AVATAR_VAE"].removesuffix(":7000")])
    denoisers = [found[address.removesuffix(":7000")] for address in environment["AVATAR_DENOISERS"].split(",")]
    levels = [level for denoiser in denoisers for level in sorted(levels_of(denoiser))]
    assert levels == list(range(LEVELS[profile])), "each once, and no address has none"


@pytest.mark.parametrize("variable", [f"AVATAR_{name}" for name in ("SIZES", "COMPILE", "FLOAT8", "KV_DTYPE")])
@pytest.mark.parametrize("profile", DEVICES)
def test_variables_replace_the_settings_of_denoisers(profile: str, variable: str) -> None:
    ours = [service for name, service in of(profile).items() if name in OURS]
    values = [str(service["environment"].get(variable, "")) for service in ours if levels_of(service)]
    assert values
    assert all(value.startswith(f"${{{variable}:-") for value in values)
    assert f"`{variable}`" in (ROOT / "docs/operations/deployment.md").read_text(encoding="utf-8")


def test_one_device_can_run_fewer_levels_by_a_variable() -> None:
    (device,) = (each for name, each in of("gpu-1").items() if name in OURS and levels_of(each))
    assert device["environment"]["AVATAR_SCHEDULE"] == "${AVATAR_SCHEDULE:-}"
    assert load(DenoiserSettings, given(device)).schedule is None
    assert load(DenoiserSettings, {**given(device), "AVATAR_SCHEDULE": "2"}).served_levels(2) == [0, 1]


def test_workers_can_have_replicas() -> None:
    for name in (name for name in OURS if served_by(OURS[name]) != {"gateway"}):
        assert OURS[name].keys() & {"container_name", "hostname", "ports"} == set(), name
        for network in OURS[name].get("networks", {}).values():
            assert network.keys() <= {"aliases"}, "an address of its own is of one replica"


@pytest.mark.parametrize("profile", RUNNING)
def test_the_gateway_starts_after_its_dependencies(profile: str) -> None:
    gateway = gateway_of(profile)
    needs = {name for name, how in gateway["depends_on"].items() if how["condition"] == "service_healthy"}
    assert {name for name, service in of(profile).items() if service is not gateway} <= needs
    for name in (name for name in OURS if served_by(OURS[name]) != {"gateway"}):
        assert OURS[name]["depends_on"] == {"redis": {"condition": "service_healthy"}}


@pytest.mark.parametrize("profile", DEVICES)
def test_a_device_has_one_process_and_the_decoders_has_the_audio_encoder(profile: str) -> None:
    processes: dict[str, dict[str, Any]] = {}
    for service in of(profile).values():
        for reservation in service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", []):
            (device,) = reservation["device_ids"]
            assert processes.setdefault(device, service) is service
    assert sorted(processes) == [str(device) for device in range(DEVICES[profile])]
    placed = {service: device for device, process in processes.items() for service in served_by(process)}
    assert placed["audio"] == placed["vae"] == str(DEVICES[profile] - 1)
    counts = [len(levels_of(processes[device])) for device in sorted(processes)]
    assert counts == {1: [4], 2: [2, 2], 4: [1, 1, 1, 1], 5: [1, 1, 1, 1, 0]}[DEVICES[profile]]


def test_compiled_kernels_are_kept_where_they_can_be_executed() -> None:
    folders = re.findall(r"(?:TORCHINDUCTOR|TRITON)_CACHE_DIR=(\S+)", STAGES["worker-cuda"])
    assert len(folders) == 2
    for service in (each for each in OURS.values() if each["build"]["target"] == "worker-cuda"):
        mounted = dict(volume.split(":")[:2][::-1] for volume in service["volumes"])
        assert {mounted[str(Path(folder).parent)] for folder in folders} == {"compiled"}
    assert COMPOSE["volumes"].keys() >= {"compiled"}
    assert "g++" in STAGES["worker-cuda"]


def test_only_the_gateway_and_the_dashboards_are_published() -> None:
    published = {name: service["ports"] for name, service in ALL.items() if "ports" in service}
    assert published == {
        **{name: ["${AVATAR_PORT:-7000}:7000"] for name in OURS if served_by(OURS[name]) == {"gateway"}},
        "grafana": ["127.0.0.1:${AVATAR_GRAFANA_PORT:-3000}:3000"],
    }


@pytest.mark.parametrize("name", ALL)
def test_a_container_has_minimal_privileges(name: str) -> None:
    service = ALL[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert ":latest" not in service["image"]
    assert ":" in service["image"]


def test_every_dependency_has_a_health_check() -> None:
    asked = {name for name, service in ALL.items() if "healthcheck" in service}
    assert "HEALTHCHECK" in STAGES["runtime"]
    assert set(ALL) - set(OURS) - asked == {"collector", "jaeger"}, "nobody waits for these"


@pytest.mark.parametrize("name", OURS)
def test_the_dockerfile_builds_every_image(name: str) -> None:
    target = OURS[name]["build"]["target"]
    assert STAGES[target].startswith("runtime AS")
    assert OURS[name]["image"].partition(":")[0] == f"avatar/{target}"
    with (ROOT / "pyproject.toml").open(encoding="utf-8") as file:
        assert f'version = "{OURS[name]["image"].partition(":")[2]}"' in file.read()


def test_no_registry_is_asked_for_our_images() -> None:
    assert {name: service["pull_policy"] for name, service in OURS.items()} == dict.fromkeys(OURS, "build")


def test_gateways_wait_for_weights_of_devices() -> None:
    waits = {profile: given(gateway_of(profile)).get("AVATAR_REBUILD_S") for profile in RUNNING}
    assert waits == {"cpu": None, **dict.fromkeys(DEVICES, "300")}


def test_redis_refuses_before_it_is_killed() -> None:
    redis = ALL["redis"]
    options = dict(zip(redis["command"][1::2], redis["command"][2::2], strict=True))
    assert options["--maxmemory-policy"] == "noeviction"
    assert int(options["--maxmemory"].removesuffix("gb")) < int(redis["mem_limit"].removesuffix("g"))


def test_mounted_files_exist() -> None:
    volumes = [volume for service in ALL.values() for volume in service.get("volumes", [])]
    folders = {volume.partition(":")[0] for volume in volumes if volume.startswith(".")}
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


def test_trust_covers_every_service_of_the_suite() -> None:
    assert set(TRUST["services"]) == set(OURS)
    for name, service in TRUST["services"].items():
        services = served_by(OURS[name])
        fields = {field for each in services for field in SERVICES[each].model_fields}
        assert {variable.removeprefix("AVATAR_").lower() for variable in service["environment"]} <= fields
        (mounted,) = service["volumes"]
        assert mounted.endswith(":/secrets:ro")
        assert {str(Path(file).parent) for file in service["environment"].values()} == {"/secrets"}
        assert ("AVATAR_TLS_CLIENT_CA" in service["environment"]) is (services != {"gateway"})


def test_compose_accepts_trust(tmp_path: Path) -> None:
    compose = Path(sys.executable).with_name("docker-compose")
    files = ("-f", "docker-compose.yml", "-f", "deploy/compose.trust.yaml", "--profile", "cpu")
    environment = {**os.environ, "AVATAR_SECRETS": str(tmp_path)}
    done = subprocess.run(
        [compose, *files, "config", "--quiet"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("profiles", ["cpu", "gpu-1", "gpu-2", "gpu-4", "gpu-5,text", "cpu,voice", "cpu,observability"])
def test_compose_accepts_every_profile(profiles: str) -> None:
    compose = Path(sys.executable).with_name("docker-compose")
    arguments = [part for each in profiles.split(",") for part in ("--profile", each)]
    done = subprocess.run([compose, *arguments, "config", "--quiet"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_runbook_names_the_service_of_each_stage_in_every_profile() -> None:
    table = RUNBOOK.split("<!-- services: ")[1].partition("<!-- end -->")[0]
    heading, _, *rows = [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith("| ")]
    stages: dict[str, tuple[str, int | None]] = {"gateway": ("gateway", None), "audio": ("audio", None)}
    stages |= {f"level {level}": ("denoiser", level) for level in range(max(LEVELS.values()))}
    stages |= {"decoder": ("vae", None)}
    expected = [[stage, *(named(profile, *which) for profile in RUNNING)] for stage, which in stages.items()]
    assert heading == ["stage", *(f"`{profile}`" for profile in RUNNING)]
    assert rows == expected


def named(profile: str, service: str, level: int | None) -> str:
    """Return the table's cell for the container of a profile that runs a service, and the level if one is given."""
    found = [each for each in of(profile) if serves(each, service, level)]
    if level is not None and level >= LEVELS[profile]:
        assert found == []
        return "none"
    (name,) = found
    return f"`{name}`"


def serves(name: str, service: str, level: int | None) -> bool:
    """Return whether a container runs a service, and the level if one is given."""
    container = OURS.get(name)
    if container is None or service not in served_by(container):
        return False
    return level is None or level in levels_of(container)


def test_compose_commands_of_the_runbook_find_the_services() -> None:
    commands = re.findall(r"docker compose [^`|\n]+", RUNBOOK)
    assert len(commands) > 20
    assert [command for command in commands if "--profile" in command] == [], "the profile is exported, once"
    section = RUNBOOK.split("## Looking at a running suite")[1]
    name, value = re.findall(r"^    export (\w+)=(\w+)$", section.partition("docker compose")[0], re.MULTILINE)[0]
    compose = Path(sys.executable).with_name("docker-compose")
    environment = {**os.environ, name: value}
    found = subprocess.run([compose, "config", "--services"], cwd=ROOT, env=environment, capture_output=True, text=True)
    services = set(found.stdout.split())
    assert services == {"redis", *of("cpu")}
    named = {
        match[1] for each in commands if (match := re.match(r"docker compose (?:exec|restart|config) (\S+)", each))
    }
    named |= set(re.findall(r"(?:--scale |avatar\.rpc\.health )([a-z][\w-]*)[=:]", RUNBOOK))
    assert named >= {"redis", "gateway", "vae", "denoiser-1"}
    assert named <= services
