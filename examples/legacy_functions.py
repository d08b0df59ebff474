"""A module of functions around a pool of psycopg2's, moved over by its import line. Nobody rolls back."""

from asyncpool.cli.embedded import url_for_script
from asyncpool.psycopg2 import pool

connections = pool.ThreadedConnectionPool(minconn=1, maxconn=100, dsn=url_for_script())


def get_conn():
    return connections.getconn()


def release_conn(connection):
    connections.putconn(connection)


def user_name(user_id):
    connection = get_conn()
    try:
        cursor = connection.cursor()
        cursor.execute(
            "select name from (values (1, 'Ada'), (2, 'Grace')) as users (id, name) where id = %s", (user_id,)
        )
        row = cursor.fetchone()
        return row[0] if row else None
    finally:
        release_conn(connection)


for user_id in (1, 2, 3):
    print(user_id, user_name(user_id))
