"""How a reply comes over the network: whole, in time, bounded, from the host that was asked; and
where a key may go and be seen.

The usual time-out is one of silence: a server that drips on and on never meets it. Here it is the
time from the request to the last byte of its reply.
"""

import asyncio
import ipaddress
import json
import os
import socket
import urllib.request
import zlib
from urllib.parse import quote, unquote, urlsplit

import httpx2

from support.cli import UserError

MOST = 2**25  # bytes of a reply, unpacked
AT_HOME = (".local", ".localhost", ".internal", ".lan")  # names that only a private network has


class WholeReplies(httpx2.AsyncHTTPTransport):
    """Gives each reply `seconds` to come, all of it."""

    def __init__(self, seconds, proxy):
        super().__init__(proxy=proxy)
        self.seconds = seconds

    async def handle_async_request(self, request):
        try:
            return await asyncio.wait_for(self.whole_reply(request), self.seconds)
        except TimeoutError as error:
            text = f"no whole reply within {self.seconds:g} s"
            raise httpx2.ReadTimeout(text, request=request) from error

    async def whole_reply(self, request):
        response = await super().handle_async_request(request)
        content = bytearray()
        try:
            async for part in response.stream:
                content += part
                if len(content) > MOST:
                    raise httpx2.ReadError("the reply has no end", request=request)
        finally:
            await response.stream.aclose()
        headers = response.headers.copy()
        content = unpacked(bytes(content), headers.pop("content-encoding", ""))
        if leads_away(request.url, headers.get("location", "")):
            text = f"it redirects to {shown(headers.pop('location'))}; if you trust that, ask it"
            content = json.dumps({"error": {"message": text}}).encode()
        return httpx2.Response(
            response.status_code, headers=headers, content=content, request=request
        )


def unpacked(content, encoding):
    """The bytes of a packed reply, of which a small one may hold gigabytes."""
    if encoding in ("", "identity"):
        return content
    unpacker = zlib.decompressobj(wbits=47)  # of gzip, or zlib
    try:
        content = unpacker.decompress(content, MOST)
    except zlib.error as error:
        raise httpx2.DecodingError(f"not readable as {encoding}: {error}") from error
    if unpacker.unconsumed_tail:
        raise httpx2.ReadError(f"the reply has more than {MOST:,} bytes")
    return content


def leads_away(url, location):
    """To another host, or out of TLS: prompts, images and the key would go along."""
    there = url.join(location)
    out_of_tls = url.scheme == "https" and there.scheme == "http"
    return out_of_tls or (there.host, there.port) != (url.host, url.port)


def new_client(url, seconds):
    """An httpx client for one server. A proxy of the environment is used for https alone, where it
    sees no more than the host's name."""
    host, proxy = urlsplit(url).hostname, None
    if url.startswith("https:") and not urllib.request.proxy_bypass(host):
        found = urllib.request.getproxies()
        proxy = found.get("https", found.get("all"))
    return httpx2.AsyncClient(
        transport=WholeReplies(seconds, proxy),
        timeout=seconds,
        headers={"Accept-Encoding": "gzip"},
        follow_redirects=True,
    )


# --- keys -----------------------------------------------------------------------------------------


def key_for(url, name):
    """The key in the environment variable `name`, or OPENAI_API_KEY, or "none", for this server.

    Raises UserError for a key that no header can carry, for an address that is none, and for one
    to which the key would travel in the clear."""
    variable = name if os.environ.get(name) else "OPENAI_API_KEY"
    key = os.environ.get(variable, "").strip() or "none"
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"{variable}: the key has a space or a character that no HTTP header can carry; copy "
            "it once more"
        )
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{shown(url)}: not a server's address; write it as http://host:port/v1")
    has_secret = key != "none" or parts.password is not None
    if parts.scheme == "http" and has_secret and is_public(parts.hostname):
        raise UserError(
            f"{shown(url)}: over http the key could be read on the way; use https, or unset "
            f"{variable} if the server needs none"
        )
    return key


def is_public(host):
    """Is the host anywhere but on this machine or in a private network?"""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return "." in host and not host.endswith(AT_HOME)
    addresses = [ipaddress.ip_address(entry[4][0].partition("%")[0]) for entry in found]
    return any(address.is_global for address in addresses)


def shown(url):
    """An address as it may be printed and stored: without user, password and query."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def secrets_of(url, key):
    """Every form in which a library may print the key or the address's password."""
    forms = set()
    for secret in (key, urlsplit(url).password or ""):
        if len(secret) > 5:  # shorter ones, as "none" and "EMPTY", are no secrets
            forms |= {secret, unquote(secret), quote(secret, safe=""), repr(secret)[1:-1]}
    for _ in range(2):  # in JSON, and in JSON that is quoted in JSON
        forms |= {json.dumps(form)[1:-1] for form in forms}
    return sorted(forms, key=len, reverse=True)
