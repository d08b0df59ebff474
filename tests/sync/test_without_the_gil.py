"""The stress of many threads where they run at the same time: on a free-threaded Python, skipped elsewhere. All other
tests run there as they are; this one makes sure that none of the extensions has brought the GIL back.
"""

from __future__ import annotations

import sys
import sysconfig
from typing import TYPE_CHECKING

import pytest

from .test_many_threads import stress

if TYPE_CHECKING:
    from kit.servers import Admin, Server


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python is not a free-threaded build")
def test_many_threads_share_few_connections_where_they_run_at_the_same_time(
    server: Server, dsn: str, admin: Admin, application_name: str, table: str
) -> None:
    is_gil_enabled = getattr(sys, "_is_gil_enabled", lambda: True)
    if is_gil_enabled():
        pytest.skip("an extension has turned the GIL on: run it with PYTHON_GIL=0")
    stress(server, dsn, admin, application_name, table, "without the GIL")
    assert not is_gil_enabled()
