"""A script for psycopg2's SimpleConnectionPool, moved over by its import lines. It never closes its pool."""

from psycopg.conninfo import conninfo_to_dict

import asyncpool.psycopg2 as psycopg2
from asyncpool.cli.embedded import url_for_script
from asyncpool.psycopg2 import pool

server = conninfo_to_dict(url_for_script())

stations = None
try:
    stations = pool.SimpleConnectionPool(
        1,
        20,
        user=server["user"],
        password=server.get("password"),
        host=server["host"],
        port=str(server.get("port", "5432")),
        database=server["dbname"],
    )
    if stations:
        print("the pool is there")

    connection = stations.getconn()
    if connection:
        cursor = connection.cursor()
        cursor.execute("select id, 20 + id / 2.0 from generate_series(1, 5) id where id in %s", ((1, 3, 5),))
        for station, temperature in cursor.fetchall():
            print(f"station {station}: {temperature:.1f} degrees")
        cursor.close()
        stations.putconn(connection)
        print("the connection is back")
except (Exception, psycopg2.DatabaseError) as error:
    print("it failed:", error)
finally:
    # As one finds it published: without its parentheses this closes nothing.
    if stations:
        stations.closeall  # noqa: B018
    print("done")
