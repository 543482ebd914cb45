"""`accelerate launch -m dist_contrastive.train [RECIPE] [--field.name VALUE ...]`: train an encoder and measure it.

RECIPE is a config with a name (photos if none is given); --list tells what there is. The options replace single fields of it.

    python -m dist_contrastive.train --list
    accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_byol --run-dir runs/byol
    python -m dist_contrastive.train photos --epochs 2 --batch.global 256 --run-dir runs/short
    accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_simclr \\
        --data.path data/mine.beton --data.image-size 96 --encoder.name resnet18 --run-dir runs/mine

A run that was stopped goes on where it stopped when the same command is given again.
"""

import sys
from collections.abc import Sequence

from dist_contrastive import cli, distributed, liveness, preflight, slurm
from dist_contrastive.config import TrainConfig, UserError
from dist_contrastive.recipes import DEFAULT_RECIPE, build_recipe, list_recipes

PROG = "python -m dist_contrastive.train"


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The config of a command line: a recipe's name (photos if none is given), then `--field.name VALUE` pairs.

    `--help` and `--list` print and exit.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if "--list" in args:
        with cli.page():
            print(list_recipes())
        sys.exit()
    name = args.pop(0) if args and not args[0].startswith("-") else DEFAULT_RECIPE
    return cli.parse(build_recipe(name), args, prog=f"{PROG} {name}", about=__doc__)


def main(argv: Sequence[str] | None = None) -> None:
    slurm.adopt_slurm()
    liveness.end_with_launcher()
    config = parse(argv)
    preflight.check(config)

    from dist_contrastive.run import train

    try:
        finished = train(config)
    except (UserError, KeyboardInterrupt):
        distributed.shut_down()
        raise
    distributed.shut_down()
    if not finished:
        sys.exit(cli.EXIT_STOPPED)


if __name__ == "__main__":
    liveness.run_rank(main)
