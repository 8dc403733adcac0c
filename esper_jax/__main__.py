"""``python -m esper_jax``: the same as the ``esper-jax`` command."""

from esper_jax.cli import main

main()
