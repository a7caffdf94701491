"""Run a training script until its first optimizer step has ended, then leave: `first_step.py SCRIPT ARGUMENTS...`

Prints the moment as {"at": seconds since the epoch}; torch's hook costs nothing before it.
"""

import os
import runpy
import sys
import time

from torch.optim.optimizer import register_optimizer_step_post_hook


def leave(*_args) -> None:
    print(f'\n{{"at": {time.time()}}}', flush=True)
    os._exit(0)


register_optimizer_step_post_hook(leave)
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[1])))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
