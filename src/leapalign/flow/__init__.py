"""Pure tensor maths of flow models: grids, rollout, leaps, connectors, and how much of the graph is kept."""
