"""A training in a process of its own, to be killed, or to be started several times: `training_process.py DOMAIN LOG TABLES OUT OPTIONS`,
the last as JSON, with `resume`. Prints each step's number and its loss, every bit of it, as soon as a kill cannot undo it."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see deploy/cli.py

from features.domain import load_domain
from inference.train import TrainOptions, train


def say(number: int, loss: float) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(number, loss.hex(), flush=True)


def main() -> None:
    domain, log, tables, out, options = sys.argv[1:]
    given = json.loads(options)
    resume = given.pop("resume", False)
    train(load_domain(Path(domain)), "home", log, tables, out, TrainOptions(**given), resume=resume, after_step=say)


if __name__ == "__main__":
    main()
