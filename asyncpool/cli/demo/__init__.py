"""`asyncpool demo`: the workload that the pool exists for, beside others, on a real server."""
