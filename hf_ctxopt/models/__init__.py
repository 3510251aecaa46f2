"""Plain facts of models, told from their configs alone: for caches, weights and the planner alike."""
