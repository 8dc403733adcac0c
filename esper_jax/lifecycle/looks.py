"""How stages look wherever HTML shows them."""

from typing import NamedTuple

from esper_jax.lifecycle.stages import Stage

__all__ = ["LOOKS", "Look"]


class Look(NamedTuple):
    """Of a stage. Colour is never alone: the sign or the name stands with it."""

    colour: str
    ink: str
    """Of text on the colour."""
    sign: str
    """What stands where the name has no room."""


LOOKS = {
    Stage.DORMANT: Look("transparent", "currentcolor", "·"),
    Stage.GERMINATED: Look("#f0e442", "#000000", "GE"),
    Stage.TRAINING: Look("#e69f00", "#000000", "T"),
    Stage.GRAFTING: Look("#56b4e9", "#000000", "GR"),
    Stage.STABILIZATION: Look("#0072b2", "#ffffff", "S"),
    Stage.EVALUATING: Look("#cc79a7", "#000000", "E"),
    Stage.FINE_TUNING: Look("#d55e00", "#000000", "FT"),
    Stage.FOSSILIZED: Look("#009e73", "#000000", "F"),
    Stage.CULLED: Look("#8a9099", "#000000", "✕"),
    Stage.CANCELLED: Look("#8a9099", "#000000", "○"),
    Stage.ROLLED_BACK: Look("#8a9099", "#000000", "↺"),
}
"""Living stages have the colours of Okabe and Ito (2008), which people of all kinds of
colour vision tell apart."""
