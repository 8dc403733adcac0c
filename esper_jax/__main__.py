"""``python -m esper_jax`` does the same as the command ``esper-jax``."""

from esper_jax.cli import main

main()
