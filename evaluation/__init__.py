"""What skipping costs: tasks, metrics with their intervals, and sweeps over methods."""
