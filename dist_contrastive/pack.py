"""`python -m dist_contrastive.pack SOURCE OUT.beton`: pack images into one file that the loader reads.

SOURCE is one of

- `photos`: patches of photographs that come with the installed packages; no network;
- `cifar10`: downloaded once, or taken from `cifar10:DIR`;
- `folder:DIR`: a folder of images as it is found: DIR/<class>/..., splits (DIR/train/<class>/... beside DIR/test/... or
  DIR/val/..., in any case and spelling), or images without labels in DIR or in its splits; what is not clear is refused;
- `classes:DIR`: each folder in DIR is a class, whatever it is called;
- `images:DIR`: all images below DIR, without labels, whatever the folders;
- `pairs:FILE`: images with captions, listed in a .csv, .tsv, .jsonl or .parquet, or in tar shards (`pairs:FOLDER`,
  `pairs:shard-{000..009}.tar`) whose members of one stem are an image and its .txt or .json;
- `photo_captions`: the patches of `photos` with captions that describe them.

The dataset is OUT.beton with its checksum and its statistics in OUT.beton.json and, if there are any, its captions and
their tokens in OUT.beton.captions; one that exists is replaced. The last line says where the test split comes from.

    python -m dist_contrastive.pack photos data/photos.beton
    python -m dist_contrastive.pack cifar10:path/to/download data/cifar10_captions.beton --caption-templates default
    python -m dist_contrastive.pack folder:path/to/images data/mine.beton --max-side 256
    python -m dist_contrastive.pack images:path/to/images data/unlabelled.beton
    python -m dist_contrastive.pack pairs:path/to/captions.csv data/pairs.beton
"""

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tyro.conf import Positional

from dist_contrastive.cli import main_guard, parse
from dist_contrastive.config import require
from dist_contrastive.data.format import (
    FEWEST_TOKENS,
    LARGEST_SIDE,
    MAX_BAD,
    MAX_SIDE,
    MAX_TOKENS,
    QUALITY,
    SMALLEST_VOCABULARY,
    VOCABULARY,
    Manifest,
    manifest_path,
)
from dist_contrastive.data.spec import FOLDER_KINDS, read_spec
from dist_contrastive.progress import bar

PROG = "python -m dist_contrastive.pack"
NUM_LISTED = 20
"""Lines about what was left out; the manifest has all of it."""


