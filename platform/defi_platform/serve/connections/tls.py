"""The certificate of the public port."""

from __future__ import annotations

import logging
import os
import ssl

from defi_platform.errors import ConfigError

log = logging.getLogger(__name__)


def server_context(cert: str | None, key: str | None) -> ssl.SSLContext | None:
    """The TLS (1.2 and later) of a socket; None without a certificate.

    Args:
        cert: file of the certificate chain (PEM).
        key: file of its private key (PEM).

    Raises:
        ConfigError: one of the two is absent, unreadable or no match for the other.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        given, absent = ("tls_cert", "tls_key") if key is None else ("tls_key", "tls_cert")
        raise ConfigError(f"security.{given} is set, security.{absent} is not; TLS needs both files.")
    for name, path in (("tls_cert", cert), ("tls_key", key)):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ConfigError(f"security.{name} {path}: {error.strerror or error}.") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    try:
        # An encrypted key would otherwise ask for its password on the terminal of a process that has none.
        context.load_cert_chain(cert, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise ConfigError(
            f"security.tls_cert {cert} and security.tls_key {key} are no certificate chain and its key in PEM form "
            f"without a password ({reason})."
        ) from error
    return context


class Certificate:
    """The certificate of a process that runs for months: read again when its files change, as renewals do."""

    def __init__(self, cert: str | None, key: str | None) -> None:
        """Reads nothing yet; see `server_context` for the files."""
        self._files = (cert, key)
        self._version: tuple[tuple[int, int], ...] | None = None
        self._context: ssl.SSLContext | None = None

    @property
    def wanted(self) -> bool:
        """Whether connections are encrypted."""
        return self._files != (None, None)

    def read(self) -> None:
        """Reads the files. Raises: ConfigError, as `server_context`."""
        self._version = self._present()
        self._context = server_context(*self._files)

    def context(self) -> ssl.SSLContext | None:
        """For a new connection: the latest certificate that was in order; None without one."""
        if self.wanted and self._present() != self._version:
            try:
                self.read()
            except ConfigError as error:
                log.warning("the certificate stays as it was: %s", error)
        return self._context

    def _present(self) -> tuple[tuple[int, int], ...]:
        found = []
        for path in self._files:
            try:
                status = os.stat(str(path))
                found.append((status.st_mtime_ns, status.st_ino))
            except OSError:
                found.append((0, 0))
        return tuple(found)
