"""Access to a served policy: tokens, and the rate of each."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from collections import OrderedDict
from pathlib import Path

from defi_platform.config import SecurityConfig
from defi_platform.errors import ConfigError

log = logging.getLogger(__name__)

MIN_TOKEN_CHARACTERS = 16
MAX_TOKEN_CHARACTERS = 512
REREAD_S = 1.0
"""Seconds between two looks at the tokens file."""
MAX_BUCKETS = 10_000
"""Addresses whose rate is remembered; the one that has been silent for longest is forgotten first."""
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


class AccessError(Exception):
    """A client that may not come in: its words are for the client and do not repeat its token."""


def read_tokens(path: str) -> dict[str, bytes]:
    """Names of clients and the SHA-256 of their tokens.

    Args:
        path: of the tokens file.

    Raises:
        ConfigError: it cannot be read or a line does not fit; names the line, never the token.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"security.tokens {path}: {getattr(error, 'strerror', None) or error}.") from error
    tokens: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, token = (part.strip() for part in line.partition(":"))
        where = f"security.tokens {path}, line {number}"
        if not colon or not name or not token:
            raise ConfigError(f"{where}: write it as `name: token` or `name: SHA-256 of the token`.")
        if name in tokens:
            raise ConfigError(f"{where}: the name '{name}' is there already.")
        if _DIGEST.fullmatch(token):
            digest = bytes.fromhex(token)
        elif len(token) > MAX_TOKEN_CHARACTERS or not (token.isascii() and token.isprintable()):
            raise ConfigError(
                f"{where}: the token of '{name}' cannot be sent in a header; write up to {MAX_TOKEN_CHARACTERS} "
                "printable ASCII characters, such as `openssl rand -hex 24` makes."
            )
        elif len(token) < MIN_TOKEN_CHARACTERS:
            raise ConfigError(
                f"{where}: the token of '{name}' has {len(token)} characters, at least {MIN_TOKEN_CHARACTERS} are "
                "needed; `openssl rand -hex 24` makes one."
            )
        else:
            digest = hashlib.sha256(token.encode()).digest()
        if digest in tokens.values():
            raise ConfigError(f"{where}: '{name}' has the token of another name; give each client its own.")
        tokens[name] = digest
    if not tokens:
        raise ConfigError(f"security.tokens {path} names no client; write one a line as `name: token`.")
    return tokens


class Bucket:
    """A rate with bursts of one second."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._burst = max(1.0, rate)
        self._left = self._burst
        self._at = time.monotonic()

    def take(self) -> float:
        """Takes one, or says how many seconds it is too early (and takes none)."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return (1 - self._left) / self._rate

    def spend(self, number: int) -> None:
        """Takes more of what has been let in: a batch may be larger than a burst, and delays what comes after it.

        Args:
            number: beside the one of `take`.
        """
        self._left -= number


class Access:
    """The tokens and rates of one replica."""

    def __init__(self, security: SecurityConfig) -> None:
        """Reads the tokens.

        Args:
            security: as configured.

        Raises:
            ConfigError: the tokens file or the rate does not fit.
        """
        if security.rate is not None and not security.rate > 0:
            raise ConfigError(
                f"security.rate is {security.rate}; write messages per second above 0, or null."
            )
        self._path = security.tokens
        self._rate = security.rate
        self._tokens: dict[str, bytes] = {}
        self._version: tuple[int, ...] = ()
        self._looked = time.monotonic()
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        if self._path is not None:
            self._version = _version(self._path)
            self._tokens = read_tokens(self._path)

    @property
    def required(self) -> bool:
        """Clients need a token."""
        return self._path is not None

    def admit(self, authorization: str | None) -> str | None:
        """The name of the client with this header; None where no token is asked for.

        Args:
            authorization: value of the header `Authorization`.

        Raises:
            AccessError: there is no token, or none of these.
        """
        if self._path is None:
            return None
        self._read_again()
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip()
        if scheme.lower() not in ("api-key", "bearer") or not token:
            raise AccessError(
                "this server asks for a token: send `Authorization: Api-Key TOKEN` (or Bearer)."
            )
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise AccessError("this token is not known here.")
        digest = hashlib.sha256(token.encode(errors="surrogateescape")).digest()
        found = None
        for name, known in self._tokens.items():  # all of them, so that the time says nothing
            if hmac.compare_digest(digest, known):
                found = name
        if found is None:
            raise AccessError("this token is not known here.")
        return found

    def knows(self, name: str | None) -> bool:
        """Whether a client that another replica has admitted by this name may come in here."""
        self._read_again()
        return self._path is None or name in self._tokens

    def bucket(self, name: str | None, address: str) -> Bucket | None:
        """The rate of a client; None where there is no limit.

        Args:
            name: of its token.
            address: of the client, `host:port`; its host counts where there is no token.
        """
        if self._rate is None:
            return None
        key = f"token {name}" if name is not None else address.rpartition(":")[0]
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(self._rate)
            if len(self._buckets) > MAX_BUCKETS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return bucket

    def _read_again(self) -> None:
        """Tokens can be given out and taken back while the server runs."""
        now = time.monotonic()
        if self._path is None or now - self._looked < REREAD_S:
            return
        self._looked = now
        try:
            version = _version(self._path)
            if version != self._version:
                self._tokens = read_tokens(self._path)
                self._version = version
                log.info("security.tokens %s: %d clients", self._path, len(self._tokens))
        except (ConfigError, OSError) as error:
            log.warning("the tokens stay as they were: %s", error)


def _version(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return (status.st_mtime_ns, status.st_size, status.st_ino)
