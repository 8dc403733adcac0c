"""The features that a run of the command line begins, or goes on, with."""

import dataclasses
import json
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from esper_jax.parallel.processes import exchange, together
from esper_jax.rollout.flags import FEATURES, FlagError, overridden, variable
from esper_jax.run.config import RunConfig
from esper_jax.run.features import Features
from esper_jax.run.folder import RunFolder, read_config

__all__ = ["with_features"]

_log = logging.getLogger(__name__)


def with_features(
    config: RunConfig,
    folder: RunFolder,
    file: Path | None,
    model_id: str,
    *,
    resume: bool = False,
    allowed: Sequence[str] = (),
) -> RunConfig:
    """The config with the features that flags give it.

    ``ESPER_FEATURE_<NAME>`` counts before the file, the file before the config. A run
    that goes on keeps the features that it began with: a warning names those that would
    be others now.

    Args:
      config: of the run.
      folder: of the run.
      file: of the flags; None for the environment alone.
      model_id: of the run, for the flags.
      resume: whether a run that is in the folder goes on.
      allowed: keys of the config that may change then; ``features.NAME`` among them
        takes what holds now.

    Raises:
      FlagError: if a flag cannot be used, or what the file needs is not installed.
      RunError: if the run that goes on has no sound config.
    """
    asked = together(lambda: _asked(config.features, file, model_id), FlagError)
    # Process 0 decides for all, since the file may change between two looks.
    asked = Features(**json.loads(exchange(json.dumps(dataclasses.asdict(asked)))[0]))
    if not resume or not folder.config.exists():
        return dataclasses.replace(config, features=asked)
    began = read_config(folder).features
    kept: dict[str, Any] = dataclasses.asdict(began)
    set_by_hand = any(os.environ.get(variable(name)) for name in FEATURES)
    silent = file is None and not set_by_hand and asked == Features()
    for name, before in dataclasses.asdict(began).items():
        now = getattr(asked, name)
        if f"features.{name}" in allowed:
            kept[name] = now
        elif now != before and not silent:
            _log.warning(
                "features.%s stays %r, as the run began; it would be %r now. To take "
                "that, add --allow-change features.%s",
                name,
                before,
                now,
                name,
            )
    return dataclasses.replace(config, features=Features(**kept))


def _asked(defaults: Features, file: Path | None, model_id: str) -> Features:
    """What environment, file and defaults say."""
    if file is None:
        _warn_of_strays(FEATURES)
        values: dict[str, Any] = dataclasses.asdict(defaults)
        for name, default in FEATURES.items():
            override = overridden(name, isinstance(default, str))
            values[name] = values[name] if override is None else override
        return Features(**values)
    try:
        from openfeature import api

        from esper_jax.rollout.provider import DOMAIN, FlagFileProvider, features_for
    except ImportError as error:
        raise FlagError(
            f"--features needs openfeature-sdk, which is not installed ({error}): "
            "pip install 'esper-jax[rollout]'"
        ) from None
    provider = FlagFileProvider(file)
    _warn_of_strays({*FEATURES, *provider.flags()})
    api.set_provider_and_wait(provider, DOMAIN)
    return features_for(model_id, defaults=defaults)


def _warn_of_strays(names: Collection[str]) -> None:
    """Names variables that look as if they overrode a flag, and override none."""
    known = {variable(name) for name in names}
    for stray in sorted(v for v in os.environ if v.startswith(variable(""))):
        if stray not in known:
            _log.warning(
                "%s overrides nothing: there is no such flag. The flags are %s",
                stray,
                ", ".join(sorted(names)),
            )
