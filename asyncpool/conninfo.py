"""Connection parameters: merged, checked, and kept out of every message as far as they may be secret."""

from __future__ import annotations

import difflib
import os
import re
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from psycopg import ProgrammingError, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from psycopg.abc import ConnDict

_DEFAULTS = pq.Conninfo.get_defaults()

LIBPQ_OPTIONS = frozenset(option.keyword.decode() for option in _DEFAULTS)

# The keywords of psycopg's AsyncConnection.connect() that are not libpq's.
PSYCOPG_OPTIONS = frozenset({"autocommit", "prepare_threshold", "context", "row_factory", "cursor_factory"})

CONNECT_OPTIONS = LIBPQ_OPTIONS | PSYCOPG_OPTIONS

# libpq marks with "*" what a dialog should hide, but for SCRAM keys, which are as good as a password.
SECRET_OPTIONS = frozenset(
    {option.keyword.decode() for option in _DEFAULTS if option.dispchar == b"*"}
    | {"password", "sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret"}
)

# What other drivers and pools call these options, where the spelling alone does not lead there.
_CONNINFOS = ("dsn", "url", "uri")
_OTHER_NAMES = {
    "database": "dbname",
    "db": "dbname",
    "username": "user",
    "passwd": "password",
    "timeout": "acquire_timeout",
    "minconn": "min_size",
    "maxconn": "max_size",
    "max_inactive_connection_lifetime": "max_idle",
    "max_queries": "max_uses",
    "init": "configure",
    "size": "max_size",
    "pool_size": "max_size",
    "max_overflow": "max_size",
    "pool_recycle": "max_lifetime",
    "pool_pre_ping": "check_interval",
    "reconnect_timeout": "backoff_max",
    "num_workers": "max_connecting",
    "server_settings": "options",
}

# What is no option here.
_ELSEWHERE = {
    "open": "open it by a block (`async with pool`, or `with pool` of a SyncPool), or by its open()",
    "kwargs": "give what is in it as options, next to the others",
    "command_timeout": "give timeout= with each statement, or to the server: options='-c statement_timeout=5s'",
    "loop": "it is that in which the pool is opened",
}

MASK = "***"

# libpq refuses a path of this length without any I/O, after it has checked all other options.
_UNREACHABLE_SOCKET = "/" + "asyncpool" * 30

# In a message, a secret of at least this length is looked for inside of quoted names too, and everywhere.
_TELLING_LENGTH = 4
_UNMISTAKABLE_LENGTH = 6

# The words of connection errors. A word among them stays, or the hole in a well-known sentence would tell
# that it is the password.
_COMMON_TEXT = """
    a aborted accepting access actively address all already an and any are as at attempt attempts
    authentication authorization available bad be because but by can cannot certificate client closed
    connecting connection connections could current data database denied descriptor detail directory
    does down encryption entry error exist expired failed failures family fatal file find for from
    gssapi has hint host hostaddr hosts in info integer interface internet invalid is it known lacks
    letter limit local locally login lookup machine made many match method missing multiple name names
    network new no node none not number of off on online onto option or out parameter parse password
    peer permission port postgres postgresql privilege protocol received refused remaining require
    required reserved reset resolution resolve restart role roles root route running scram secure
    server service shutting slots socket ssl sslmode starting startup such superuser support supported
    supports system table tcp temporary terminated that the this time timed timeout tls to too
    translate try unable unexpectedly unix unknown unreachable unsupported up use user value verify
    was were while with
"""
_COMMON_WORDS = frozenset(_COMMON_TEXT.split())

# One character of the scheme will do: searched for as a whole, it takes quadratic time in a long word that is none.
_URL = re.compile(r"[A-Za-z0-9+.-]://(.*)\Z", re.DOTALL)
# Between the pieces of a misread password; a quote at the edge of one would be taken for the quote of a name.
_DELIMITERS = re.compile(r"""[@:/?#&=,\[\]"']""")
_SECRET_IN_QUERY = re.compile(rf"(?<=[?&])(?:{'|'.join(sorted(SECRET_OPTIONS))})=[^&]*")

# A quoted name, in the marks of the languages that PostgreSQL speaks. An apostrophe within a word is none.
_QUOTED = re.compile(
    r"""" ([^"]*) " | (?<!\w)' ([^'\n]*) '(?!\w) | « ([^»]*) » | » ([^«]*) « | [„“] ([^“”]*) [“”]""",
    re.VERBOSE,
)

# A token begins at the first quote and may hold quotes itself. Some sentences have one of libpq's own before it.
_DROPPED = re.compile(
    r"""
    \A (?P<before>
        (?: missing\ "=" | invalid\ "ssl_(?:min|max)_protocol_version"\ value
            | (?:missing|extra)\ key/value\ separator\ "=" | end\ of\ string\ reached\ when
            \ looking\ for\ matching\ "\]" )?
        [^"'«»„“”‚‘’「」『』]*
    )
    ["'«»„“”‚‘’「」『』] .* ["'«»„“”‚‘’「」『』]
    """,
    re.DOTALL | re.VERBOSE,
)

