"""What only this machine reaches. Owns the question; what must be encrypted beyond it is the callers' matter."""

from __future__ import annotations

from ipaddress import ip_address


def is_loopback(address: str) -> bool:
    """Whether a HOST:PORT can be reached from this machine only."""
    return is_loopback_host(address.rpartition(":")[0])


def is_loopback_host(host: str) -> bool:
    """The same of a host alone; an IPv6 address may stand in brackets. Names other than localhost are not looked up."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
