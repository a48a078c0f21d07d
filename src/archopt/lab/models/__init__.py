"""Networks of the workloads."""
