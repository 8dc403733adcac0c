"""Flags through OpenFeature: a provider of a flag file, and what a model may use.

    from openfeature import api

    api.set_provider_and_wait(FlagFileProvider("configs/features.toml"))
    features = features_for("model-7")

Any other provider (flagd, LaunchDarkly, ...) is set in the same way, and used as it is.
This module needs the extra ``rollout``.
"""

import dataclasses
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from esper_jax.rollout.flag_file import FlagFile
from esper_jax.rollout.flags import FEATURES, Flag, FlagError, decide, overridden
from esper_jax.run.features import Features
from esper_jax.run.references import shown

try:
    from openfeature import api
    from openfeature.client import OpenFeatureClient
    from openfeature.evaluation_context import EvaluationContext
    from openfeature.event import ProviderEventDetails
    from openfeature.exception import (
        ErrorCode,
        FlagNotFoundError,
        ParseError,
        TypeMismatchError,
    )
    from openfeature.flag_evaluation import FlagResolutionDetails, FlagValueType, Reason
    from openfeature.provider import AbstractProvider, Metadata
except ModuleNotFoundError as error:
    raise ImportError(
        "flags by OpenFeature need openfeature-sdk, which is not installed: "
        f"pip install 'esper-jax[rollout]' ({error})"
    ) from None

__all__ = ["DOMAIN", "FlagFileProvider", "features_for", "flag_for"]

DOMAIN = "esper_jax"
"""The OpenFeature domain that esper_jax asks; without a provider of its own, that is
the default one."""

_log = logging.getLogger(__name__)

_T = TypeVar("_T", bool, str)


