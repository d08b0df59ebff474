"""A script for psycopg2's ThreadedConnectionPool, moved over by its import lines; it fetches two rows at a time."""

import threading

import asyncpool.psycopg2 as psycopg2
from asyncpool.cli.embedded import url_for_script
from asyncpool.psycopg2.pool import ThreadedConnectionPool

workers = ThreadedConnectionPool(5, 20, url_for_script())
totals = {}


def add_up(worker):
    connection = workers.getconn()
    try:
        cursor = connection.cursor()
        cursor.execute("select i from generate_series(1, %s) i", (worker * 3,))
        total = 0
        while rows := cursor.fetchmany(2):
            total += sum(number for (number,) in rows)
        totals[worker] = total
        cursor.close()
    except psycopg2.DatabaseError as error:
        print(f"worker {worker} failed:", error)
    finally:
        workers.putconn(connection)


threads = [threading.Thread(target=add_up, args=(worker,)) for worker in range(1, 9)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(", ".join(f"{worker}: {totals[worker]}" for worker in sorted(totals)))
