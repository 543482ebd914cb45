"""`accelerate launch -m dist_contrastive.train [RECIPE] [--field.name VALUE ...]`: train an encoder and measure it.

RECIPE is a config with a name (photos if none is given); --list tells what there is. The options replace single fields of it.

    python -m dist_contrastive.train --list
    accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.train photos_byol --run-dir runs/byol
    python -m dist_contrastive.train photos --epochs 2 --batch.global 256 --run-dir runs/short
    accelerate launch --config_file launch_configs/single_gpu.yaml -m dist_contrastive.train cifar10_simclr \\
        --data.path data/mine.beton --data.image-size 96 --encoder.name resnet18 --run-dir runs/mine

Views come in groups that are made alike: --augment.blur 0 is for all of them, --augment.1.blur 0 for group 1 alone (the first is
group 0).

A run that was stopped goes on where it stopped when the same command is given again.

With --dry-run everything is built and the plan is printed: steps, memory, collectives, disk. Nothing is trained or written. The
ranks are those that were launched; --ranks N and --device cuda plan for N GPUs that need not be there:

    python -m dist_contrastive.train imagenet_simclr_4096 --dry-run --ranks 256 --device cuda --launch.precision bf16
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dist_contrastive import cli, liveness, preflight, slurm
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


@dataclass(frozen=True)
class DryRun:
    """What --dry-run is to plan for."""

    ranks: int | None
    """CUDA ranks that need not be there; None: those that were launched."""


def take_dry_run(argv: Sequence[str]) -> tuple[list[str], DryRun | None]:
    """The command line without --dry-run and the options that go with it, and what these ask for; None without --dry-run."""
    if "--dry-run" not in argv:
        return list(argv), None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--device", choices=["cuda"])
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(
            f"{error.argument_name} with --dry-run: {error.message}; --ranks N plans for N GPUs, and CPU ranks are to be launched"
        ) from error
    simulates = found.ranks is not None or found.device is not None
    return rest, DryRun((1 if found.ranks is None else found.ranks) if simulates else None)


def main(argv: Sequence[str] | None = None) -> None:
    slurm.adopt_slurm()
    liveness.end_with_launcher()
    arguments, dry = take_dry_run(sys.argv[1:] if argv is None else argv)
    config = parse(arguments)
    if not dry:
        preflight.check(config)

    if dry:
        from dist_contrastive.dry_run import dry_run

        liveness.finish(lambda: dry_run(config, dry.ranks))
    else:
        from dist_contrastive.run import train

        liveness.finish(lambda: train(config))


if __name__ == "__main__":
    liveness.run_rank(main)
