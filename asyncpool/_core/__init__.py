"""Decisions of the pool, without I/O: no asyncio, threads, sockets, clocks or randomness in here."""
