"""The world: the only rooms that do I/O. psycopg, sockets, threads and the event loop are touched here."""
