"""Planning: what a recipe needs in memory and time, predicted without weights or a GPU, and which recipe to take."""
