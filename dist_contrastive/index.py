"""`python -m dist_contrastive.index RUN SOURCE OUT`: images of SOURCE as vectors of a run, in an index of nearest neighbours.

SOURCE is a packed dataset (.beton), a folder of images, or a .parquet that embed wrote with this run: then nothing is encoded
anew. OUT is a folder, written whole or not at all. How neighbours are found is chosen by number and memory, and said: all vectors
one by one (flat), a graph (hnsw) or lists of coded vectors (ivfpq). With vectors that are not in it yet, recall@10 against exact
search and the time of a search are measured; a search takes the least effort that reaches --recall.

    python -m dist_contrastive.index runs/photos data/photos.beton runs/photos/index
    python -m dist_contrastive.index runs/photos vectors.parquet index --output embedding --kind hnsw
    python -m dist_contrastive.index runs/photos path/to/more index --add
    python -m dist_contrastive.index runs/photos - index --delete 17 18
    python -m dist_contrastive.index runs/photos - index --to milvus:http://localhost:19530

For SOURCE, - stands for nothing new. Ids are positions in SOURCE; what is added later gets the next ones.
"""

import sys
from collections.abc import Sequence

from dist_contrastive import cli
from dist_contrastive.run_folder.config import read_config
from dist_contrastive.searching.options import IndexOptions

PROG = "python -m dist_contrastive.index"


def main(argv: Sequence[str] | None = None) -> None:
    options = cli.parse(IndexOptions, argv, prog=PROG, about=__doc__)
    read_config(options.run)  # a folder that holds no run is refused at once

    from dist_contrastive.searching.indexing import index

    index(options)


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
