"""Fetching a small file from an untrusted address.

Protection against server-side request forgery and endless responses: HTTP(S) only; every address a name resolves to is
checked, and the connection goes to the checked address itself (so DNS rebinding has no effect); redirects are followed
explicitly, each checked again; size and time are bounded. Proxies of the environment are not used: behind one, the real
address could not be checked.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

import certifi
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from mmpipe import __version__
from mmpipe.errors import DataError

_CHUNK = 1 << 16
_REDIRECTS = {301, 302, 303, 307, 308}
# Addresses that embed an IPv4 address (RFC 6052, RFC 3056).
_TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2002::/16"))


def is_public(address: str) -> bool:
    """Whether an IP address lies in the public internet, not in a private, local or reserved network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif any(ip in network for network in _TRANSLATED):
            return False
    return ip.is_global and not ip.is_multicast


@dataclass(frozen=True)
class Limits:
    """Limits of a download's size, time and addresses."""

    size: int = 20 << 20
    """Bytes."""
    seconds: float = 20
    """From the first name lookup to the last byte, redirects included."""
    redirects: int = 3
    allowed: Callable[[str], bool] = is_public
    """Whether an IP address may be connected to."""


def fetch(url: str, limits: Limits = Limits()) -> tuple[bytes, str]:
    """The body of ``url`` and its media type (``image/png``; empty when the server names none). Raises DataError,
    naming the address, when it is not allowed or breaks a limit, or when the server refuses."""
    deadline = time.monotonic() + limits.seconds
    place = url
    for _ in range(limits.redirects + 1):
        with _response(place, limits, deadline) as response:
            if response.status in _REDIRECTS:
                place = urljoin(place, response.headers.get("Location", ""))
                continue
            if response.status != 200:
                raise DataError(f"{url}: the server answered {response.status}")
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            return _body(response, url, limits), media_type
    raise DataError(f"{url}: more than {limits.redirects} redirects")


def _body(response: urllib3.BaseHTTPResponse, url: str, limits: Limits) -> bytes:
    told = response.headers.get("Content-Length", "")
    if told.isdigit() and int(told) > limits.size:
        raise DataError(f"{url}: {int(told)} bytes, more than the {limits.size} allowed; shrink it")
    body = bytearray()
    for chunk in response.stream(_CHUNK, decode_content=False):
        body += chunk
        if len(body) > limits.size:
            raise DataError(f"{url}: more than the {limits.size} bytes allowed; shrink it")
    return bytes(body)


@contextmanager
def _response(url: str, limits: Limits, deadline: float) -> Iterator[urllib3.BaseHTTPResponse]:
    """One response. Its connection is cut at the deadline."""
    connection, path = _connection(url, limits, deadline)
    guard = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, [connection])
    guard.daemon = True
    guard.start()
    headers = {"User-Agent": f"mmpipe/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"}
    late = f"{url}: not done after {limits.seconds:g} seconds"
    try:
        connection.request("GET", path, headers=headers, preload_content=False, decode_content=False)
        yield connection.getresponse()
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
        why = f"{url}: the connection failed ({_reason(error)})"
        raise DataError(late if time.monotonic() >= deadline else why) from error
    finally:
        guard.cancel()
        connection.close()
    if time.monotonic() >= deadline:  # a body of unknown length ends where it is cut
        raise DataError(late)


def _connection(url: str, limits: Limits, deadline: float) -> tuple[_PlainConnection | _SecureConnection, str]:
    """An unopened connection to a checked address, and the path to ask for."""
    try:
        parts = urllib3.util.parse_url(url)
    except urllib3.exceptions.LocationParseError as error:
        raise DataError(f"{url}: not an address") from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise DataError(f"{url}: not an http:// or https:// address")
    if parts.auth:
        raise DataError(f"{parts.scheme}://{parts.netloc}: an address with a name or password is not used")
    secure, host = parts.scheme == "https", parts.host.strip("[]")
    port = parts.port or (443 if secure else 80)
    address = _checked_address(url, host, port, limits)
    wait = max(0.01, deadline - time.monotonic())
    connection: _PlainConnection | _SecureConnection
    if secure:
        trusted = ssl.create_default_context(cafile=certifi.where())
        connection = _SecureConnection(host, port, timeout=wait, ssl_context=trusted)
    else:
        connection = _PlainConnection(host, port, timeout=wait)
    connection.address = address
    return connection, parts.request_uri


def _checked_address(url: str, host: str, port: int, limits: Limits) -> tuple[Any, ...]:
    """The first result of ``getaddrinfo`` for a host, all of whose addresses must be allowed."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DataError(f"{url}: the host is not known ({_reason(error)})") from error
    for *_, address in found:
        if not limits.allowed(str(address[0])):
            raise DataError(
                f"{url}: leads into a private network ({address[0]}); such images are not fetched, give the file itself"
            )
    return found[0]


class _Checked:
    """A connection to a checked address that keeps its socket: http.client forgets it with the last header."""

    address: tuple[Any, ...]
    """Family, type, protocol, name and address, as ``getaddrinfo`` gives them."""
    opened: socket.socket | None = None
    timeout: Any
    sock: Any

    def _new_conn(self) -> socket.socket:
        family, kind, protocol, _, address = self.address
        opened = socket.socket(family, kind, protocol)
        try:
            opened.settimeout(self.timeout)
            opened.connect(address)
        except OSError:
            opened.close()
            raise
        return opened

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        self.opened = self.sock


class _PlainConnection(_Checked, HTTPConnection):
    pass


class _SecureConnection(_Checked, HTTPSConnection):
    # The certificate is still checked against the host's name.
    pass


def _cut(connection: _Checked) -> None:
    """Close a connection that is being read."""
    if connection.opened is not None:
        with suppress(OSError):  # already closed
            connection.opened.shutdown(socket.SHUT_RDWR)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
