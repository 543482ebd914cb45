"""`python -m dist_contrastive.embed RUN SOURCE OUT`: the images of SOURCE as vectors of a run, into a table or an array.

SOURCE is a packed dataset (.beton) or a folder of images, at any depth and without classes. OUT.parquet is a data set of parts,
which pandas and pyarrow read as one table; OUT.npy is one array with named fields. Both have each image's index,
its path or its label where there is one, its feature (what the encoder gives) and its embedding (what the loss compared).

    python -m dist_contrastive.embed runs/photos data/photos.beton vectors.parquet
    python -m dist_contrastive.embed runs/photos path/to/images vectors.npy --max-bad 0
    python -m dist_contrastive.embed runs/photos data/photos.beton test.npy --split test --checkpoint 18
    accelerate launch --config_file launch_configs/cpu.yaml -m dist_contrastive.embed runs/photos path/to/images vectors.parquet

Several ranks share the work, and the result is the same. What was stopped goes on when the same command is given again.
"""

from collections.abc import Sequence

from dist_contrastive import cli, liveness, slurm
from dist_contrastive.vectors.options import EmbedOptions

PROG = "python -m dist_contrastive.embed"


def main(argv: Sequence[str] | None = None) -> None:
    slurm.adopt_slurm()
    liveness.end_with_launcher()
    options = cli.parse(EmbedOptions, argv, prog=PROG, about=__doc__)

    from dist_contrastive.vectors.embedding import embed

    liveness.finish(lambda: embed(options))


if __name__ == "__main__":
    liveness.run_rank(main)
