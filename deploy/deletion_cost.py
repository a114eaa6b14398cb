"""Make Kubernetes stop the pods with the fewest streams first: `python -m deploy.deletion_cost`.

When replicas become fewer, Kubernetes deletes the pods with the lowest `controller.kubernetes.io/pod-deletion-cost`.
This program sets it once, for each pod, to its number of streams in Prometheus; the CronJob in
deploy/kubernetes/overlays/autoscaling runs it every minute.
"""

import argparse
import json
import ssl
import sys
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

PROMETHEUS = "http://prometheus.avatar-observability:9090"
COST = "controller.kubernetes.io/pod-deletion-cost"
STREAMS = 'sum by (instance) (avatar_session_active{job="avatar"})'
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
PODS = {"labelSelector": "stage", "fieldSelector": "status.phase=Running"}
TIMEOUT_S = 10.0


def streams(prometheus: str) -> dict[str, int]:
    """Return the number of open streams of each pod, by its address. prometheus: URL."""
    with urlopen(f"{prometheus}/api/v1/query?{urlencode({'query': STREAMS})}", timeout=TIMEOUT_S) as answer:
        found = json.load(answer)["data"]["result"]
    return {each["metric"]["instance"].rpartition(":")[0]: int(float(each["value"][1])) for each in found}


class Pods:
    """The suite's pods, through the cluster's API."""

    def __init__(self, api: str, account: Path) -> None:
        """api: URL. account: mounted folder of the service account: `ca.crt`, `namespace` and `token`."""
        self._url = f"{api}/api/v1/namespaces/{(account / 'namespace').read_text()}/pods"
        self._token = (account / "token").read_text()
        self._tls = ssl.create_default_context(cafile=account / "ca.crt")

    def running(self) -> list[dict[str, Any]]:
        """Return the running pods."""
        pods: list[dict[str, Any]] = self._call("GET", f"?{urlencode(PODS)}")["items"]
        return pods

    def mark(self, name: str, cost: int) -> None:
        """Set a pod's cost; do nothing if it no longer exists."""
        try:
            self._call("PATCH", f"/{name}", {"metadata": {"annotations": {COST: str(cost)}}})
        except HTTPError as error:
            if error.code != 404:
                raise

    def _call(self, method: str, path: str, change: object = None) -> Any:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/merge-patch+json"}
        body = json.dumps(change).encode() if change else None
        request = Request(self._url + path, body, headers, method=method)
        with urlopen(request, timeout=TIMEOUT_S, context=self._tls) as answer:
            return json.load(answer)


def mark_all(pods: Pods, costs: dict[str, int]) -> None:
    """Write the costs that have changed; a pod without one in `costs` keeps its own. costs: by address."""
    for pod in pods.running():
        cost = costs.get(pod["status"].get("podIP", ""))
        if cost is not None and pod["metadata"].get("annotations", {}).get(COST) != str(cost):
            pods.mark(pod["metadata"]["name"], cost)


def main() -> None:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m deploy.deletion_cost", description=description)
    parser.add_argument("--prometheus", default=PROMETHEUS, metavar="URL")
    parser.add_argument("--api", default="https://kubernetes.default.svc", metavar="URL", help="of the cluster")
    parser.add_argument("--account", default=ACCOUNT, type=Path, metavar="FOLDER", help="of the service account")
    flags = parser.parse_args()
    try:
        mark_all(Pods(flags.api, flags.account), streams(flags.prometheus))
    except OSError as error:  # unreachable or forbidden; the next run tries again
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
