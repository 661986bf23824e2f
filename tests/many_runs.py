"""Several runs in one process group: every argument is a JSON list of the arguments of `denoise-rl train`.

Starting Python, torch and DeepSpeed on two processes costs more than the runs themselves.
"""

import json
import sys

from rl import distributed
from rl.config import load_config
from rl.train.loop import train
from rl.train.plan import check_run
from rl.train.run import Run


def train_all(runs: list[str]) -> None:
    for run in runs:
        flag, path, *overrides = json.loads(run)
        assert flag == "--config"
        config = load_config(path, overrides)
        check_run(config)
        with Run.open(config) as opened:
            train(opened)


if __name__ == "__main__":
    train_all(sys.argv[1:])
    distributed.stop()
