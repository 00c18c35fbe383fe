"""The process around a run: command line, workdir, checkpoints, metrics, processes."""
