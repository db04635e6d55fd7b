"""How a model is edited: plan, apply, grow. It knows sites, not methods."""