class FlagFileProvider(AbstractProvider):
    """Answers with the flags of a `FlagFile`, by the targeting key as the model's id.

    The file is read again when it has changed. While it is broken or gone, the flags
    from before hold: that is logged once, the provider's status is STALE, and so is the
    reason of each answer. ``ESPER_FEATURE_<NAME>`` overrides a flag (reason STATIC).

    A flag of `FEATURES` that the file leaves out has the caller's default (reason
    DEFAULT). So has any other (FLAG_NOT_FOUND), which is logged once. A flag with a
    value answers with text, with the caller's default where it is off; all others
    answer with a boolean.

    Args:
      path: of the file.

    Raises:
      FlagError: if the file cannot be used.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self._file = FlagFile(Path(path).expanduser().absolute())  # outlives chdir
        self._lock = threading.Lock()
        self._seen = self._stamp()  # before it is read, so that no change is missed
        self._flags = self._file.read()
        self._stale = ""
        self._warned: set[str] = set()

    def get_metadata(self) -> Metadata:
        """The provider's name."""
        return Metadata(name="esper_jax flag file")

    def flags(self) -> dict[str, Flag]:
        """The flags that hold now, by name, read again if the file has changed."""
        with self._lock:
            stamp = self._stamp()
            if stamp == self._seen:
                return self._flags
            self._seen = stamp
            before, was_stale = self._flags, self._stale
            try:
                self._flags, self._stale = self._read_again(), ""
            except FlagError as error:
                self._stale = str(error)
            after, stale = self._flags, self._stale
        if stale:
            _log.warning("%s. The flags from before hold until that is mended", stale)
            self.emit_provider_stale(ProviderEventDetails(message=stale))
            return after
        if was_stale:
            self.emit_provider_ready(ProviderEventDetails())
        changed = [
            name
            for name in sorted({*before, *after})
            if before.get(name) != after.get(name)
        ]
        if changed:
            details = ProviderEventDetails(flags_changed=changed)
            self.emit_provider_configuration_changed(details)
        return after

    def resolve_boolean_details(
        self,
        flag_key: str,
        default_value: bool,
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[bool]:
        """Whether a flag is on."""
        return self._resolve(flag_key, default_value, evaluation_context)

    def resolve_string_details(
        self,
        flag_key: str,
        default_value: str,
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[str]:
        """The value of a flag that is on, else the default."""
        return self._resolve(flag_key, default_value, evaluation_context)

    def resolve_integer_details(
        self,
        flag_key: str,
        default_value: int,
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[int]:
        """Refused: no flag answers with a number."""
        raise self._no_such_kind(flag_key, "an integer")

    def resolve_float_details(
        self,
        flag_key: str,
        default_value: float,
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[float]:
        """Refused: no flag answers with a number."""
        raise self._no_such_kind(flag_key, "a number")

    def resolve_object_details(
        self,
        flag_key: str,
        default_value: Sequence[FlagValueType] | Mapping[str, FlagValueType],
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[Sequence[FlagValueType] | Mapping[str, FlagValueType]]:
        """Refused: no flag answers with an object."""
        raise self._no_such_kind(flag_key, "an object")

    def _resolve(
        self, name: str, default: _T, context: EvaluationContext | None
    ) -> FlagResolutionDetails[_T]:
        flag = self.flags().get(name)
        text = isinstance(default, str)
        if flag is not None and (flag.value is not None) != text:
            kind = "text" if flag.value is not None else "a boolean"
            raise TypeMismatchError(f"{self._file.path}: {name} answers with {kind}")
        try:
            override: Any = overridden(name, text)
        except FlagError as error:
            raise ParseError(str(error)) from None
        if override is not None:
            return FlagResolutionDetails(override, reason=Reason.STATIC)
        if flag is None:
            if name not in FEATURES:
                raise self._unknown(name)
            return FlagResolutionDetails(default, reason=Reason.DEFAULT)
        on, reason = decide(flag, context.targeting_key if context else None)
        value: Any = on if not text else flag.value if on else default
        return FlagResolutionDetails(
            value,
            reason=Reason.STALE if self._stale else reason,
            variant="on" if on else "off",
        )

    def _read_again(self) -> dict[str, Flag]:
        """The flags of the file.

        Raises:
          FlagError: if it is broken, or empty: as a rule its writer is not done yet,
            and without flags all models would have everything.
        """
        flags = self._file.read()
        if self._flags and not flags:
            raise FlagError(f"{self._file.path}: holds no flag any more")
        return flags

    def _unknown(self, name: str) -> FlagNotFoundError:
        said = (
            f"{self._file.path}: has no flag {name!r}: the default holds. Write "
            f"[{name}] into the file, or correct the name in the code"
        )
        if name not in self._warned:
            self._warned.add(name)
            _log.warning("%s", said)
        return FlagNotFoundError(said)

    def _no_such_kind(
        self, name: str, kind: str
    ) -> TypeMismatchError | FlagNotFoundError:
        if name not in {*self.flags(), *FEATURES}:
            return self._unknown(name)
        return TypeMismatchError(
            f"{self._file.path}: {name} answers with a boolean or text, not {kind}"
        )

    def _stamp(self) -> tuple[int, ...]:
        """What changes whenever the file is written; () if it is gone."""
        try:
            found = self._file.path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino


def flag_for(
    name: str,
    model_id: str | None,
    default: _T,
    *,
    client: OpenFeatureClient | None = None,
) -> _T:
    """What a flag is for a model, by the OpenFeature provider that is set.

    ``ESPER_FEATURE_<NAME>`` overrides any provider.

    Args:
      name: of the flag.
      model_id: the targeting key; None for a model without an id.
      default: what holds where the provider says nothing; its type is the flag's.
      client: to ask; by default the one of `DOMAIN`.

    Raises:
      FlagError: if the flag is of another type, its value cannot be, or an argument is
        of the wrong type. That a provider cannot be reached is logged, and the default
        holds.
    """
    text = isinstance(default, str)
    if not text and not isinstance(default, bool):
        raise FlagError(
            f"default of {name}: expected True, False or text, got {shown(default)}"
        )
    if model_id is not None and not isinstance(model_id, str):
        raise FlagError(
            f"model_id: expected text or None, got {shown(model_id)}; pass "
            f"str(model_id), as the lists of the flag {name} have text"
        )
    override: Any = overridden(name, text)
    if override is not None:
        return override
    client = client or api.get_client(DOMAIN)
    ask: Any = client.get_string_details if text else client.get_boolean_details
    found = ask(name, default, EvaluationContext(targeting_key=model_id))
    if found.error_code in (ErrorCode.TYPE_MISMATCH, ErrorCode.PARSE_ERROR):
        raise FlagError(f"{name}: {found.error_message}")
    if found.error_code not in (None, ErrorCode.FLAG_NOT_FOUND):
        _log.warning(
            "%s: the default %r holds, since the provider of the flags failed: %s %s",
            name,
            default,
            found.error_code,
            found.error_message or "",
        )
    return found.value


def features_for(
    model_id: str | None,
    *,
    defaults: Features | None = None,
    client: OpenFeatureClient | None = None,
) -> Features:
    """What a model may use: all flags of `FEATURES`, asked by `flag_for`.

    Call it outside of jit, where a model is made or between steps, and hand the result
    to `apply_features` and `policy_under`.

    Args:
      model_id: as for `flag_for`, which also says what is raised.
      defaults: what holds where the provider says nothing.
      client: as for `flag_for`.
    """
    values: dict[str, Any] = {
        name: flag_for(name, model_id, default, client=client)
        for name, default in dataclasses.asdict(defaults or Features()).items()
    }
    try:
        return Features(**values)
    except ValueError as error:
        raise FlagError(str(error)) from None
