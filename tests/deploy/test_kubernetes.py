"""The manifests, rendered by kustomize, are valid, use existing settings, and connect to each other."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from avatar.settings import GatewaySettings, load
from docs.tables import SERVICES
from tests.deploy.test_compose import COMPOSE, LEVELS, given, of
from tests.deploy.test_images import DOCKERFILE

OVERLAYS = Path(__file__).parents[2] / "deploy/kubernetes/overlays"
BIN = Path(sys.executable).parent
# Of the overlay cpu; the others have processes with a device.
STAGES = {"gateway", "audio", *(f"denoiser-{level}" for level in range(LEVELS["cpu"])), "vae"}
# Processes with a device by overlay, and the levels of each; the last one has decoder and audio.
DEVICES = {
    "gpu-1": {"vae": "all"},
    "gpu-2": {"denoiser-0": "0,1", "vae": "2,3"},
    "gpu-4": {"denoiser-0": "0", "denoiser-1": "1", "denoiser-2": "2", "vae": "3"},
    "gpu-5": {"denoiser-0": "0", "denoiser-1": "1", "denoiser-2": "2", "denoiser-3": "3", "vae": ""},
}
SUITES = ["cpu", *DEVICES]
UNKNOWN = {"LeaderWorkerSet", "ScaledObject"}  # of which no schema is at hand
GUIDE = (Path(__file__).parents[2] / "docs/operations/deployment.md").read_text(encoding="utf-8")
# Loading the 14B network's weights at 200 MB/s, and merging a LoRA adapter on the CPU.
LOAD_S = 32.59e9 / 200e6 + 60


@functools.cache
def rendered(overlay: str) -> str:
    done = subprocess.run([BIN / "kubectl", "kustomize", OVERLAYS / overlay], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), "rendered without a warning"
    return done.stdout


@functools.cache
def objects(overlay: str, kind: str) -> dict[str, Any]:
    """Return the objects of a kind by name."""
    return {each["metadata"]["name"]: each for each in manifests(overlay) if each["kind"] == kind}


@functools.cache
def manifests(overlay: str) -> list[Any]:
    return list(yaml.load_all(rendered(overlay), yaml.CSafeLoader))


def stages(overlay: str) -> dict[str, Any]:
    """Return the deployments of the suite's own services."""
    return {
        name: each for name, each in objects(overlay, "Deployment").items() if "stage" in each["metadata"]["labels"]
    }