@dataclass(frozen=True)
class PackConfig:
    """Pack images into one file that the loader reads."""

    source: Positional[str] = "photos"
    """photos: patches of photographs that come with the installed packages.
    cifar10[:DIR]: downloaded once, or torchvision's files in DIR.
    folder:DIR: class folders, splits (train, test, ...) of class folders, or images without labels.
    classes:DIR: each folder in DIR is a class, whatever it is called.
    images:DIR: all images below DIR, without labels.
    pairs:FILE: images with captions, listed in a table (.csv, .tsv, .jsonl, .parquet) or in tar shards.
    photo_captions: the patches of photos with captions that describe them."""
    out: Positional[Path | None] = None
    """The dataset to write, *.beton (data/photos.beton, data/cifar10.beton, ... if none is given)."""
    quality: int = QUALITY
    """JPEG quality of images of more than 64×64 pixels; smaller ones are stored raw."""
    max_side: int = MAX_SIDE
    """Images whose longest side has more pixels are reduced to it."""
    max_bad: int = MAX_BAD
    """How many images may be left out because they can't be read, or pairs that lack something; with more, nothing is
    written. Files beside the images that are none do not count."""
    workers: int = 0
    """Threads that decode; 0 takes one for each usable core."""
    image_column: str = ""
    """Of pairs: the column of the images' paths. Empty: the one of a usual name (image, path, file_name, ...)."""
    caption_columns: tuple[str, ...] = ()
    """Of pairs: the columns (in shards: the fields of a .json) of captions. None: all of usual names (caption, text, ...)."""
    caption_templates: str = ""
    """Give images with labels captions that name their class: default, or a file with one template a line, such as
    "a photo of a {class}."."""
    max_tokens: int = MAX_TOKENS
    """Tokens of a caption, its start and its end included; longer ones are cut."""
    vocabulary: int = VOCABULARY
    """The most tokens that the tokenizer may learn from the training captions."""
    tokenizer: Path | None = None
    """A tokenizer.json to use instead."""

    def __post_init__(self) -> None:
        require(1 <= self.quality <= 100, f"--quality {self.quality}: give a number from 1 to 100")
        require(1 <= self.max_side <= LARGEST_SIDE, f"--max-side {self.max_side}: give from 1 to {LARGEST_SIDE} pixels")
        require(self.max_bad >= 0, f"--max-bad {self.max_bad}: give 0 (none) or more")
        require(self.workers >= 0, f"--workers {self.workers}: give 0 (automatic) or more")
        # Without the suffix, arguments in the wrong order could replace a file that is something else.
        require(self.out_path.suffix == ".beton", f"{self.out_path}: give a file name that ends in .beton")
        require(not self.out_path.is_dir(), f"{self.out_path} is a folder; give the name of a file")
        require(self.max_tokens >= FEWEST_TOKENS, f"--max-tokens {self.max_tokens}: give {FEWEST_TOKENS} or more")
        require(
            self.vocabulary >= SMALLEST_VOCABULARY,
            f"--vocabulary {self.vocabulary}: give {SMALLEST_VOCABULARY} or more; single bytes take half of it",
        )
        kind = self.source.partition(":")[0]
        if kind != "pairs":
            for option, given in (("--image-column", self.image_column), ("--caption-columns", self.caption_columns)):
                require(not given, f"{option}: only pairs:FILE has columns; leave it out")
            has_captions = kind == "photo_captions" or bool(self.caption_templates)
            for option, changed in (
                ("--max-tokens", self.max_tokens != MAX_TOKENS),
                ("--vocabulary", self.vocabulary != VOCABULARY),
                ("--tokenizer", self.tokenizer is not None),
            ):
                require(
                    has_captions or not changed,
                    f"{option}: {self.source} has no captions; leave it out, or give --caption-templates",
                )
        require(
            self.tokenizer is None or self.vocabulary == VOCABULARY,
            "--vocabulary: a given tokenizer has its own; leave it or --tokenizer out",
        )

    @property
    def out_path(self) -> Path:
        kind = self.source.partition(":")[0]
        if self.out is None:
            require(
                kind not in (*FOLDER_KINDS, "pairs"),
                f"where to? give the file to write: {PROG} {self.source} OUT.beton",
            )
            return Path(f"data/{kind}.beton")
        return self.out


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(PackConfig, argv, prog=PROG, about=__doc__)
    read_spec(config.source)

    from dist_contrastive.data.beton import require_ffcv
    from dist_contrastive.data.captions import CaptionOptions
    from dist_contrastive.data.packing import write_dataset
    from dist_contrastive.data.pairs import Columns
    from dist_contrastive.data.sources import open_source, read_templates, with_templates

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite end removes the unfinished file as Ctrl-C does
    start = time.monotonic()
    require_ffcv()  # before a download
    templates = read_templates(config.caption_templates) if config.caption_templates else ()
    source = open_source(config.source, Columns(config.image_column, config.caption_columns))
    if templates:
        source = with_templates(source, templates)
    options = CaptionOptions(config.max_tokens, config.vocabulary, config.tokenizer)
    done = count(1)
    with bar("packing") as tell:
        manifest = write_dataset(
            source, config.out_path, quality=config.quality, max_side=config.max_side, max_bad=config.max_bad,
            workers=config.workers, captions=options, on_sample=lambda: tell(next(done), len(source.samples)),
        )  # fmt: skip
    for bad in manifest.left_out[:NUM_LISTED]:
        print(f"left out: {bad.name}: {bad.reason}", file=sys.stderr)
    if len(manifest.left_out) > NUM_LISTED:
        print(
            f"left out: {len(manifest.left_out) - NUM_LISTED} more, see {manifest_path(config.out_path)}",
            file=sys.stderr,
        )
    print(describe(manifest, config.out_path, time.monotonic() - start))


def describe(manifest: Manifest, out: Path, seconds: float) -> str:
    """What was packed, in a few lines; the last one says where the splits come from."""
    labels = f"{len(manifest.classes)} classes" if manifest.classes else "no labels"
    lines = [
        f"{out}: {manifest.num_samples} samples ({manifest.num_train} to train, {manifest.num_test} to test), {labels}, "
        f"{len(manifest.left_out)} left out, {manifest.num_bytes / 1e6:.1f} MB, {seconds:.1f} s",
        f"split: {manifest.split}",
    ]
    captions = manifest.captions
    if captions is not None:
        lines.insert(
            1,
            f"captions: {captions.num_captions}, of up to {captions.max_tokens} of {captions.vocabulary_size} tokens; "
            f"{captions.num_cut} were longer and are cut",
        )
    if manifest.not_images:
        suffixes = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in manifest.not_images.items())
        lines.insert(0, f"passed over, not an image: {sum(manifest.not_images.values())} files ({suffixes})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main_guard(main))
