"""API keys: what a key file says, new keys, and which key was sent. docs/security.md says how to use them.

A key is 256 random bits, so its plain SHA-256 is enough to store: slow hashes protect passwords that people can guess.
The file holds one line per key, and never the key itself:

    NAME SCOPE[,SCOPE] sha256:HEX [per_minute=N] [concurrent=N]        # a comment
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.logs import log

PREDICT, ADMIN = "predict", "admin"
SCOPES = (PREDICT, ADMIN)
"""predict: forecasts, and what the service offers. admin: that, and what it says of its hosts and its traffic."""
RELOAD_S = 2.0
"""A changed key file is noticed within this time."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_LIMIT = re.compile(r"(per_minute|concurrent)=([0-9]{1,9})")
_LONGEST = 256


class KeyFileError(ValueError):
    """Keys that cannot be read. The message names the line and holds nothing of its text, which may be a secret."""


@dataclass(frozen=True)
class Key:
    """One entry. per_minute, concurrent: its own limits in place of the configured ones; 0 is none."""

    name: str
    scopes: frozenset[str]
    digest: str
    per_minute: int | None = None
    concurrent: int | None = None

    def may(self, scope: str) -> bool:
        return scope in self.scopes or ADMIN in self.scopes


def parse_keys(*texts: str) -> tuple[Key, ...]:
    """The lines of key files; ";" ends a line too, for environment variables. Raises KeyFileError."""
    keys: dict[str, Key] = {}
    for text in texts:
        for number, line in enumerate(re.split(r"[\n;]", text), start=1):
            if words := line.split("#", 1)[0].split():
                key = _parse_line(words, f"line {number} of the API keys")
                if key.name in keys:
                    raise KeyFileError(f"line {number} of the API keys: another line has this name")
                keys[key.name] = key
    return tuple(keys.values())


def _parse_line(words: Sequence[str], place: str) -> Key:
    if len(words) < 3:
        raise KeyFileError(f"{place}: must be NAME SCOPES sha256:HEX, as `python -m serve_app.cli new-key` prints it")
    name, scopes, digest, *limits = words
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"{place}: the name must match {_NAME.pattern}")
    if not set(scopes.split(",")) <= set(SCOPES):
        raise KeyFileError(f"{place}: scopes are {' and '.join(SCOPES)}, with a comma between them")
    if not (found := _DIGEST.fullmatch(digest)):
        raise KeyFileError(f"{place}: the third word must be sha256: and 64 hexadecimal digits; never the key itself")
    matches = [_LIMIT.fullmatch(limit) for limit in limits]
    values = {match[1]: int(match[2]) for match in matches if match}
    if len(values) != len(limits):
        raise KeyFileError(f"{place}: after the hash may come per_minute=N and concurrent=N, each once")
    return Key(name, frozenset(scopes.split(",")), found[1], **values)


def new_key(name: str, scopes: Sequence[str], limits: Sequence[str] = ()) -> tuple[str, str]:
    """(a fresh key, its line for the file). Raises KeyFileError for a name or scope that a file could not hold."""
    secret = "kronos_" + secrets.token_urlsafe(32)
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"the name must match {_NAME.pattern}")
    line = " ".join((name, ",".join(scopes), f"sha256:{_digest(secret)}", *limits))
    parse_keys(line)
    return secret, line


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


class KeyRing:
    """The keys in force: those of a file, which is read again when it changes, and those given as text."""

    def __init__(self, path: str | None, text: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        """Raises KeyFileError: unreadable, malformed, or without a key."""
        self._path = Path(path) if path else None
        self._text = text
        self._clock = clock
        self._checked = clock()
        self._stamp = self._stamp_now()
        self._keys = self._load()

    def find(self, secret: str) -> Key | None:
        """The entry of a key that a client sent. Takes the same time whichever entry it is."""
        self._reload_if_changed()
        if len(secret) > _LONGEST:
            return None
        digest, found = _digest(secret), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _load(self) -> tuple[Key, ...]:
        texts = [self._text]
        if self._path is not None:
            try:
                texts.append(self._path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise KeyFileError(f"the file of API keys cannot be read: {type(error).__name__}") from None
        keys = parse_keys(*texts)
        if not keys:
            raise KeyFileError("there is no API key: make one with `python -m serve_app.cli new-key NAME`")
        return keys

    def _stamp_now(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat() if self._path else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None

    def _reload_if_changed(self) -> None:
        if self._path is None or self._clock() - self._checked < RELOAD_S:
            return
        self._checked = self._clock()
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = self._load()
            log(logging.INFO, "API keys read again", names=[key.name for key in self._keys])
        except KeyFileError as error:
            # Nobody is locked out, and nobody let in, by a file that is half written.
            log(logging.ERROR, "the changed API keys are not used; the former stay in force", error_message=str(error))


def address_error(host: str | None, keys_required: bool, allow_anonymous: bool) -> str | None:
    """Why the service must not listen on this address; None if it may. host None: there is no HTTP."""
    if host is None or keys_required or allow_anonymous or _is_loopback(host):
        return None
    return (
        f"http_options.host is {host}, which others can reach, and there are no API keys: set auth.keys_file "
        "(see docs/security.md), or host 127.0.0.1, or auth.allow_anonymous_on_public_address: true to serve anybody"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
