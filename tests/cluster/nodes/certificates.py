"""The cluster's certificate authority, and the certificates by which its parts know each other."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = ["Authority", "new_authority", "new_key"]

_DAYS = 30
_BACK = timedelta(hours=1)
"""Clocks of a machine and its guests differ."""


@dataclass(frozen=True)
class Authority:
    """Signs certificates and writes them to `folder`; its own is ca.crt there."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def file(self) -> Path:
        return self.folder / "ca.crt"

    def issue(self, name: str, user: str, groups: Sequence[str] = (), addresses: Sequence[str] = ()) -> None:
        """Writes NAME.crt and NAME.key, for who calls itself `user`; good for a server at `addresses` too."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        subject = x509.Name([*names, x509.NameAttribute(NameOID.COMMON_NAME, user)])
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = _builder(subject, self.certificate.subject, key).add_extension(x509.ExtendedKeyUsage(usages), False)
        if addresses:
            builder = builder.add_extension(x509.SubjectAlternativeName([_name(one) for one in addresses]), False)
        _write(self.folder / f"{name}.crt", builder.sign(self.key, hashes.SHA256()).public_bytes(_PEM))
        _write(self.folder / f"{name}.key", _private(key))


_PEM = serialization.Encoding.PEM


def new_authority(folder: Path) -> Authority:
    """Makes a new one, in an existing folder."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-cluster")])
    constraints = x509.BasicConstraints(ca=True, path_length=None)
    certificate = _builder(subject, subject, key).add_extension(constraints, True).sign(key, hashes.SHA256())
    authority = Authority(folder, key, certificate)
    _write(authority.file, certificate.public_bytes(_PEM))
    _write(folder / "ca.key", _private(key))
    return authority


def new_key(file: Path) -> None:
    """Writes a private key, and its public half to FILE.pub: for signing service accounts' tokens."""
    key = ec.generate_private_key(ec.SECP256R1())
    _write(file, _private(key))
    public = key.public_key().public_bytes(_PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    _write(file.with_suffix(".pub"), public)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACK)
        .not_valid_after(now + timedelta(days=_DAYS))
    )


def _name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    # Service account keys must be readable to Kubernetes, which knows this form of elliptic ones.
    form = serialization.PrivateFormat.TraditionalOpenSSL
    return key.private_bytes(_PEM, form, serialization.NoEncryption())


def _write(file: Path, content: bytes) -> None:
    file.touch(mode=0o600)
    file.write_bytes(content)