_UNKNOWN_OPTION = re.compile(r'invalid (?:URI query parameter:|connection option) "([^"]*)"')

# Their values libpq reads only when it has a socket to set them on.
_INTEGERS = ("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout")
_INTEGER = re.compile(r"\s*[+-]?[0-9]{1,9}\s*", re.ASCII)
_TOO_GREAT = 2**63

# Before it there is room for no password.
_SCHEME = re.compile(r"([a-z]{1,20}(?:\+[a-z0-9_]{1,20})?)://", re.IGNORECASE)

_PORT = re.compile(r"\s*\+?[0-9]{1,9}\s*", re.ASCII)


def check_option_names(names: Iterable[str], known: Iterable[str], called: str = "Pool") -> None:
    """Raise TypeError for a name that is not known to what was called, and suggest the nearest."""
    known = frozenset(known)
    for name in names:
        if name in known:
            continue
        message = f"{called}() got an unknown option {name!r}"
        if name in _ELSEWHERE:
            raise TypeError(f"{message}: {_ELSEWHERE[name]}")
        if name in _CONNINFOS:
            raise TypeError(f"{message}: did you mean 'conninfo', the first argument?")
        nearest = [_OTHER_NAMES[name]] if _OTHER_NAMES.get(name) in known else []
        nearest += difflib.get_close_matches(name, sorted(known), n=1)
        raise TypeError(f"{message}: did you mean {nearest[0]!r}?" if nearest else message)


def parse(conninfo: str, overrides: Mapping[str, object]) -> ConnDict:
    """Merge a connection string (URL or key=value) with parameters; one that is None is as if not given.

    Does no network I/O. Raises psycopg.ProgrammingError for what libpq or psycopg would refuse before they
    connect; neither its message nor what is chained to it holds any part of the connection string or a value.
    Raises TypeError for a conninfo that is not a str, and for a parameter that libpq does not know or whose value has
    no text of its own.
    """
    if not isinstance(conninfo, str):
        raise TypeError(f"conninfo must be a str, not {type(conninfo).__name__}")
    check_option_names(overrides, LIBPQ_OPTIONS)
    problem, params = _merge(conninfo, {name: _text(name, value) for name, value in overrides.items()})
    problem = problem or _find_bad_value(params) or _ask_libpq(params)
    if problem:
        # Raised here, where no exception is being handled: a chained one would hold the connection string.
        raise ProgrammingError(problem + _hint(conninfo))
    return params


def _text(name: str, value: object) -> str | int | None:
    """The value of a parameter. Others than these have a str() too, but none that is meant: b'…', True, a mask."""
    if value is None:
        return None
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, such as an Enum's, the text itself
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) < _TOO_GREAT:
            return value
        raise ValueError(f"{name} is an int that is too great")
    # The value may be a secret, in a wrapper that does not show it: its type must do.
    raise TypeError(f"{name} must be a str or an int, not {type(value).__name__}")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


def _merge(conninfo: str, overrides: Mapping[str, str | int | None]) -> tuple[str, ConnDict]:
    given: ConnDict = {name: value for name, value in overrides.items() if value is not None}
    if "\0" in conninfo:
        return "the connection parameters hold a null character", {}
    for name, value in given.items():
        if "\0" in str(value):
            return f"{name} holds a null character", {}
        if not _is_utf8(str(value)):
            return f"{name} is not valid UTF-8 text", {}
    try:
        params = conninfo_to_dict(conninfo, **given)
        make_conninfo("", **params)
    except ProgrammingError as error:
        return _drop_quoted(str(error)), {}
    except UnicodeError:
        return "the connection parameters are not valid UTF-8 text", {}
    return "", params


def _drop_quoted(message: str) -> str:
    return _DROPPED.sub(lambda match: f'{match["before"]}"{MASK}"', message.strip()) + _nearest_option(message)


