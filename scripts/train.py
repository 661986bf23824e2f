"""Entry point for the `deepspeed` launcher and torchrun: `deepspeed scripts/train.py --config FILE key=value ...`."""

import sys

from rl.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
