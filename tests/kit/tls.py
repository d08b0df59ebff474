"""What a server needs to take TLS. The embedded PostgreSQL was built without OpenSSL: one of the system's is run."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# Where Debian and its like keep theirs, by version.
PLACES = Path("/usr/lib/postgresql")
OPENSSL_DEADLINE = 30.0


@contextmanager
def tls_settings() -> Iterator[tuple[Path, dict[str, str]]]:
    """An installed PostgreSQL that has OpenSSL, and the settings for a certificate made for it; or skip the test."""
    if os.name != "posix":
        pytest.skip("a server that takes TLS is looked for on Unix only")
    installation = _installation_with_tls()
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("no `openssl` on this machine to make a certificate")
    # Below /tmp: the server's user reads it, and that need not be ours.
    directory = Path(tempfile.mkdtemp(prefix="asyncpool-tls-", dir="/tmp"))
    try:
        certificate, key = _make_certificate(openssl, directory)
        yield installation, {"ssl": "on", "ssl_cert_file": str(certificate), "ssl_key_file": str(key)}
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _installation_with_tls() -> Path:
    for postgres in sorted(PLACES.glob("*/bin/postgres"), reverse=True):
        installation = postgres.parent.parent
        if (installation / "bin/initdb").exists() and b"libssl" in postgres.read_bytes():
            return installation
    pytest.skip(f"no PostgreSQL with OpenSSL in {PLACES}")


def _make_certificate(openssl: str, directory: Path) -> tuple[Path, Path]:
    certificate, key = directory / "server.crt", directory / "server.key"
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        [openssl, "req", *options, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
        timeout=OPENSSL_DEADLINE,
    )
    key.chmod(0o600)
    if os.geteuid() == 0:  # then the server runs as `nobody`
        owner = pwd.getpwnam("nobody")
        for path in (directory, certificate, key):
            os.chown(path, owner.pw_uid, owner.pw_gid)
    return certificate, key
