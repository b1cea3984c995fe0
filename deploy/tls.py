"""TLS and mutual TLS of the gRPC servers, from PEM files that are read again when they change.

gRPC asks for the certificate before each handshake (`grpc.dynamic_ssl_server_credentials`, which serves `grpc.aio` as well), so a new
connection sees a rotated certificate, connections that are open stay, and nothing is restarted.
"""

import logging
import ssl
import threading
from pathlib import Path
from typing import Any

import grpc

from deploy.settings import SettingsError, is_loopback

log = logging.getLogger(__name__)


class ServerIdentity:
    """A server's certificate chain and key, and the authority of its clients, in files.

    Files that do not fit each other (a rotation half done) or cannot be read leave in use what was there before. Safe to share between
    threads.

    Args:
        certificate: PEM chain.
        key: PEM private key of it, without a password.
        client_authority: PEM certificates that sign clients' certificates; with it clients must present one. None: they need none.
    """

    def __init__(self, certificate: Path, key: Path, client_authority: Path | None = None) -> None:
        """Raises SettingsError: the files cannot be used."""
        self._certificate, self._key, self._client_authority = certificate, key, client_authority
        self._lock, self._reported = threading.Lock(), ""
        try:
            self._identity = self._look()
            self._configuration = self._read()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise SettingsError(f"{self}: {error}") from error

    def __str__(self) -> str:
        files = {"tls_certificate": self._certificate, "tls_key": self._key, "tls_client_authority": self._client_authority}
        return ", ".join(f"{name} {path}" for name, path in files.items() if path is not None)

    def credentials(self) -> grpc.ServerCredentials:
        """What a server's port is opened with."""
        return grpc.dynamic_ssl_server_credentials(self._configuration, self.changed, self._client_authority is not None)

    def changed(self) -> Any:
        """A new certificate configuration if the files have changed and can be used, else None: gRPC keeps the one that it has."""
        with self._lock:
            try:
                identity = self._look()
                if identity == self._identity:
                    return None
                configuration = self._read()
                if identity != self._look():
                    return None  # written at this moment: the next connection looks again
            except (OSError, ValueError) as error:
                if self._reported != str(error):
                    self._reported = str(error)
                    log.error("%s cannot be used, what was read before stays in use: %s", self, error)  # noqa: TRY400
                return None
            self._identity, self._reported = identity, ""
            log.info("%s: read again", self)
            return configuration

    def _look(self) -> tuple[tuple[int, ...], ...]:
        found = [path.stat() for path in (self._certificate, self._key, self._client_authority) if path is not None]
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)

    def _read(self) -> Any:
        """Raises OSError, ValueError: the files are not there, no PEM, or do not belong together."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate, self._key, password=lambda: b"")  # else it would ask the terminal for one
        authority = None
        if self._client_authority is not None:
            context.load_verify_locations(self._client_authority)
            authority = self._client_authority.read_bytes()
        return grpc.ssl_server_certificate_configuration([(self._key.read_bytes(), self._certificate.read_bytes())], authority)


def server_credentials(
    host: str, certificate: Path | None, key: Path | None, client_authority: Path | None = None
) -> grpc.ServerCredentials | None:
    """The TLS of a server that binds `host`; None: without, which only loopback may be.

    Raises:
        SettingsError: naming the setting.
    """
    if certificate is None or key is None:
        if (certificate, key, client_authority) != (None, None, None):
            raise SettingsError("tls_certificate, tls_key, tls_client_authority: give the first two, or none of them")
        if not is_loopback(host):
            raise SettingsError(f"{host} can be reached from outside: set tls_certificate and tls_key, or bind 127.0.0.1")
        return None
    return ServerIdentity(certificate, key, client_authority).credentials()
