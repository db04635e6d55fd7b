"""What the rest stands on: configs, anatomy, costs, backends, errors. torch and the standard library only."""
