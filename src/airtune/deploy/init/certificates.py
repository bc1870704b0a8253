"""A certificate authority of one's own, a server certificate, and one key pair for each node.

Elliptic curve P-384 throughout (SuperNode authentication wants a NIST curve). The authority may sign server
certificates only, none below another authority; the server's certificate names every host that clients may dial.
Keys are secrets, not draws of an experiment: they come from the operating system.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airtune.errors import InputError, MissingPackageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate, CertificateBuilder, GeneralName, KeyUsage

AUTHORITY_DAYS = 3650
SERVER_DAYS = 825
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # the SuperLink's own processes dial it
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


@dataclass(frozen=True)
class KeyPair:
    """A private key and what belongs to it, as the content of two files."""

    private: bytes
    public: bytes


def check_host(host: str) -> None:
    """Raise InputError if a host is neither a DNS name nor an IP address."""
    if _address(host) is None and not (len(host) <= 253 and all(_LABEL.fullmatch(part) for part in host.split("."))):
        raise InputError(f"--host: {host!r} is no host; valid: a DNS name or an IP address that the devices dial")


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches the host."""
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def check_library() -> None:
    """Raise MissingPackageError if the package that makes keys is not installed."""
    try:
        import cryptography.x509  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise MissingPackageError(
            "deploy init: the package cryptography is not installed; valid: pip install 'airtune[flower]'"
        ) from error


def make_certificates(hosts: Sequence[str]) -> tuple[KeyPair, KeyPair]:
    """Return the authority and the server certificate it signed, keys and certificates in PEM.

    hosts : that the devices dial; the loopback names are always added.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    authority_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    issuer = named("airtune deployment authority")
    authority = (
        _valid(x509.CertificateBuilder(), AUTHORITY_DAYS)
        .subject_name(issuer)
        .issuer_name(issuer)
        .public_key(authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    server = (
        _valid(x509.CertificateBuilder(), SERVER_DAYS)
        .subject_name(named(hosts[0][:64]))
        .issuer_name(issuer)
        .public_key(server_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_names(hosts)), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(server_key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    return _pem(authority_key, authority), _pem(server_key, server)


def make_node_key() -> KeyPair:
    """Return the key pair of a node in OpenSSH's formats, as ``ssh-keygen -t ecdsa -b 384`` makes it."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return KeyPair(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), public + b"\n")


def _pem(key: EllipticCurvePrivateKey, certificate: Certificate) -> KeyPair:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return KeyPair(private, certificate.public_bytes(Encoding.PEM))


def _valid(builder: CertificateBuilder, days: int) -> CertificateBuilder:
    """Return the builder with a serial number, and valid from an hour ago (clocks differ) for some days."""
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    start = now - datetime.timedelta(hours=1)
    end = now + datetime.timedelta(days=days)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)


def _usage(*, signs_certificates: bool) -> KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _names(hosts: Sequence[str]) -> list[GeneralName]:
    from cryptography import x509

    names: list[GeneralName] = []
    for host in dict.fromkeys([*hosts, *LOOPBACK]):
        address = _address(host)
        names.append(x509.DNSName(host) if address is None else x509.IPAddress(address))
    return names


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
