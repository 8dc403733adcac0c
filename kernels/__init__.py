"""The operators of esper_jax, imported as ``esper_jax.kernels``."""

if __name__ != "esper_jax.kernels":
    raise ImportError(
        "this package is part of esper_jax: import it as esper_jax.kernels, not as "
        f"{__name__!r}"
    )
