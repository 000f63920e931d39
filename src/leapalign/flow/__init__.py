"""Pure tensor maths of flow models: grids, rollout, leaps, connectors, activation checkpointing."""