def _nearest_option(message: str) -> str:
    """What was meant by a parameter that there is none of. It is not named itself: it may be a piece of a password."""
    named = _UNKNOWN_OPTION.search(message)
    nearest = difflib.get_close_matches(named[1], sorted(LIBPQ_OPTIONS), n=1, cutoff=0.8) if named else []
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def _find_bad_value(params: ConnDict) -> str:
    """What libpq or psycopg would find only while connecting."""
    hosts, addresses, ports = (_elements(params, name) for name in ("host", "hostaddr", "port"))
    if any(port and not (_PORT.fullmatch(port) and 1 <= int(port) <= 65535) for port in ports):
        return "port is not a number between 1 and 65535"
    if any("@" in host[1:] and not _is_path(host) for host in hosts):
        return 'host holds an "@"'
    if not addresses and not all(_is_path(host) or _is_encodable(host) for host in hosts):
        return "host is not a valid host name"
    if hosts and addresses and len(hosts) != len(addresses):
        return f"could not match {len(hosts)} host names to {len(addresses)} hostaddr values"
    if not all(_is_ip_address(address) for address in addresses if address):
        return "hostaddr is not an IP address"
    for name in _INTEGERS:
        if (value := params.get(name)) not in (None, "") and not _INTEGER.fullmatch(str(value)):
            return f"{name} is not an integer"
    try:
        int(float(params.get("connect_timeout") or 0))
    except (ValueError, OverflowError):
        return "connect_timeout is not a number"
    return ""


def _ask_libpq(params: ConnDict) -> str:
    """Have libpq check the values of its options, by a connect that fails before any I/O."""
    if "service" in params or os.environ.get("PGSERVICE"):
        # The service file may change, and hold hosts.
        return ""
    hosts = _elements(params, "host", environment="PGHOST")
    addresses = _elements(params, "hostaddr", environment="PGHOSTADDR")
    unreachable = ",".join([_UNREACHABLE_SOCKET] * max(len(hosts), len(addresses), 1))
    # An empty hostaddr keeps the one in the environment out; user and password, if not given, are looked up
    # in files.
    replaced: ConnDict = {"host": unreachable, "hostaddr": "", "user": "unused", "password": "unused"}
    pgconn = pq.PGconn.connect_start(make_conninfo("", **(params | replaced)).encode())
    message = pgconn.get_error_message()
    pgconn.finish()
    # It checks all options before it comes to the first host. What it says of a value may have several lines.
    return "" if _UNREACHABLE_SOCKET in message else _drop_quoted(message)


def _hint(conninfo: str) -> str:
    if (scheme := _SCHEME.match(conninfo)) and scheme[1] not in ("postgresql", "postgres"):
        return f" (a URL has to begin with postgresql://, not {scheme[0]})"
    if _misread_password(conninfo) is None:
        return ""
    return " (in a URL, these characters of a user name or password must be percent-encoded: % @ : / ? # & =)"


class Redactor:
    """Removes from texts what may be a password of these connection parameters, or a part of one.

    An unescaped "@" or "/" in the password of a URL makes libpq take parts of it for a host, port or database
    name. Of such a URL, everything between the first ":" and the last "@" is treated as the password.
    Otherwise names of the server, user and database are left in place, even one that equals the password.
    """

    __slots__ = ("_misread", "_plain", "_secrets", "_words")

    def __init__(self, conninfo: str, overrides: Mapping[str, object]) -> None:
        given = {name: str(value) for name, value in overrides.items() if value is not None}
        parsed = _parse_leniently(conninfo)
        secrets = {value for params in (given, parsed) for name, value in params.items() if name in SECRET_OPTIONS}
        urls = {value for value in _names(given) | _names(parsed) if _password_of_url(value)}
        misread = {password for url in urls if (password := _password_of_url(url))}
        plain = _names(given)
        if password := _misread_password(conninfo):
            misread.add(password)
            # What libpq took for a name begins within the password, and the last one ends behind its "@".
            secrets |= {
                name for name in _names(parsed) if "@" in name or (len(name) >= _TELLING_LENGTH and name in password)
            }
        else:
            plain |= _names(parsed)
        plain -= urls
        secrets |= {piece for password in misread for piece in _DELIMITERS.split(password)}
        self._misread = frozenset(urls | _variants(misread))
        self._plain = frozenset(plain)
        self._secrets = frozenset(_variants(secrets) - self._plain - {""})
        self._words = self._compile()

    def redact(self, text: str) -> str:
        """The text with every possible secret in it masked."""
        if not self._secrets:
            return text
        if self._words is not None:
            text = self._words.sub(self._mask_word, text)
        return _QUOTED.sub(self._mask_quoted, text)

    def mask(self, name: str) -> str:
        """A name on its own: as it is, or nothing of it."""
        secret = self._holds_secret(name) or (self._words is not None and self._words.search(name))
        return MASK if secret and name not in self._plain else name

    def _compile(self) -> re.Pattern[str] | None:
        # A short password of a proper conninfo is nowhere to be expected but in quotes.
        shortest = 1 if self._misread else _TELLING_LENGTH
        words = {
            secret
            for secret in self._secrets - _COMMON_WORDS
            if len(secret) >= (shortest if re.search(r"\w", secret) else _TELLING_LENGTH)
        }
        if not words:
            return None
        # A longer name that holds a secret is matched first, and left.
        words |= {name for name in self._plain if any(word in name for word in words)}
        return re.compile("|".join(map(_word_pattern, sorted(words, key=len, reverse=True))))

    def _mask_word(self, match: re.Match[str]) -> str:
        return match[0] if match[0] in self._plain else MASK

    def _mask_quoted(self, match: re.Match[str]) -> str:
        token = match[match.lastindex or 0]
        if token in self._plain or not self._holds_secret(token):
            return match[0]
        return f"{match[0][0]}{MASK}{match[0][-1]}"

    def _holds_secret(self, token: str) -> bool:
        if token in self._secrets or MASK in token:
            return bool(token)
        if any(len(secret) >= _TELLING_LENGTH and secret in token for secret in self._secrets):
            return True
        # The server cuts long names.
        return len(token) >= _TELLING_LENGTH and any(token in misread for misread in self._misread)


