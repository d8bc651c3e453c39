"""``python -m starmesh.rpc.probe HOST:PORT``: asks a service once for its health, for a container's health check.

Exits with 0 when it is SERVING and 1 otherwise, having printed one line. Certificates come from the same flags or
environment as the service's, so that a probe in its container needs none. Runs every few seconds beside each service,
so it loads neither asyncio's gRPC nor telemetry nor what checks certificates for people: 0.2 s of CPU time, nearly all
of it for importing gRPC.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

MESH_NAME = "starmesh.internal"  # as in ``credentials``, which takes a tenth of a second to import
TIMEOUT_S = 3.0
"""How long the whole question may take, connecting included."""


def ask_health(
    address: str,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    server_name: str = "",
    timeout_s: float = TIMEOUT_S,
) -> str:
    """What the service at ``address`` says of itself: SERVING, NOT_SERVING, or why it gave no answer. ``server_name``
    is what its certificate is for, where there are ``credentials``."""
    options = [("grpc.enable_http_proxy", 0)]
    if credentials is None:
        opened = grpc.insecure_channel(address, options=options)
    else:
        opened = grpc.secure_channel(
            address, credentials, options=[*options, ("grpc.ssl_target_name_override", server_name)]
        )
    with opened as channel:
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def _credentials(cert: str, key: str, ca: str) -> grpc.ChannelCredentials | None:
    """From PEM files; None for plaintext. Raises OSError for one that cannot be read."""
    if not ca:
        return None
    cert_pem, key_pem = (Path(path).read_bytes() if path else None for path in (cert, key))
    return grpc.ssl_channel_credentials(Path(ca).read_bytes(), private_key=key_pem, certificate_chain=cert_pem)


def main(arguments: list[str] | None = None) -> int:
    """Ask, print the answer, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m starmesh.rpc.probe", description="Ask a service for its health.")
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--timeout-s", type=float, default=TIMEOUT_S, help="seconds to wait for the answer")
    for name, what in (("cert", "certificate to show"), ("key", "its key"), ("ca", "CAs that sign the service's")):
        variable = f"STARMESH_TLS_{name.upper()}"
        parser.add_argument(
            f"--tls-{name}", default=os.environ.get(variable, ""), help=f"PEM file: {what} ({variable})"
        )
    parser.add_argument(
        "--tls-server-name",
        default=os.environ.get("STARMESH_TLS_SERVER_NAME") or MESH_NAME,
        help="DNS name that the service's certificate is for (STARMESH_TLS_SERVER_NAME)",
    )
    asked = parser.parse_args(arguments)
    try:
        credentials = _credentials(asked.tls_cert, asked.tls_key, asked.tls_ca)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}")  # noqa: T201
        return 1
    answer = ask_health(
        asked.address, credentials=credentials, server_name=asked.tls_server_name, timeout_s=asked.timeout_s
    )
    print(f"{asked.address}: {answer}")  # noqa: T201
    return 0 if answer == "SERVING" else 1


if __name__ == "__main__":
    raise SystemExit(main())
