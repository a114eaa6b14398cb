"""The overlays beside the suite, observability and autoscaling, and the guide's entrance for clients."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from deploy import deletion_cost
from docs.tables import PAGES
from tests.deploy.test_compose import COMPOSE, gateway_of, given, of
from tests.deploy.test_kubernetes import (
    GUIDE,
    OVERLAYS,
    STAGES,
    SUITES,
    assert_valid,
    container,
    labels_of,
    manifests,
    objects,
    pod,
    rendered,
    stages,
)
from tests.deploy.test_monitoring import FOREIGN_LABELS, named_in, series

SUITE, WATCHERS, KEDA = "avatar", "avatar-observability", "keda"


def namespace_of(overlay: str) -> str:
    """Return the namespace of all of an overlay's objects."""
    namespaces = {each["metadata"].get("namespace") for each in manifests(overlay) if each["kind"] != "Namespace"}
    (found,) = namespaces
    assert isinstance(found, str)
    return found


def assert_answers(url: str, namespace: str, labels: dict[str, str]) -> None:
    """Check that a Service of observability has the URL's host and port, for pods of a namespace with these labels."""
    address = urlsplit(url)
    host, _, domain = str(address.hostname).partition(".")
    assert domain in (WATCHERS, f"{WATCHERS}.svc.cluster.local"), "a name that resolves in every namespace"
    service = objects("observability", "Service")[host]["spec"]
    assert address.port in [each["port"] for each in service["ports"]]
    admitted = [
        peer
        for policy in objects("observability", "NetworkPolicy").values()
        if policy["spec"]["podSelector"].get("matchLabels") == service["selector"]
        for rule in policy["spec"]["ingress"]
        for peer in rule["from"]
        if {"port": address.port} in rule["ports"]
    ]
    assert any(admits(peer, namespace, labels) for peer in admitted)


def admits(peer: dict[str, Any], namespace: str, labels: dict[str, str]) -> bool:
    selector = peer.get("podSelector", {})
    return (
        peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": namespace}
        and selector.get("matchLabels", {}).items() <= labels.items()
        and all(each["key"] in labels and each["operator"] == "Exists" for each in selector.get("matchExpressions", []))
    )


def test_observability_stands_alone() -> None:
    assert namespace_of("observability") == WATCHERS
    assert set(objects("observability", "Namespace")) == {WATCHERS}
    assert {namespace_of(overlay) for overlay in SUITES} == {SUITE}
    maps = objects("observability", "ConfigMap")
    for deployment in objects("observability", "Deployment").values():
        used = {each["configMap"]["name"] for each in pod(deployment)["volumes"] if "configMap" in each}
        assert used <= set(maps)
        assert pod(deployment)["securityContext"]["runAsNonRoot"]
        assert container(deployment)["securityContext"]["readOnlyRootFilesystem"]


def test_prometheus_resolves_the_suite_and_is_admitted() -> None:
    prometheus = objects("observability", "Deployment")["prometheus"]
    assert pod(prometheus)["dnsConfig"]["searches"] == [f"{SUITE}.svc.cluster.local"]
    for overlay in SUITES:
        policy = objects(overlay, "NetworkPolicy")["metrics"]["spec"]
        (rule,) = policy["ingress"]
        (peer,) = rule["from"]
        assert rule["ports"] == [{"port": 9464}]
        assert admits(peer, WATCHERS, labels_of(prometheus))


def test_pods_export_traces_to_the_collector_once_their_configuration_is_there() -> None:
    optional = {
        source["configMapRef"]["name"]
        for deployment in stages("cpu").values()
        for source in container(deployment)["envFrom"]
        if source["configMapRef"].get("optional")
    }
    for text in (GUIDE, (OVERLAYS / "observability/kustomization.yaml").read_text(encoding="utf-8")):
        command = r"--namespace (\S+) create configmap (\S+)[\s\\#]+--from-literal=OTEL_EXPORTER_OTLP_ENDPOINT=(\S+)"
        ((namespace, name, url),) = re.findall(command, text)
        assert (namespace, {name}) == (SUITE, optional)
        for deployment in stages("cpu").values():
            assert_answers(url, SUITE, labels_of(deployment))


