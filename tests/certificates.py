"""Authorities and certificates for 127.0.0.1, made on the spot."""

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


class Authority:
    """Signs certificates. `files` writes one with its key and this authority's own."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(f"authority {name}")
        now = datetime.datetime.now(datetime.UTC)
        self._certificate = self._sign(self._name, self._key, now - DAY, now + DAY, authority=True)
        self.pem = self._certificate.public_bytes(serialization.Encoding.PEM)

    def files(self, folder: Path, name: str, *, expired: bool = False) -> tuple[Path, Path]:
        """Writes NAME.pem, NAME.key and NAME.authority.pem, each at once; returns the first two."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        made = self._sign(_name(name), key, now - DAY, now - DAY / 2 if expired else now + DAY, authority=False)
        secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        replace(folder / f"{name}.key", secret)
        replace(folder / f"{name}.pem", made.public_bytes(serialization.Encoding.PEM))
        replace(folder / f"{name}.authority.pem", self.pem)
        return folder / f"{name}.pem", folder / f"{name}.key"

    def _sign(self, subject, key, start, end, *, authority):
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def replace(path: Path, data: bytes) -> None:
    """Puts a file in another's place, as whoever rotates certificates should."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(data)
    os.replace(fresh, path)  # noqa: PTH105


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
