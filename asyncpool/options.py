"""The keywords of `Pool(...)` and `SyncPool(...)`, for type checkers; the table in the README says what each does."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeAlias, TypedDict

from psycopg.abc import AdaptContext

AsyncCallback: TypeAlias = Callable[[Any], Awaitable[object]]
BlockingCallback: TypeAlias = Callable[[Any], object]
Mode: TypeAlias = Literal["rollback", "session", "discard"]


class CommonOptions(TypedDict, total=False):
    """The pool's own options that are no callables."""

    name: str
    min_size: int
    max_size: int
    lanes: int
    acquire_timeout: float | None
    max_waiting: int | None
    max_lifetime: float | None
    max_idle: float | None
    max_uses: int | None
    connect_timeout: float
    max_connecting: int
    backoff_initial: float
    backoff_max: float
    check_interval: float | None
    check_timeout: float
    cancel_timeout: float
    long_held_after: float | None
    monitor: str | os.PathLike[str] | None
    debug: bool | None


class ConnectOptions(TypedDict, total=False):
    """Psycopg's, and those of libpq 18; what counts is the libpq at hand."""

    autocommit: bool
    prepare_threshold: int | None
    context: AdaptContext | None
    cursor_factory: Any
    service: str
    user: str
    password: str
    passfile: str
    channel_binding: str
    dbname: str
    host: str
    hostaddr: str
    port: int | str
    client_encoding: str
    options: str
    application_name: str
    fallback_application_name: str
    keepalives: int | str
    keepalives_idle: int | str
    keepalives_interval: int | str
    keepalives_count: int | str
    tcp_user_timeout: int | str
    sslmode: str
    sslnegotiation: str
    sslcompression: int | str
    sslcert: str
    sslkey: str
    sslcertmode: str
    sslpassword: str
    sslrootcert: str
    sslcrl: str
    sslcrldir: str
    sslsni: int | str
    requirepeer: str
    require_auth: str
    min_protocol_version: str
    max_protocol_version: str
    ssl_min_protocol_version: str
    ssl_max_protocol_version: str
    gssencmode: str
    krbsrvname: str
    gsslib: str
    gssdelegation: str
    replication: str
    target_session_attrs: str
    load_balance_hosts: str
    scram_client_key: str
    scram_server_key: str
    oauth_issuer: str
    oauth_client_id: str
    oauth_client_secret: str
    oauth_scope: str
    sslkeylogfile: str


class Options(CommonOptions, ConnectOptions, total=False):
    """The keywords of `Pool(...)`."""

    reset: Mode | AsyncCallback
    configure: AsyncCallback | None
    check: AsyncCallback | None
    setup: AsyncCallback | None


class BlockingOptions(CommonOptions, ConnectOptions, total=False):
    """The keywords of `SyncPool(...)`."""

    reset: Mode | BlockingCallback
    configure: BlockingCallback | None
    check: BlockingCallback | None
    setup: BlockingCallback | None