def describe(params: Mapping[str, object], redactor: Redactor) -> str:
    """`user@host:port/dbname` for logs and reprs, as far as given and not secret."""
    user, hosts, dbname = (str(params.get(name) or "") for name in ("user", "host", "dbname"))
    places = _elements(params, "host") if hosts else _elements(params, "hostaddr")
    ports = _elements(params, "port")
    if len(ports) == 1:
        ports *= len(places) or 1
    ports += [""] * (len(places) - len(ports))
    servers = [
        _bracketed(redactor.mask(place)) + (port and f":{redactor.mask(port)}")
        for place, port in zip(places or [""], ports or [""], strict=False)
    ]
    text = (user and f"{redactor.mask(user)}@") + ",".join(servers) + (dbname and f"/{redactor.mask(dbname)}")
    return text or "libpq's defaults"


def needs_lookup(params: Mapping[str, object]) -> bool:
    """Whether a host name must be resolved before connecting. Hosts from a service file are not seen."""
    addresses = _elements(params, "hostaddr", environment="PGHOSTADDR")
    hosts = _elements(params, "host", environment="PGHOST")
    addresses += [""] * (len(hosts) - len(addresses))
    return any(
        host and not address and not _is_path(host) and not _is_ip_address(host)
        for host, address in zip(hosts, addresses, strict=False)
    )


def _bracketed(place: str) -> str:
    return f"[{place}]" if ":" in place else place


def _elements(params: Mapping[str, object], name: str, environment: str = "") -> list[str]:
    value = params.get(name)
    if value is None and environment:
        value = os.environ.get(environment)
    return str(value).split(",") if value not in (None, "") else []


def _is_path(host: str) -> bool:
    # A directory of sockets, also on Windows, or Linux's abstract sockets.
    return host.startswith(("/", "@")) or host[1:2] == ":"


def _is_encodable(host: str) -> bool:
    # As socket.getaddrinfo() does it, whose UnicodeError psycopg lets through.
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def _is_ip_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _parse_leniently(conninfo: str) -> dict[str, str]:
    try:
        return {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
    except (ProgrammingError, UnicodeError):
        return {}


def _names(params: Mapping[str, str]) -> set[str]:
    """The values that are no secrets; of a list, as hosts may be, also its elements."""
    values = {value for name, value in params.items() if name not in SECRET_OPTIONS}
    return values | {element for value in values for element in value.split(",")}


def _misread_password(conninfo: str) -> str | None:
    """What may be the password of a URL that libpq reads otherwise than it was meant; else None."""
    if conninfo.startswith(("postgresql://", "postgres://")):
        # libpq ends user and password at the first "@", and finds none behind a "/".
        before = _user_and_password(conninfo.partition("://")[2])
        if not {"@", "/"} & set(before):
            return None
    return _password_of_url(conninfo)


def _password_of_url(text: str) -> str | None:
    """What stands between the first ":" and the last "@" of a URL within the text."""
    url = _URL.search(text)
    before = _user_and_password(url[1]) if url else ""
    return before.partition(":")[2] or None


def _user_and_password(address: str) -> str:
    # An "@" in the value of `?password=` is read as meant.
    searched = _SECRET_IN_QUERY.sub(lambda match: "-" * len(match[0]), address)
    return address[: max(searched.rfind("@"), 0)]


def _variants(secrets: Iterable[str]) -> set[str]:
    forms = {form for secret in secrets for form in (secret, unquote(secret))}
    # libpq strips spaces around the values of a URL.
    forms |= {form.strip() for form in forms}
    forms |= {quote(form, safe="", errors="replace") for form in forms}
    # As in psycopg's messages, which show some values by repr().
    return forms | {repr(form)[1:-1] for form in forms}


def _word_pattern(word: str) -> str:
    if len(word) >= _UNMISTAKABLE_LENGTH and word not in _COMMON_TEXT:
        return re.escape(word)
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", word) else ""
    return before + re.escape(word) + after
