"""Captions of the photographs' patches, written from what is measured in a patch and known of its photograph."""

from dataclasses import dataclass

import numpy as np

from dist_contrastive import rng
from dist_contrastive.data.format import spoken

NUM_CAPTIONS = 5
"""Of each patch."""
TEMPLATES = (
    "a {brightness} {colour} patch of {name}.",
    "{name}, {texture} and {colour}, at the {place}.",
    "a photo of {name} with {contrast} contrast.",
    "the {place} of {name}, {brightness} and {texture}.",
    "a {texture} detail of the photograph {name}, {colour} with {contrast} contrast.",
    "{brightness}, {contrast} in contrast: {name}, from the {place}.",
    "a close-up of {name}: {colour}, {texture}.",
    "{colour} {name}, {brightness}, {contrast} contrast.",
)
LUMA = np.array([0.299, 0.587, 0.114])
"""Rec. 601."""

# Where a measure, in [0, 255], becomes the next word.
BRIGHTNESS = (((70.0, "dark"), (150.0, "mid-tone")), "bright")
CONTRAST = (((15.0, "low"), (40.0, "medium")), "high")
TEXTURE = (((4.0, "smooth"), (14.0, "fine")), "coarse")

GREY_CHROMA = 20.0
"""Colours whose channels differ by less are black, grey or white."""
HUES = ("red", "orange", "yellow", "green", "green", "green", "cyan", "blue", "blue", "purple", "purple", "pink")
"""Of each twelfth of the colour circle, the first around red."""
BROWN_BELOW = 130.0
"""An orange whose largest channel is less."""


@dataclass(frozen=True)
class Measures:
    """Words for what a patch looks like."""

    brightness: str
    contrast: str
    texture: str
    colour: str


def captions_of(patch: np.ndarray, name: str, y: int, x: int, height: int, width: int) -> tuple[str, ...]:
    """The captions of `patch` uint8 [S, S, 3], whose corner lies at (y, x) of its photograph of height × width pixels.

    Each comes from another template; which ones, the place of the patch decides.
    """
    words = vars(measure(patch)) | {"name": spoken(name), "place": _place(patch, y, x, height, width)}
    chosen = rng.permutation(y, x, len(TEMPLATES))[:NUM_CAPTIONS]
    return tuple(TEMPLATES[number].format(**words) for number in chosen)


def measure(patch: np.ndarray) -> Measures:
    """What `patch` uint8 [S, S, 3] looks like."""
    luma = patch @ LUMA
    steps = np.abs(np.diff(luma, axis=0)).mean() + np.abs(np.diff(luma, axis=1)).mean()
    return Measures(
        brightness=_word(BRIGHTNESS, luma.mean()),
        contrast=_word(CONTRAST, luma.std()),
        texture=_word(TEXTURE, steps / 2),
        colour=_colour(patch.reshape(-1, 3).mean(0)),
    )


def _word(scale: tuple[tuple[tuple[float, str], ...], str], value: float) -> str:
    steps, last = scale
    return next((word for limit, word in steps if value < limit), last)


def _colour(mean: np.ndarray) -> str:
    """The name of the colour `mean` float [3]."""
    red, green, blue = mean.tolist()
    largest, smallest = max(red, green, blue), min(red, green, blue)
    chroma = largest - smallest
    if chroma < GREY_CHROMA:
        return "black" if largest < 50 else "white" if smallest > 205 else "grey"
    if largest == red:
        hue = (green - blue) / chroma
    elif largest == green:
        hue = 2 + (blue - red) / chroma
    else:
        hue = 4 + (red - green) / chroma
    name = HUES[round(2 * hue) % len(HUES)]
    return "brown" if name == "orange" and largest < BROWN_BELOW else name


def _place(patch: np.ndarray, y: int, x: int, height: int, width: int) -> str:
    """In which ninth of the photograph the middle of `patch` lies."""
    row = ("top", "middle", "bottom")[3 * (y + patch.shape[0] // 2) // height]
    column = ("left", "centre", "right")[3 * (x + patch.shape[1] // 2) // width]
    return f"{row} {column}"
