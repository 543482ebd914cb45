"""The table of images and the captions that they find, and of captions and the images that they find."""

import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dist_contrastive.report.images import as_rgb
from dist_contrastive.report.inputs import FoundCaption, RunReport, Section, one_line
from dist_contrastive.report.page import embedded

MAX_OWN = 5  # captions of an image's own that are shown
MAX_CHARACTERS = 160  # of a caption


def retrieval(inputs: RunReport) -> tuple[Section, None] | None:
    """What the two towers of an image-text run find of each other, as tables; None for other runs."""
    title, found, thumbnails = "Images and the captions they find", inputs.retrieval, inputs.thumbnails
    if "retrieval" in inputs.problems:
        return Section("retrieval", title, missing=inputs.problems["retrieval"]), None
    if found is None or thumbnails is None:
        return None
    cosines = [caption.cosine for row in found.images for caption in (*row.own, *row.nearest)]
    if not np.isfinite(cosines + [cosine for row in found.captions for _, cosine, _ in row.nearest]).all():
        return Section("retrieval", title, missing="the embeddings are not finite"), None
    pictures = as_rgb(thumbnails)
    one, num_found = inputs.samples.removesuffix("s"), max(len(row.nearest) for row in found.images)
    of_images = _table(
        (
            one.capitalize(),
            "Its own captions, with their places",
            f"The {num_found} nearest captions, with their cosines",
        ),
        [
            (
                _picture(pictures[row.image], one),
                _own(row.own),
                "".join(_match(caption.cosine, caption in row.own, _text(caption.text)) for caption in row.nearest),
            )
            for row in found.images
        ],
    )
    of_captions = _table(
        ("Caption", f"The {num_found} nearest images, with their cosines"),
        [
            (
                _text(row.text),
                "".join(_match(cosine, own, _picture(pictures[image], one)) for image, cosine, own in row.nearest),
            )
            for row in found.captions
        ],
    )
    part = f" of the {inputs.num_in_split:,}" if inputs.num_in_split > found.num_images else ""
    images = f"{found.num_images:,}{part} {inputs.samples}"
    return Section(
        "retrieval",
        title,
        f"For {len(found.images)} {inputs.samples} the best {num_found} of {found.num_captions:,} different captions, those of "
        f"{images}, and further down for {len(found.captions)} captions the best {num_found} of these "
        "images, by the cosine of image and text embedding. Green and ✓: the image's own; ✗: another's. An own caption's place "
        "is 1 where no caption is nearer. ✗ that would describe the image as well are no mistakes; ones that have nothing to do "
        "with it say that the towers have not come together.",
        table=of_images + of_captions,
    ), None


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    names = [html.escape(heading) for heading in headings]
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = ("".join(f'<td data-heading="{n}">{cell}</td>' for n, cell in zip(names, row, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="found"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _own(captions: Sequence[FoundCaption]) -> str:
    lines = [f"<p><b>{caption.place:,}</b> {_text(caption.text)}</p>" for caption in captions[:MAX_OWN]]
    more = len(captions) - len(lines)
    return "".join(lines) + (f"<p>and {more} more</p>" if more else "")


def _match(cosine: float, is_own: bool, content: str) -> str:
    """What was found, as HTML already, with how near it is and whether it is right."""
    number = f"{cosine:.2f}".replace("-", "−")
    return f"<p{' class=right' if is_own else ''}><b>{number}\u00a0{'✓' if is_own else '✗'}</b> {content}</p>"


def _text(caption: str) -> str:
    return html.escape(one_line(caption, MAX_CHARACTERS))


def _picture(image: np.ndarray, alt: str) -> str:
    """`image` uint8 [S, S, 3], within the page."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return embedded(file.getvalue(), alt)
