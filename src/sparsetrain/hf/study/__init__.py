"""What is measured, compared or predicted about runs: bench, profile, compare, sensitivity, plan."""
