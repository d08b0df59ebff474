"""A server at a distance: the tests' proxy, which delays every byte, in a process of its own.

    with distant(url, milliseconds) as url_through_proxy: ...

The proxy is in Python and has a packet at a time in its hands: it tells something where round trips are what limits the
rate, and nothing of what an idle network would carry.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from psycopg.conninfo import conninfo_to_dict

TESTS = Path(__file__).parent.parent / "tests"


@contextmanager
def distant(url: str, milliseconds: float) -> Iterator[str]:
    """The URL of the same server, `milliseconds` away in each direction; the URL itself if that is 0."""
    if not milliseconds:
        yield url
        return
    # The URL goes by the standard input, as it may hold a password.
    proxy = subprocess.Popen(
        [sys.executable, __file__, str(milliseconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with proxy:
        assert proxy.stdin is not None
        assert proxy.stdout is not None
        proxy.stdin.write(f"{url}\n")
        proxy.stdin.flush()
        yield proxy.stdout.readline().strip()
        proxy.stdin.close()  # by which it ends


def told(url: str, milliseconds: float) -> str:
    """What a table is to say of the way to the server."""
    host = str(conninfo_to_dict(url).get("host") or "localhost")
    if milliseconds:
        return f"TCP, {milliseconds:g} ms each way"
    return "Unix socket" if host.startswith("/") else "TCP"


def through(url: str, port: int) -> str:
    """The URL with the proxy's address in place of the server's, in clear text; asyncpg takes no other conninfo."""
    parameters = {name: str(value) for name, value in conninfo_to_dict(url).items()}
    user, database = parameters.get("user", ""), parameters.get("dbname", "")
    secret = f":{quote(parameters['password'], safe='')}" if "password" in parameters else ""
    return f"postgresql://{quote(user, safe='')}{secret}@127.0.0.1:{port}/{quote(database, safe='')}?sslmode=disable"


def main() -> None:
    sys.path.insert(0, str(TESTS))
    from kit.proxy import Proxy, Weather

    url = sys.stdin.readline().strip()
    with Proxy(url) as proxy:
        proxy.apply(Weather(latency=float(sys.argv[1]) / 1000))
        print(through(url, proxy.port), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
