"""Options of `Growth` with which lives end within an example."""

import esper_jax as ej

options = {
    "lifecycle_config": ej.LifecycleConfig(
        min_epochs=(0, 0, 2, 2, 1, 1, 1, 0, 1, 0, 1),
        reconstruction_threshold=1e9,
        min_improvement=0.0,
        min_stability=0.0,
        min_final_stability=0.0,
        grafting=ej.GraftConfig(ramp_duration=2),
    ),
    "controller_config": ej.ControllerConfig(when="period", period=2, max_training=2),
}
