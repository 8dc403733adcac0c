"""Several devices and processes: collectives, replicas, exchange between processes."""

from esper_jax.parallel.replicas import check_divides, check_replicas, split_rows

__all__ = ["check_divides", "check_replicas", "split_rows"]
