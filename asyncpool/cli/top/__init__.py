"""`asyncpool top`: a live view of a running pool."""
