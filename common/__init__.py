"""What every project shares and none of them studies: configs, runtime, checkpoints, logs, metrics."""
