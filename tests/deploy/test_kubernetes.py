"""The manifests, rendered by kustomize, are valid, use existing settings, and connect to each other."""

import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from avatar.settings import load
from deploy import deletion_cost
from docs.tables import SERVICES
from tests.deploy.test_compose import COMPOSE
from tests.deploy.test_monitoring import FOREIGN_LABELS, named_in, series

OVERLAYS = Path(__file__).parents[2] / "deploy/kubernetes/overlays"
BIN = Path(sys.executable).parent
SUITES = ["cpu", "gpu"]
STAGES = {"gateway", "audio", "denoiser-0", "denoiser-1", "denoiser-2", "denoiser-3", "vae"}
UNKNOWN = {"LeaderWorkerSet", "ScaledObject"}  # of which no schema is at hand


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


@pytest.mark.parametrize("overlay", [path.name for path in OVERLAYS.iterdir()])
def test_every_object_matches_kubernetes_schema(overlay: str, tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(rendered(overlay), encoding="utf-8")
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
    assert set(deployments) == STAGES | ({"text"} if overlay == "gpu" else set())
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
    set_of_pods, of_levels = chain(), stages("gpu")
    given = environment("chain", set_of_pods)
    assert given.pop("AVATAR_CHAIN").startswith("$(LWS_LEADER_ADDRESS):")
    assert given.pop("AVATAR_LEVELS") == "$(LWS_WORKER_INDEX)"
    for level in range(set_of_pods["size"]):
        name = f"denoiser-{level}"
        assert environment("gpu", of_levels.pop(name)) == given | {"AVATAR_LEVELS": str(level)}
        assert load(SERVICES["denoiser"], given | {"AVATAR_LEVELS": str(level), "AVATAR_CHAIN": "chain-0:7100"})
    assert set(stages("chain")) == set(of_levels)
    assert set_of_pods["restarts"] == "RecreateGroupOnPodRestart", "a chain is never joined again"
    file = tmp_path / "pod.yaml"
    pod_alone = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "chain"}, "spec": pod(set_of_pods)}
    file.write_text(yaml.safe_dump(pod_alone), encoding="utf-8")
    subprocess.run([BIN / "kubernetes-validate", "--strict", file], check=True)


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
        cls = SERVICES[name.partition("-")[0]]
        given = {key: value for key, value in environment(overlay, deployment).items() if key.startswith("AVATAR_")}
        known = {f"AVATAR_{field.upper()}" for each in SERVICES.values() for field in each.model_fields}
        assert set(given) <= known
        settings: Any = load(cls, given)
        assert settings.drain_s < pod(deployment)["terminationGracePeriodSeconds"]
        assert container(deployment)["command"] == ["python", "-m", f"services.{name.partition('-')[0]}"]
        if name == "gateway":
            addresses = [*settings.audio, *settings.denoisers, *settings.vae, *settings.text]
            assert {address.removesuffix(":7000") for address in addresses} == set(stages(overlay)) - {"gateway"}
        if name.startswith("denoiser"):
            assert settings.levels == name[-1]


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


OF_WORKERS = {"TLS_CERT", "TLS_KEY", "TLS_CLIENT_CA"}
OF_THE_GATEWAY = {"TENANTS", "TLS_CERT", "TLS_KEY", "WORKER_CA", "WORKER_CERT", "WORKER_KEY"}


def test_trust_mounts_every_file_that_a_setting_names() -> None:
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
            assert container(deployment)[probe]["exec"]["command"][2] == "avatar.rpc.health"


def test_levels_and_decoder_have_a_device_each() -> None:
    devices = {
        name: container(deployment)["resources"].get("limits", {}).get("nvidia.com/gpu", 0)
        for name, deployment in stages("gpu").items()
    }
    assert {name for name, count in devices.items() if count} == {*(f"denoiser-{level}" for level in range(4)), "vae"}
    for name, deployment in stages("gpu").items():
        assert (environment("gpu", deployment).get("AVATAR_DEVICE") == "cuda") is bool(devices[name])


def test_only_the_gateway_is_open_to_all() -> None:
    policies = objects("cpu", "NetworkPolicy")
    assert policies["nobody"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    to_all = {name for name, each in policies.items() for rule in each["spec"].get("ingress", []) if "from" not in rule}
    assert to_all == {"gateway"}
    assert {each["spec"].get("type", "ClusterIP") for each in objects("cpu", "Service").values()} == {"ClusterIP"}


def test_a_stage_is_scaled_by_its_sessions() -> None:
    scaled = objects("autoscaling", "ScaledObject")
    assert set(scaled) == STAGES - {"gateway"}, "one session's calls go to one gateway"
    for name, each in scaled.items():
        assert each["spec"]["scaleTargetRef"] == {"name": name}
        (trigger,) = each["spec"]["triggers"]
        assert f'worker="{name}"' in trigger["metadata"]["query"]
        names, labels = named_in(trigger["metadata"]["query"])
        assert names == {"avatar_session_active", "avatar_session_capacity"} <= series()
        assert labels <= FOREIGN_LABELS
        assert_is_served(trigger["metadata"]["serverAddress"])


def assert_is_served(url: str) -> None:
    """Check that a Service of the overlay observability has the URL's host and port."""
    host, _, port = url.removeprefix("http://").partition(":")
    assert int(port) in [each["port"] for each in objects("observability", "Service")[host]["spec"]["ports"]]


def test_the_deletion_cost_job_selects_the_pods_and_has_minimal_rights() -> None:
    asker = objects("autoscaling", "CronJob")["deletion-cost"]["spec"]["jobTemplate"]
    assert container(asker)["command"] == ["python", "-m", deletion_cost.__name__]
    account = objects("autoscaling", "ServiceAccount")[pod(asker)["serviceAccountName"]]["metadata"]
    binding = objects("autoscaling", "RoleBinding")["deletion-cost"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
    ]
    role = objects("autoscaling", "Role")[binding["roleRef"]["name"]]
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "patch"]}]
    assert all(deletion_cost.PODS["labelSelector"] in labels_of(each) for each in stages("cpu").values())
    names, labels = named_in(deletion_cost.STREAMS)
    assert names <= series()
    assert labels <= FOREIGN_LABELS
    assert_is_served(deletion_cost.PROMETHEUS)


def test_compose_and_kubernetes_run_the_same_images() -> None:
    composed = {service["image"] for service in COMPOSE["services"].values()}
    for overlay in (*SUITES, "observability"):
        for deployment in objects(overlay, "Deployment").values():
            assert container(deployment)["image"] in composed
    assert set(re.findall(r"image: (\S+)", rendered("autoscaling"))) == {COMPOSE["services"]["gateway"]["image"]}
    assert container(objects("cpu", "StatefulSet")["redis"])["image"] in composed


def test_pods_export_traces_to_the_collector() -> None:
    (told,) = objects("observability", "ConfigMap")["telemetry"]["data"].values()
    assert_is_served(told)
    optional = [
        source["configMapRef"]["name"]
        for deployment in stages("cpu").values()
        for source in container(deployment)["envFrom"]
        if source["configMapRef"].get("optional")
    ]
    assert optional == ["telemetry"] * len(STAGES)
