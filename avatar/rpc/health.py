"""Ask a service whether it serves: `python -m avatar.rpc.health HOST:PORT [SERVICE]`.

Exit status 0 if it does; 1, with one line that says why, if not. SERVICE is the full name of one of its services, such
as avatar.v1.AvatarService; without it, all of the server is meant.
"""

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ANSWER_S = 3.0


def problem(target: str, service: str = "") -> str:
    """Why the service at HOST:PORT does not serve; empty if it does."""
    request = health_pb2.HealthCheckRequest(service=service)
    with grpc.insecure_channel(target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # comes without types
        try:
            answer = stub.Check(request, timeout=ANSWER_S)
        except grpc.RpcError as error:
            return f"{target}: {error.code().name}: {error.details()}"
    status: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return "" if status == "SERVING" else f"{target}: {status}"


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(problem(*sys.argv[1:]) or None)
