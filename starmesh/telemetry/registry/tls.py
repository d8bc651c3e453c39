"""What every service shows that has a certificate."""

from __future__ import annotations

from typing import Final

from starmesh.telemetry.registry.metric import Kind, Metric
from starmesh.types import Role

_ROLES: Final = tuple(Role)

CERTIFICATE_EXPIRES = Metric(
    name="starmesh.tls.certificate.expires",
    kind=Kind.GAUGE,
    unit="s",
    description="When the certificate in use ends, or the CA that signed it if that is sooner, in seconds since 1970; "
    "not shown without TLS.",
    roles=_ROLES,
)
