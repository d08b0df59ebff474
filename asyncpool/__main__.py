"""`python -m asyncpool`."""

from asyncpool.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
