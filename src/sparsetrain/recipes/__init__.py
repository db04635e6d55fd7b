"""What a run is asked to do: recipes, presets, tasks. Plain values; no model is loaded here."""
