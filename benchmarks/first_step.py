"""Run a training script until its first optimizer step has ended, then leave: `first_step.py SCRIPT ARGUMENTS...`

Prints the moment as {"at": seconds since the epoch}, with this process's CPU seconds until then and those of them that
were spent in imports; torch's hook costs nothing before the step.
"""

import builtins
import functools
import importlib
import json
import os
import runpy
import sys
import time


class ImportClock:
    """CPU seconds in imports since it was made, those inside of imports counted once."""

    def __init__(self):
        self.seconds = 0.0
        self._depth = 0
        builtins.__import__ = self._timed(builtins.__import__)
        importlib.import_module = self._timed(importlib.import_module)

    def _timed(self, function):
        @functools.wraps(function)
        def timed(*arguments, **options):
            began = time.process_time()
            self._depth += 1
            try:
                return function(*arguments, **options)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.process_time() - began

        return timed


def leave(*_args) -> None:
    numbers = {"at": time.time(), "cpu_seconds": time.process_time(), "import_seconds": clock.seconds}
    print("\n" + json.dumps(numbers), flush=True)
    os._exit(0)


clock = ImportClock()
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

register_optimizer_step_post_hook(leave)
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[1])))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
