"""From a connect error to its kind and its remedy: without a server. That the words are the servers', others test."""

from __future__ import annotations

import errno
import os

import psycopg
import pytest
from psycopg import errors as e

from asyncpool.cli.refusals import NoAnswer, refusal_of

HBA = 'no pg_hba.conf entry for host "10.0.0.1", user "app", database "app"'


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("failed to resolve host 'nowhere': [Errno -2] Name or service not known", "DNS"),
        (f'connection to server at "db", port 5432 failed: {os.strerror(errno.ECONNREFUSED)}', "refused"),
        (f'connection to server on socket "/x/.s.PGSQL.5432" failed: {os.strerror(errno.ENOENT)}', "no socket"),
        (f'connection to server at "10.1.1.1", port 5432 failed: {os.strerror(errno.EHOSTUNREACH)}', "unreachable"),
        ('FATAL:  password authentication failed for user "app"', "password"),
        ("fe_sendauth: no password supplied", "no password"),
        ('FATAL:  database "nowhere" does not exist', "no such database"),
        ("FATAL:  no such database: nowhere", "no such database"),
        ('FATAL:  role "nobody" does not exist', "no such role"),
        ('FATAL:  role "group" is not permitted to log in', "no login"),
        ("FATAL:  sorry, too many clients already", "too many clients"),
        (
            "FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute",
            "too many clients",
        ),
        ("FATAL:  no more connections allowed (max_client_conn)", "too many clients"),
        (f"FATAL:  {HBA}, SSL encryption", "no pg_hba.conf entry"),
        (f"FATAL:  {HBA}", "no pg_hba.conf entry"),
        (f"FATAL:  {HBA}, SSL encryption\nconnection failed: FATAL:  {HBA}, no encryption", "no pg_hba.conf entry"),
        (f"FATAL:  {HBA}, no encryption", "no pg_hba.conf entry"),
        ("FATAL:  SSL required", "TLS required"),
        ('FATAL:  pg_hba.conf rejects connection for host "10.0.0.1"', "rejected by pg_hba.conf"),
        ('FATAL:  Peer authentication failed for user "app"', "peer"),
        ("server does not support SSL, but SSL was required", "no TLS"),
        ("SSL error: certificate verify failed", "certificate"),
        ('root certificate file "/etc/app/root.crt" does not exist', "certificate"),
        ("session is read-only", "wrong role"),
        ("FATAL:  unsupported startup parameter: options", "startup parameter"),
        ('FATAL:  permission denied for database "app"', "no permission"),
        ("server closed the connection unexpectedly", "closed"),
        ("something that nobody has seen", "other"),
    ],
)
def test_the_kind_is_told_by_the_words(words: str, kind: str) -> None:
    refusal = refusal_of(psycopg.OperationalError(words), words)
    assert refusal.kind == kind
    assert refusal.fix


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (e.InvalidPassword("l'authentification par mot de passe a échoué"), "password"),
        (e.TooManyConnections("désolé, trop de clients"), "too many clients"),
        (e.CannotConnectNow("le système de bases de données se lance"), "starting"),
        (e.ConnectionTimeout("connection timeout expired after 1 s"), "timeout"),
        (e.ConnectionTimeout('host "db" not resolved within 1 s'), "DNS"),
        (NoAnswer("ask for the version", 1.0), "no answer"),
        (psycopg.ProgrammingError("port is not a number between 1 and 65535"), "connection string"),
    ],
)
def test_the_kind_is_told_by_the_class_in_any_language(error: Exception, kind: str) -> None:
    assert refusal_of(error, str(error)).kind == kind


@pytest.mark.parametrize("sslmode", ["disable", "allow"])
def test_who_did_not_try_tls_is_told_to_where_there_is_no_entry_without(sslmode: str) -> None:
    words = f"FATAL:  {HBA}, no encryption"
    assert refusal_of(psycopg.OperationalError(words), words, sslmode).kind == "TLS required"
    words += f"\nFATAL:  {HBA}, SSL encryption"
    assert refusal_of(psycopg.OperationalError(words), words, sslmode).kind == "no pg_hba.conf entry"
