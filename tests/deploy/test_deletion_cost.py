"""Each pod's deletion cost is its number of streams. Only the cluster's API and Prometheus are faked."""

import json
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from deploy.deletion_cost import COST, STREAMS, main
from tests.certificates import Authority, Pair

Answer = Callable[[BaseHTTPRequestHandler, Any], tuple[int, Any]]
TOKEN = "a token"


@contextmanager
def served(answer: Answer, pair: Pair | None = None) -> Iterator[str]:
    """Serve at the yielded URL. answer: status and JSON for a request and its JSON. pair: certificate and key."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, told = answer(self, json.loads(body or b"null"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

        do_PATCH = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if pair:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(*pair)
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http{'s' if pair else ''}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Cluster:
    """A fake of a cluster's API and its Prometheus.

    costs: what each pod is marked with, by name; `a` has the address 10.0.0.1, `b` the next one. streams: of each.
    """

    def __init__(self, costs: dict[str, str | None], streams: dict[str, int]) -> None:
        self.costs, self.streams = costs, streams
        self.gone: set[str] = set()
        self.asked: list[str] = []

    def answer(self, request: BaseHTTPRequestHandler, change: Any) -> tuple[int, Any]:
        """Answer like the API."""
        url = urlsplit(request.path)
        name = url.path.removeprefix("/api/v1/namespaces/avatar/pods").strip("/")
        self.asked.append(f"{request.command} {name}".strip())
        if request.headers["Authorization"] != f"Bearer {TOKEN}":
            return 403, {"kind": "Status"}
        if request.command == "GET":
            assert parse_qs(url.query)["labelSelector"] == ["stage"]
            return 200, {"items": [self.pod(each) for each in self.costs]}
        if name in self.gone:
            return 404, {"kind": "Status"}
        assert request.headers["Content-Type"] == "application/merge-patch+json"
        self.costs[name] = change["metadata"]["annotations"][COST]
        return 200, self.pod(name)

    def pod(self, name: str) -> Any:
        marks = {"annotations": {COST: cost}} if (cost := self.costs[name]) else {}
        return {"metadata": {"name": name, **marks}, "status": {"podIP": address(name)}}

    def measured(self, request: BaseHTTPRequestHandler, _: Any) -> tuple[int, Any]:
        """Answer like Prometheus."""
        assert parse_qs(urlsplit(request.path).query) == {"query": [STREAMS]}
        result = [
            {"metric": {"instance": f"{address(name)}:9464"}, "value": [1764066000.5, str(count)]}
            for name, count in self.streams.items()
        ]
        return 200, {"status": "success", "data": {"resultType": "vector", "result": result}}


def address(name: str) -> str:
    return f"10.0.0.{ord(name) - ord('a') + 1}"


Pass = Callable[[Cluster], None]


@pytest.fixture
def one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pass:
    """Return a function that runs the program once against a cluster."""
    authority = Authority(tmp_path, "ca")
    pair = authority.issue("api", "127.0.0.1")
    (tmp_path / "ca.crt").write_bytes(authority.ca.read_bytes())
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "namespace").write_text("avatar")

    def run(cluster: Cluster) -> None:
        with served(cluster.answer, pair) as api, served(cluster.measured) as prometheus:
            flags = ("--api", api, "--prometheus", prometheus, "--account", str(tmp_path))
            monkeypatch.setattr("sys.argv", ["deletion_cost", *flags])
            main()

    return run


def test_a_pods_cost_is_its_number_of_streams(one_pass: Pass) -> None:
    cluster = Cluster({"a": None, "b": "2", "c": "5", "d": "7"}, {"a": 3, "b": 0, "c": 5})
    one_pass(cluster)
    assert cluster.costs == {"a": "3", "b": "0", "c": "5", "d": "7"}, "nothing is known of d"
    assert cluster.asked == ["GET", "PATCH a", "PATCH b"], "what has not changed is not written again"


def test_a_deleted_pod_is_skipped(one_pass: Pass) -> None:
    cluster = Cluster({"a": None, "b": None}, {"a": 3, "b": 1})
    cluster.gone = {"a"}
    one_pass(cluster)
    assert cluster.costs == {"a": None, "b": "1"}


def test_a_forbidden_request_is_one_line_of_error(one_pass: Pass, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("another")
    with pytest.raises(SystemExit, match=r"^error: HTTP Error 403: Forbidden$"):
        one_pass(Cluster({"a": None}, {"a": 3}))


def test_the_token_is_not_sent_to_an_api_of_another_authority(one_pass: Pass, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(Authority(tmp_path, "other").ca.read_bytes())
    cluster = Cluster({"a": None}, {"a": 3})
    with pytest.raises(SystemExit, match="CERTIFICATE_VERIFY_FAILED"):
        one_pass(cluster)
    assert cluster.asked == []
