"""`asyncpool doctor`: what a server, and a pooler before it, mean for a pool."""
