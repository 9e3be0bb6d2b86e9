"""How a reply comes over the network: whole, in time, from the address that was asked; and where a
key may go and be seen.

The usual time-out is one of silence: a server that drips on and on never meets it. Here it is the
time from the request to the last byte of its reply.
"""

import asyncio
import ipaddress
import os
from urllib.parse import quote, urlsplit

import httpx2

from support.cli import UserError

AT_HOME = (".local", ".localhost", ".internal", ".lan")  # names that only a private network has


class WholeReplies(httpx2.AsyncClient):
    """Gives each reply its time-out to come, all of it."""

    async def send(self, request, **options):
        seconds = self.timeout.read
        try:
            async with asyncio.timeout(seconds):
                return await super().send(request, **options)
        except TimeoutError as error:
            text = f"no whole reply within {seconds:g} s"
            raise httpx2.ReadTimeout(text, request=request) from error


def new_client(url, seconds):
    """An httpx client for one server. A proxy of the environment is used for https alone, where it
    sees no more than the host's name."""
    return WholeReplies(
        timeout=seconds,
        trust_env=url.startswith("https:"),
        follow_redirects=False,  # prompts, images and the key would go along
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
    if parts.username is not None:
        raise UserError(f"{shown(url)}: a password in the address; put a key into {variable}")
    if parts.scheme == "http" and key != "none" and is_public(parts.hostname):
        raise UserError(
            f"{shown(url)}: over http the key could be read on the way; use https, or unset "
            f"{variable} if the server needs none"
        )
    return key


def is_public(host):
    """Is the host anywhere but on this machine or in a private network?"""
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return "." in host and not host.endswith(AT_HOME)


def shown(url):
    """An address as it may be printed and stored: without user, password and query."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def forms_of(key):
    """A key as it is and as an address has it; "none" and "EMPTY" are no secrets."""
    return {key, quote(key, safe="")} if len(key) > 5 else set()