def pod(deployment: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return found


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod(deployment)["containers"]
    assert isinstance(found, dict)
    return found


def environment(overlay: str, deployment: dict[str, Any]) -> dict[str, str]:
    """Return a pod's settings: those of its ConfigMaps, then its own variables."""
    maps, found = objects(overlay, "ConfigMap"), {}
    for source in container(deployment)["envFrom"]:
        if not source["configMapRef"].get("optional"):
            found.update(maps[source["configMapRef"]["name"]]["data"])
    return found | {each["name"]: each["value"] for each in container(deployment).get("env", [])}


def settings_of(variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith("AVATAR_")}


def test_every_object_matches_kubernetes_schema(tmp_path: Path) -> None:
    """Overlays share most of their objects."""
    distinct = {each for path in OVERLAYS.iterdir() for each in rendered(path.name).split("\n---\n")}
    assert_valid("\n---\n".join(sorted(distinct)), tmp_path)


def assert_valid(text: str, folder: Path) -> None:
    """Check manifests against Kubernetes' schemas. folder: of a temporary file."""
    file = folder / "all.yaml"
    file.write_text(text, encoding="utf-8")
    done = subprocess.run([BIN / "kubernetes-validate", "--strict", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    without_schema = set(re.findall(r"find schema for kind (\w+)", done.stdout + done.stderr))
    assert without_schema <= UNKNOWN


@pytest.mark.parametrize("overlay", SUITES)
def test_each_stage_and_level_has_a_service_of_its_name(overlay: str) -> None:
    deployments, services, budgets = (
        stages(overlay),
        objects(overlay, "Service"),
        objects(overlay, "PodDisruptionBudget"),
    )
    assert set(deployments) == ({"gateway", "text", *DEVICES[overlay]} if overlay in DEVICES else STAGES)
    assert {name for name in services if "stage" in services[name]["metadata"]["labels"]} == set(deployments)
    for name, deployment in deployments.items():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert services[name]["spec"]["clusterIP"] == "None"
        for selector in (services[name]["spec"]["selector"], budgets[name]["spec"]["selector"]["matchLabels"]):
            alike = [each for each, other in deployments.items() if selector.items() <= labels_of(other).items()]
            assert alike == [name]
            assert selector.items() <= labels.items()


def chain() -> dict[str, Any]:
    """Return the pod spec of the LeaderWorkerSet, where a Deployment would have it."""
    spec = objects("chain", "LeaderWorkerSet")["chain"]["spec"]["leaderWorkerTemplate"]
    return {"spec": {"template": spec["workerTemplate"]}, "size": spec["size"], "restarts": spec["restartPolicy"]}


def test_pods_of_a_chain_are_the_levels_pods_and_connect_at_level_0(tmp_path: Path) -> None:
    set_of_pods, of_levels = chain(), stages("gpu-5")
    given = environment("chain", set_of_pods)
    assert given.pop("AVATAR_CHAIN").startswith("$(LWS_LEADER_ADDRESS):")
    assert given.pop("AVATAR_LEVELS") == "$(LWS_WORKER_INDEX)"
    for level in range(set_of_pods["size"]):
        name = f"denoiser-{level}"
        assert environment("gpu-5", of_levels.pop(name)) == given | {"AVATAR_LEVELS": str(level)}
        assert load(SERVICES["denoiser"], given | {"AVATAR_LEVELS": str(level), "AVATAR_CHAIN": "chain-0:7100"})
    assert set(stages("chain")) == set(of_levels)
    assert set_of_pods["restarts"] == "RecreateGroupOnPodRestart", "a chain is never joined again"
    pod_alone = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "chain"}, "spec": pod(set_of_pods)}
    assert_valid(yaml.safe_dump(pod_alone), tmp_path)


def test_pods_of_a_chain_reach_each_other_and_the_gateway_resolves_them() -> None:
    labels = labels_of(chain())
    services, policies = objects("chain", "Service"), objects("chain", "NetworkPolicy")
    (address,) = environment("chain", stages("chain")["gateway"])["AVATAR_DENOISERS"].split(",")
    assert services[address.removesuffix(":7000")]["spec"]["selector"].items() <= labels.items()
    assert services["chain"]["spec"]["publishNotReadyAddresses"], "they meet before they are ready"
    (rule,) = policies["chain"]["spec"]["ingress"]
    assert "ports" not in rule
    for selector in (policies["chain"]["spec"]["podSelector"], rule["from"][0]["podSelector"]):
        assert selector["matchLabels"].items() <= labels.items()


def labels_of(deployment: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = deployment["spec"]["template"]["metadata"]["labels"]
    return found


@pytest.mark.parametrize("overlay", SUITES)
def test_variables_are_settings_of_the_service(overlay: str) -> None:
    for name, deployment in stages(overlay).items():
        given = settings_of(environment(overlay, deployment))
        known = {f"AVATAR_{field.upper()}" for each in SERVICES.values() for field in each.model_fields}
        assert set(given) <= known
        for service in services_of(deployment):
            settings: Any = load(SERVICES[service], given)
            assert settings.drain_s < pod(deployment)["terminationGracePeriodSeconds"]
            if service == "gateway":
                addresses = [*settings.audio, *settings.denoisers, *settings.vae, *settings.text]
                assert {address.removesuffix(":7000") for address in addresses} == set(stages(overlay)) - {"gateway"}
            if service == "denoiser":
                assert settings.levels == DEVICES.get(overlay, {}).get(name, name[-1])
        assert name.partition("-")[0] in services_of(deployment)


def services_of(deployment: dict[str, Any]) -> list[str]:
    """Return the services that a pod runs."""
    python, option, module, *names = container(deployment)["args"]
    assert (python, option) == ("python", "-m")
    return names if module == "services.device" else [module.removeprefix("services.")]


@pytest.mark.parametrize("overlay", SUITES)
def test_pods_have_minimal_privileges(overlay: str) -> None:
    for deployment in stages(overlay).values():
        assert pod(deployment)["securityContext"]["runAsNonRoot"]
        assert pod(deployment)["automountServiceAccountToken"] is False
        may = container(deployment)["securityContext"]
        assert may["readOnlyRootFilesystem"]
        assert may["capabilities"] == {"drop": ["ALL"]}
        assert may["allowPrivilegeEscalation"] is False
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container(deployment)[probe]["grpc"] == {"port": 7000}


def test_the_voice_is_a_stage_like_all_others() -> None:
    voice, text = stages("voice")["voice"], stages("gpu-5")["text"]
    assert voice["spec"]["strategy"] == text["spec"]["strategy"]
    own = ("args", "env", "image", "resources", "volumeMounts", "envFrom")
    for name, value in container(text).items():
        assert name in own or container(voice)[name] == value
    for name, value in pod(text).items():
        assert name in ("containers", "volumes", "securityContext") or pod(voice)[name] == value
    assert pod(voice)["securityContext"].items() >= pod(text)["securityContext"].items()
    settings: Any = load(SERVICES["voice"], settings_of(environment("voice", voice)))
    assert settings.voice_url.startswith("https://")
    mounted = {each["mountPath"]: each["name"] for each in container(voice)["volumeMounts"]}
    (secret,) = (each for each in pod(voice)["volumes"] if each["name"] == mounted[str(settings.voice_key.parent)])
    assert secret["secret"]["secretName"] == "voice"
    (address,) = load(GatewaySettings, settings_of(environment("voice", stages("voice")["gateway"]))).voice
    service = objects("voice", "Service")[address.removesuffix(":7000")]["spec"]
    assert service["selector"].items() <= labels_of(voice).items()
    assert service["clusterIP"] == "None"
    (workers,) = objects("voice", "NetworkPolicy")["workers"]["spec"]["podSelector"]["matchExpressions"]
    assert "voice" in workers["values"]


OF_WORKERS = {"TLS_CERT", "TLS_KEY", "TLS_CLIENT_CA"}
OF_THE_GATEWAY = {"TENANTS", "TLS_CERT", "TLS_KEY", "WORKER_CA", "WORKER_CERT", "WORKER_KEY"}


def test_trust_mounts_every_file_that_a_setting_names() -> None:
    (health_check,) = map(json.loads, re.findall(r"^    CMD (\[.*\])$", DOCKERFILE, re.MULTILINE))
    for name, deployment in stages("trust").items():
        files = {key: Path(value) for key, value in environment("trust", deployment).items() if value.startswith("/")}
        wanted = OF_THE_GATEWAY if name == "gateway" else OF_WORKERS
        assert set(files) == {f"AVATAR_{field}" for field in wanted}
        assert {field.lower() for field in wanted} <= set(SERVICES[name.partition("-")[0]].model_fields)
        mounted = {each["mountPath"]: each["name"] for each in container(deployment)["volumeMounts"]}
        secret = {each["name"] for each in pod(deployment)["volumes"] if "secret" in each}
        assert {mounted[str(path.parent)] for path in files.values()} == secret
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert "grpc" not in container(deployment)[probe], "Kubernetes' own speaks no TLS"
            assert container(deployment)[probe]["exec"]["command"] == health_check


@pytest.mark.parametrize("overlay", DEVICES)
def test_a_device_has_one_process_and_the_decoders_has_the_audio_encoder(overlay: str) -> None:
    deployments = stages(overlay)
    devices = {
        name: container(deployment)["resources"].get("limits", {}).get("nvidia.com/gpu", 0)
        for name, deployment in deployments.items()
    }
    assert {name: count for name, count in devices.items() if count} == dict.fromkeys(DEVICES[overlay], 1)
    for name, deployment in deployments.items():
        assert (environment(overlay, deployment).get("AVATAR_DEVICE") == "cuda") is bool(devices[name])
    variables = environment(overlay, deployments["gateway"])
    assert variables["AVATAR_AUDIO"] == variables["AVATAR_VAE"] == "vae:7000"
    levels = DEVICES[overlay]["vae"]
    assert services_of(deployments["vae"]) == (["audio", "denoiser", "vae"] if levels else ["audio", "vae"])
    addresses = variables["AVATAR_DENOISERS"].removesuffix(":7000").split(":7000,")
    assert addresses == [name for name, levels in DEVICES[overlay].items() if levels]


@pytest.mark.parametrize("overlay", DEVICES)
def test_compose_and_kubernetes_serve_the_same_sizes(overlay: str) -> None:
    composed = {given(service).get("AVATAR_SIZES") for service in of(overlay).values()} - {None}
    deployed = {environment(overlay, stages(overlay)[name]).get("AVATAR_SIZES") for name in DEVICES[overlay]}
    assert len(composed) == 1
    assert composed == deployed


@pytest.mark.parametrize("overlay", DEVICES)
def test_compiled_kernels_outlive_their_pods(overlay: str) -> None:
    for name in DEVICES[overlay]:
        mounted = {each["mountPath"]: each["name"] for each in container(stages(overlay)[name])["volumeMounts"]}
        (volume,) = (each for each in pod(stages(overlay)[name])["volumes"] if each["name"] == mounted["/compiled"])
        assert volume["persistentVolumeClaim"] == {"claimName": "compiled"}
        assert pod(stages(overlay)[name])["securityContext"]["fsGroup"] == 10001


@pytest.mark.parametrize("overlay", [path.name for path in OVERLAYS.iterdir()])
def test_applying_an_overlay_again_keeps_the_number_of_replicas(overlay: str) -> None:
    kinds = ("Deployment", "LeaderWorkerSet")
    assert [name for kind in kinds for name, each in objects(overlay, kind).items() if "replicas" in each["spec"]] == []


def test_redis_is_not_evicted_and_refuses_writes_before_it_is_killed() -> None:
    redis, budget = objects("cpu", "StatefulSet")["redis"], objects("cpu", "PodDisruptionBudget")["redis"]["spec"]
    assert redis["spec"]["replicas"] == budget["minAvailable"]
    assert budget["selector"]["matchLabels"].items() <= labels_of(redis).items()
    options = container(redis)["args"]
    assert options[options.index("--maxmemory-policy") + 1] == "noeviction"
    assert options[options.index("--maxmemory") + 1] == "3gb"
    assert container(redis)["resources"]["limits"]["memory"] == "4Gi"


def cores(overlay: str) -> float:
    """Return the cores that an overlay's pods request, one replica each."""
    pods = [(each, 1) for kind in ("Deployment", "StatefulSet") for each in objects(overlay, kind).values()]
    pods += [(each["spec"]["jobTemplate"], 1) for each in objects(overlay, "CronJob").values()]
    if overlay == "chain":
        pods.append((chain(), chain()["size"]))
    return sum(count * in_cores(container(each)["resources"]["requests"]["cpu"]) for each, count in pods)


def in_cores(quantity: str) -> float:
    return float(quantity.removesuffix("m")) / (1000 if quantity.endswith("m") else 1)


@pytest.mark.parametrize("overlay", [path.name for path in OVERLAYS.iterdir()])
def test_the_guide_states_the_requested_cores(overlay: str) -> None:
    (row,) = re.findall(rf"^\| `{overlay}` \|.*", GUIDE.partition("## Kubernetes")[2], re.MULTILINE)
    assert float(row.split("|")[3]) == pytest.approx(cores(overlay))


def test_two_cores_are_enough_for_the_default_and_for_its_roll_out() -> None:
    surge = sum(in_cores(container(each)["resources"]["requests"]["cpu"]) for each in stages("cpu").values())
    assert cores("cpu") + surge <= 1.6, "the rest is for the cluster's own pods"
    assert cores("cpu") + cores("observability") <= 1.6


def test_streams_survive_a_roll_out() -> None:
    for overlay in SUITES:
        deployments = stages(overlay)
        rebuild_s = load(GatewaySettings, settings_of(environment(overlay, deployments["gateway"]))).rebuild_s
        for deployment in deployments.values():
            rolling = deployment["spec"]["strategy"]["rollingUpdate"]
            if rolling != {"maxSurge": 1, "maxUnavailable": 0}:
                # The stage is missing while the next worker loads, within the startup probe's limit; its streams wait.
                probe = container(deployment)["startupProbe"]
                assert LOAD_S < rebuild_s < probe["periodSeconds"] * probe["failureThreshold"]


def test_only_the_gateway_is_open_to_all() -> None:
    policies = objects("cpu", "NetworkPolicy")
    assert policies["nobody"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    to_all = {name for name, each in policies.items() for rule in each["spec"].get("ingress", []) if "from" not in rule}
    assert to_all == {"gateway"}
    assert {each["spec"].get("type", "ClusterIP") for each in objects("cpu", "Service").values()} == {"ClusterIP"}


def test_compose_and_kubernetes_run_the_same_images() -> None:
    composed = {service["image"] for service in COMPOSE["services"].values()}
    for overlay in (*SUITES, "observability", "voice"):
        for deployment in objects(overlay, "Deployment").values():
            assert container(deployment)["image"] in composed
    assert container(objects("cpu", "StatefulSet")["redis"])["image"] in composed
