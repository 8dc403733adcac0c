"""Growth itself: the state of a run, its measurements, and the tick."""
