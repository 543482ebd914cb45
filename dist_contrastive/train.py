"""`accelerate launch -m dist_contrastive.train [RECIPE] [--field.name VALUE ...]`: train an encoder and measure it.

What parses and checks is light; what trains takes seconds to import, and is imported once there is something to train.
"""

import sys
from collections.abc import Sequence

from dist_contrastive import cli, distributed, preflight
from dist_contrastive.config import TrainConfig
from dist_contrastive.recipes import DEFAULT_RECIPE, build_recipe

PROG = "python -m dist_contrastive.train"
EXIT_STOPPED = 75  # EX_TEMPFAIL: the same command goes on from where this one stopped


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The config of a command line: a recipe's name (photos if none is given), then `--field.name VALUE` pairs."""
    args = list(sys.argv[1:] if argv is None else argv)
    name = args.pop(0) if args and not args[0].startswith("-") else DEFAULT_RECIPE
    return cli.parse(build_recipe(name), args, prog=f"{PROG} {name}")


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(argv)
    preflight.check(config)

    from dist_contrastive.run import train

    try:
        finished = train(config)
    finally:
        distributed.shut_down()
    if not finished:
        sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
