"""`asyncpool tune`: how large the pool should be, measured."""
