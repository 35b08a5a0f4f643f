"""What every project shares and none of them studies: configs, runtime, checkpoints, logs, metrics."""

import sys

from common.terminal import leave_while_importing

if sys.argv[:1] == ["-m"]:  # so Python calls a program of `python -m` until it has found it: one of ours is starting
    leave_while_importing()
