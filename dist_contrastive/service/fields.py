"""What a request's body holds: fields of images, texts and settings, from multipart or JSON, and images as pictures."""

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dist_contrastive.data.eval_view import EvalView
from dist_contrastive.data.pictures import BadImageError, TooManyPixelsError, decode_rgb
from dist_contrastive.service.limits import Limits, RefusedError, bad_image, bad_request

Fields = Mapping[str, Sequence[bytes | str | int]]
"""The values of each field: images as the bytes of their files, all else as it came."""
MULTIPART, JSON = "multipart/form-data", "application/json"


async def read_fields(request: Any, *, images: Sequence[str], others: Sequence[str], limits: Limits) -> Fields:
    """The fields of a request (Starlette's), where `images` are the names of those that hold images, `others` of all others.

    `RefusedError` for another content type, a body that is not of its type, unknown names, too many images.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == MULTIPART:
        found = await _multipart(request, images, limits)
    elif kind == JSON:
        found = _json(await request.body(), images)
    else:
        raise RefusedError(415, "bad_request", f"Send {MULTIPART} or {JSON}, not {kind or 'a body without a type'}.")
    known = [*images, *others]
    for name, values in found.items():
        if name not in known:
            raise bad_request(f"There is no field {name[:40]!r} here; there are {', '.join(known)}.")
        if name in images and len(values) > limits.max_images:
            raise RefusedError(413, "images", f"A request has at most {limits.max_images} images here.")
    return found


def one(fields: Fields, name: str) -> Any:
    """The one value of a field; `RefusedError` where there is none, or there are several."""
    values = fields.get(name, ())
    if len(values) != 1:
        raise bad_request(f"Give {name} once; it came {len(values)} times.")
    return values[0]


def choice(fields: Fields, name: str, known: Sequence[str], default: str) -> str:
    value = one(fields, name) if name in fields else default
    if value not in known:
        raise bad_request(f"{name} is one of {', '.join(known)}.")
    return str(value)


def number(fields: Fields, name: str, default: int, largest: int) -> int:
    """An integer from 1 to `largest`."""
    value = one(fields, name) if name in fields else default
    text = str(value).strip()
    if isinstance(value, bytes) or not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise bad_request(f"{name} is a number from 1 to {largest}.")
    if not 1 <= int(text) <= largest:
        raise bad_request(f"{name} is a number from 1 to {largest}, not {int(text)}.")
    return int(text)


def decoded(name: str, data: bytes, view: EvalView, limits: Limits) -> np.ndarray:
    """The picture uint8 [h, w, 3] in an image's bytes, upright; already cut to `view`'s square where it takes the whole one.

    So what waits for the model is small, and pictures of all sizes share its batches: the square of such a square is itself.
    """
    if not data:
        raise bad_image(f"{name} is empty.")
    try:
        picture = np.asarray(decode_rgb(io.BytesIO(data), limits.max_pixels))
    except TooManyPixelsError as error:
        raise RefusedError(413, "pixels", f"{name} has {error}.") from error
    except BadImageError as error:
        raise bad_image(f"{name} can't be read as an image: {error}.") from error
    return view.cut([picture]).numpy()[0] if view.crop == 1 else picture


async def _multipart(request: Any, images: Sequence[str], limits: Limits) -> Fields:
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException

    too_many = RefusedError(413, "images", f"A request has at most {limits.max_images} images here.")
    found: dict[str, list[bytes | str | int]] = {}
    try:
        async with request.form(
            max_files=limits.max_images, max_fields=limits.max_images, max_part_size=limits.max_body
        ) as form:
            for name, value in form.multi_items():
                data = await value.read() if isinstance(value, UploadFile) else value
                if name in images and isinstance(data, str):
                    raise bad_request(f"{name} is an image's file; this one came as text.")
                if name not in images and isinstance(data, bytes):
                    data = data[: 4 * limits.max_text + 4].decode("utf-8", "replace")
                found.setdefault(name, []).append(data)
    except HTTPException as error:
        # Starlette's parser tells the two apart by its sentence alone.
        raise (
            too_many if "Too many" in str(error.detail) else bad_request("The body is no whole multipart form.")
        ) from None
    except (ValueError, LookupError) as error:  # what its parser runs into on broken bodies
        raise bad_request("The body is no whole multipart form.") from error
    return found


def _json(body: bytes, images: Sequence[str]) -> Fields:
    try:
        page = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise bad_request("The body is no JSON.") from error
    if not isinstance(page, dict):
        raise bad_request("The body is an object of fields: {...}.")
    found: dict[str, list[bytes | str | int]] = {}
    for name, given in page.items():
        values = given if isinstance(given, list) and name in images else [given]
        for value in values:
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise bad_request(f"{name[:40]} has a value of the wrong kind.")
            if name not in images:
                found.setdefault(name, []).append(value)
                continue
            try:
                found.setdefault(name, []).append(base64.b64decode(str(value), validate=True))
            except (binascii.Error, ValueError) as error:
                raise bad_request(f"{name} is an image's file in base64; this is none.") from error
    return found
