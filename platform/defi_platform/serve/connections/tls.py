"""The certificate of the public port."""

from __future__ import annotations

import ssl

from defi_platform.errors import ConfigError


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