def test_a_stage_is_scaled_by_its_sessions() -> None:
    scaled = objects("autoscaling", "ScaledObject")
    assert set(scaled) == STAGES - {"gateway"}, "one session's calls go to one gateway"
    for name, each in scaled.items():
        assert each["spec"]["scaleTargetRef"] == {"name": name}
        (trigger,) = each["spec"]["triggers"]
        assert (trigger["type"], trigger["metricType"]) == ("prometheus", "Value")
        assert f'worker="{name}"' in trigger["metadata"]["query"]
        names, labels = named_in(trigger["metadata"]["query"])
        assert names == {"avatar_session_active", "avatar_session_capacity"} <= series()
        assert labels <= FOREIGN_LABELS
        assert_answers(trigger["metadata"]["serverAddress"], KEDA, {})


def test_the_deletion_cost_job_selects_the_pods_and_has_minimal_rights() -> None:
    asker = objects("autoscaling", "CronJob")["deletion-cost"]["spec"]["jobTemplate"]
    assert container(asker)["args"] == ["python", "-m", deletion_cost.__name__]
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
    assert_answers(deletion_cost.PROMETHEUS, namespace_of("autoscaling"), labels_of(asker))


def test_its_image_is_the_gateways() -> None:
    assert set(re.findall(r"image: (\S+)", rendered("autoscaling"))) == {COMPOSE["services"]["gateway"]["image"]}


def test_the_guides_entrance_leads_to_the_gateway(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    assert_valid(example, tmp_path)
    service = yaml.safe_load(example)
    assert service["metadata"]["namespace"] == SUITE
    assert service["metadata"]["name"] not in objects("cpu", "Service")
    reached = {
        name for name, each in stages("cpu").items() if service["spec"]["selector"].items() <= labels_of(each).items()
    }
    assert reached == {"gateway"}
    (port,) = service["spec"]["ports"]
    (rule,) = objects("cpu", "NetworkPolicy")["gateway"]["spec"]["ingress"]
    assert rule == {"ports": [{"port": port["targetPort"]}]}


def test_the_guides_examples_name_what_is_there() -> None:
    (composed,) = re.findall(r"--profile cpu up --scale ([\w-]+)=", GUIDE)
    (deployed,) = re.findall(r"scale deployment ([\w-]+) --replicas", GUIDE)
    assert (composed in of("cpu"), deployed in stages("cpu")) == (True, True)
    (second,) = re.findall(r"((?:AVATAR_\w+=\S+[\s\\]+)+)python -m services\.gateway\n", GUIDE)
    own = {"AVATAR_LISTEN": "0.0.0.0:7100"}
    first = {key: value for key, value in given(gateway_of("cpu")).items() if key.startswith("AVATAR_")}
    assert dict(re.findall(r"(\w+)=(\S+)", second)).items() <= (first | own).items()


def test_the_runbook_names_what_is_there() -> None:
    section = PAGES["metrics"].read_text(encoding="utf-8").split("## Looking at a running suite")[1].split("\n## ")[0]
    commands = re.findall(r"`kubectl ([^`]*)`", section)
    assert {name for each in commands for name in re.findall(r"deploy/(\S+)", each)} <= set(stages("cpu"))
    assert {name for each in commands for name in re.findall(r"--selector stage=(\S+)", each)} <= {*STAGES}
    assert {name for each in commands for name in re.findall(r"service/(\S+)", each)} <= {
        *objects("observability", "Service")
    }
    assert {name for each in commands for name in re.findall(r"--namespace (\S+)", each)} <= {SUITE, WATCHERS}
