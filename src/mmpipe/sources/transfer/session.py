"""A session of ``requests`` whose redirects do not lead into networks that the first address was not in.

The host of the first address is the user's choice, a private one included. A server there may redirect; whether a
redirect leads to a private, loopback, link-local or metadata address is checked by name before each request, and by the
connection's own peer after it is opened, before anything is sent (so DNS rebinding has no effect). Behind a proxy, which
resolves names itself, the check by name is all there is.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util import parse_url

from mmpipe.errors import DataError
from mmpipe.sources.transfer.public_url import is_public

_METADATA = {"100.100.100.200", "fd00:ec2::254", "192.0.0.192"}
"""Metadata services of clouds outside of the link-local networks."""


def network_of(address: str) -> str:
    """``public``, ``private`` or ``link-local``, for the network of an IP address. Metadata services count as the last."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if ip.is_link_local or str(ip) in _METADATA:
        return "link-local"
    return "public" if is_public(address) else "private"


class GuardedSession(requests.Session):
    """For one address and the redirects from it. Raises DataError for a redirect that is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: set[str] | None = None
        """Networks that may be connected to; None before the first request."""
        for scheme in ("http://", "https://"):
            self.mount(scheme, _GuardedAdapter(self))

    def send(self, request: requests.PreparedRequest, **settings: Any) -> requests.Response:
        """Called for the first request and for each redirect."""
        networks = {network_of(address) for address in _addresses(str(request.url))}
        if self.allowed is None:
            self.allowed = {"public", *networks}
        for network in networks:
            self.check(network)
        return super().send(request, **settings)

    def check(self, network: str) -> None:
        """Raise DataError when nothing may be fetched from a network."""
        if self.allowed is not None and network not in self.allowed:
            raise DataError(
                f"the server redirects to a {network} address; that is not followed. If it is meant, give the address it "
                "leads to in the catalogue"
            )


class _GuardedAdapter(HTTPAdapter):
    def __init__(self, session: GuardedSession) -> None:
        self._session = session
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **settings: Any) -> None:
        super().init_poolmanager(*arguments, **settings)
        check = self._session.check

        def pool(kind: Any, connection: Any) -> Any:
            def connect(self: Any) -> socket.socket:
                opened: socket.socket = connection._new_conn(self)
                try:
                    check(network_of(opened.getpeername()[0]))
                except BaseException:
                    opened.close()
                    raise
                return opened

            guarded = type("Guarded", (connection,), {"_new_conn": connect})
            return type("GuardedPool", (kind,), {"ConnectionCls": guarded})

        self.poolmanager.pool_classes_by_scheme = {
            "http": pool(HTTPConnectionPool, HTTPConnection),
            "https": pool(HTTPSConnectionPool, HTTPSConnection),
        }


def _addresses(url: str) -> list[str]:
    """The IP addresses of an address's host; none when it is not known here, as it may be to a proxy."""
    parts = parse_url(url)
    try:
        found = socket.getaddrinfo((parts.host or "").strip("[]"), parts.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(address[0]) for *_, address in found]
