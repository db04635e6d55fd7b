"""Planning: what a recipe will need in memory and time, predicted without weights or a GPU, and which recipe to take."""
