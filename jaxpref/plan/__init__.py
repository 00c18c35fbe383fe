"""What a run costs: FLOPs, memory and time, without running it."""
