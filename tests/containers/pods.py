"""The Deployments of Kubernetes' overlay `cpu`, as podman can start them."""

import time
from pathlib import Path

import yaml

from tests.containers.engine import Engine
from tests.containers.single import redis_alone
from tests.deploy.test_kubernetes import objects


def check_pods(made: Engine) -> str:
    """Start the Deployments and their ConfigMaps, and ask each process for its health."""
    deployments = objects("cpu", "Deployment")
    for deployment in deployments.values():
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            container |= {"image": f"docker.io/{container['image']}", "imagePullPolicy": "Never"}
            # This podman has no probes by gRPC, and publishes every port at the same one of the machine.
            for each in ("startupProbe", "readinessProbe", "livenessProbe", "ports"):
                del container[each]
    manifest = made.folder / "pods.yaml"
    found = [*objects("cpu", "ConfigMap").values(), *deployments.values()]
    manifest.write_text(yaml.safe_dump_all(found), encoding="utf-8")
    with redis_alone(made):
        return play(made, manifest, len(deployments))


def play(made: Engine, manifest: Path, num_pods: int) -> str:
    """Start a manifest's pods beside Redis until all are healthy, and stop them."""
    started_s = time.monotonic()
    try:
        made.podman("kube", "play", "--network=alone", str(manifest))
        names = made.running("service")
        assert len(names) == num_pods, names
        for name in names:
            while made.podman("exec", name, "python", "-m", "avatar.rpc.health", "127.0.0.1:7000", is_checked=False):
                assert time.monotonic() - started_s < 300, made.podman("logs", name)
                time.sleep(1)
        return f"{len(names)} pods healthy after {time.monotonic() - started_s:.0f} s"
    finally:
        made.podman("kube", "down", str(manifest), is_checked=False)
