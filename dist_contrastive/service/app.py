"""The service's routes: similarity, vectors, neighbours, and what tells how it is doing."""

import asyncio
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dist_contrastive import __version__
from dist_contrastive.config import require
from dist_contrastive.data.eval_view import EvalView
from dist_contrastive.searching.index_file import Found, SearchIndex
from dist_contrastive.service.batching import Batcher, Model
from dist_contrastive.service.fields import Fields, choice, decoded, number, one, read_fields
from dist_contrastive.service.guard import App, Guard
from dist_contrastive.service.limits import Limits, RefusedError, bad_request
from dist_contrastive.service.metrics import ServiceMetrics

FEATURE, EMBEDDING = OUTPUTS = ("feature", "embedding")
ROUTES = (
    "/", "/docs", "/openapi.json", "/page.js", "/page.css", "/healthz", "/readyz", "/metrics", "/about", "/similarity",
    "/embed", "/search",
)  # fmt: skip
NUM_NEIGHBOURS = 10
PAGE = {"/": "index.html", "/docs": "docs.html", "/page.js": "page.js", "/page.css": "page.css"}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


class Exported(Model, Protocol):
    """An export in use (`exporting.model.ExportedModel`)."""

    facts: dict[str, Any]
    provider: str
    is_int8: bool

    @property
    def has_text(self) -> bool: ...


@dataclass(frozen=True)
class Served:
    """What a service is of."""

    model: Exported
    index: SearchIndex | None
    limits: Limits

    @property
    def default_output(self) -> str:
        """An image-text run compares embeddings, as its texts have no others; all else features, as an index does."""
        return EMBEDDING if self.model.has_text else FEATURE

    @property
    def encoder(self) -> dict[str, Any]:
        """Which encoder answers; part of every answer that has numbers of it."""
        run = self.model.facts["run"]
        return {
            "method": run["method"], "name": run["encoder"]["name"], "step": run["step"],
            "precision": "int8" if self.model.is_int8 else "fp32", "sha256": run["weights_sha256"]["encoder"],
        }  # fmt: skip


def require_same_encoder(model: Exported, index: SearchIndex) -> None:
    """`UserError` where the vectors of `index` come from other weights than `model` has."""
    mine = model.facts["run"]["weights_sha256"]
    made = index.facts.encoder
    require(
        all(mine.get(part) == found for part, found in made.sha256.items()),
        f"{index.path} is an index of another encoder ({made.method}, step {made.step}) than this export's "
        f"({model.facts['run']['method']}, step {model.facts['run']['step']}): build it from the same run",
    )


def percentile(cosine: float, quantiles: Sequence[float]) -> float:
    """How many of 100 pairs have a smaller cosine, where `quantiles` are evenly spaced from the smallest to the largest.

    Between two quantiles it is interpolated; among equal ones it is their middle.
    """
    low, high = bisect_left(quantiles, cosine), bisect_right(quantiles, cosine)
    last = len(quantiles) - 1
    if high == 0:
        return 0.0
    if low > last:
        return 100.0
    if low == high:
        below, above = quantiles[low - 1], quantiles[low]
        return 100 * (low - 1 + (cosine - below) / (above - below)) / last
    return 100 * (low + high - 1) / 2 / last


class Service:
    """The work behind the routes; `app` is the whole as an ASGI application.

    Attributes:
        is_ready: whether new requests are welcome.
    """

    def __init__(self, served: Served) -> None:
        self._served, self._limits, self._model = served, served.limits, served.model
        self.metrics = ServiceMetrics()
        view = {**served.model.facts["view"]}
        self._view = EvalView(view["size"], view["crop"], tuple(view["mean"]), tuple(view["std"]))
        self.is_ready = False
        self._pool = ThreadPoolExecutor(served.limits.decode_threads, thread_name_prefix="decode")
        self._batcher = Batcher(
            served.model,
            max_batch=served.limits.max_batch,
            wait_s=served.limits.batch_wait_ms / 1000,
            under_way=lambda: self.metrics.in_flight,
            seen=self.metrics.batched,
        )
        # What is compiled or laid out at the first image is so before the first client.
        picture = self._view.cut([np.zeros((64, 48, 3), np.uint8)]).numpy()[0]
        self._batcher.embed([picture]).result()
        self.app = self._build()

    def close(self) -> None:
        """Finish what was begun and end the threads."""
        self.is_ready = False
        self._pool.shutdown()
        self._batcher.close()

    async def similarity(self, fields: Fields) -> dict[str, Any]:
        output = choice(fields, "output", OUTPUTS, self._served.default_output)
        images = [(name, one(fields, name)) for name in ("a", "b")]
        a, b = _unit(await self._vectors(images, output))
        cosine = float(np.clip(a @ b, -1, 1))
        of_pairs = self._model.facts["cosines"][output]
        return {
            "cosine": round(cosine, 6),
            "percentile_random": round(percentile(cosine, of_pairs["random"]), 2),
            "percentile_positive": round(percentile(cosine, of_pairs["positive"]), 2),
            "output": output,
            "encoder": self._served.encoder,
        }

    async def embed(self, fields: Fields) -> dict[str, Any]:
        output = choice(fields, "output", OUTPUTS, self._served.default_output)
        images = fields.get("images", ())
        if not images:
            raise bad_request("Give images, one or more.")
        vectors = await self._vectors([(f"images[{i}]", image) for i, image in enumerate(images)], output)
        return {
            "output": output, "dimension": vectors.shape[1], "vectors": vectors.tolist(),
            "encoder": self._served.encoder,
        }  # fmt: skip

    async def search(self, fields: Fields) -> dict[str, Any]:
        index = self._served.index
        if index is None:
            raise RefusedError(404, "no_index", "This service has no index: it was started without --index.")
        k = number(fields, "k", min(NUM_NEIGHBOURS, self._limits.max_neighbours), self._limits.max_neighbours)
        if ("text" in fields) == ("image" in fields):
            raise bad_request("Give either an image or a text.")
        if "text" in fields:
            query = await self._text_vector(str(one(fields, "text")), index)
        else:
            query = await self._vectors([("image", one(fields, "image"))], index.facts.encoder.output)
        found = await self._on_thread(lambda: index.search(query, k))
        return {"neighbours": self._neighbours(index, found), "output": index.facts.encoder.output,
                "encoder": self._served.encoder}  # fmt: skip

    def about(self) -> dict[str, Any]:
        """What the page shows of the service."""
        index = self._served.index
        return {
            "encoder": self._served.encoder,
            "provider": self._model.provider,
            "output": self._served.default_output,
            "has_text": self._model.has_text and index is not None and index.facts.encoder.output == EMBEDDING,
            "index": None if index is None else {"vectors": len(index), "kind": index.facts.kind},
            "cosines": self._model.facts["cosines"][self._served.default_output],
            "version": __version__,
        }

    async def _text_vector(self, text: str, index: SearchIndex) -> np.ndarray:
        if not self._model.has_text:
            raise bad_request("This service's encoder learned from images alone: search by an image.")
        if index.facts.encoder.output != EMBEDDING:
            raise bad_request("This service's index holds features; texts are found in one of embeddings.")
        if not text.strip() or len(text) > self._limits.max_text:
            raise bad_request(f"text has 1 to {self._limits.max_text} characters.")
        # A lone half of a surrogate pair, which JSON can write, is no character.
        text = text.encode("utf-8", "replace").decode()
        return (await asyncio.wrap_future(self._batcher.embed_texts([text])))[1]

    async def _vectors(self, images: Sequence[tuple[str, Any]], output: str) -> np.ndarray:
        pictures = await asyncio.gather(
            *(self._on_thread(lambda n=n, d=d: decoded(n, d, self._view, self._limits)) for n, d in images)  # type: ignore[misc]
        )
        return (await asyncio.wrap_future(self._batcher.embed(pictures)))[OUTPUTS.index(output)]

    async def _on_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _neighbours(self, index: SearchIndex, found: Found) -> list[dict[str, Any]]:
        classes = index.facts.classes
        rows: list[dict[str, Any]] = []
        for place, (item, score) in enumerate(zip(found.ids[0].tolist(), found.scores[0].tolist(), strict=True)):
            if item < 0:
                break
            label = None if found.labels is None else int(found.labels[0, place])
            rows.append({
                "id": item,
                "score": round(score, 6),
                "label": None if label is None or label < 0 else label,
                "class": classes[label] if label is not None and 0 <= label < len(classes) else None,
                "path": None if found.paths is None else found.paths[0][place],
                "picture": f"/picture/{item}" if index.items.pictures is not None else None,
            })  # fmt: skip
        return rows

    def _build(self) -> App:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse, Response
        from starlette.exceptions import HTTPException
        from starlette.middleware.cors import CORSMiddleware

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[None]:
            self.is_ready = True
            yield
            await asyncio.to_thread(self.close)

        app = FastAPI(
            title="dist_contrastive", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
            redirect_slashes=False,
        )  # fmt: skip

        def post(
            path: str, work: Callable[[Fields], Awaitable[dict[str, Any]]], about: str, images: Sequence[str],
            others: Mapping[str, Any], required: Sequence[str],
        ) -> None:  # fmt: skip
            async def answer(request: Request) -> JSONResponse:
                fields = await read_fields(request, images=images, others=list(others), limits=self._limits)
                return JSONResponse(await work(fields))

            app.add_api_route(
                path, answer, methods=["POST"], summary=about, name=path[1:],
                openapi_extra={"requestBody": _described(images, others, required)},
                responses={code: {"description": text} for code, text in REFUSALS.items()},
            )  # fmt: skip

        output = {"type": "string", "enum": list(OUTPUTS), "default": self._served.default_output}
        post("/similarity", self.similarity, "How alike two images are.", ("a", "b"), {"output": output}, ("a", "b"))
        post("/embed", self.embed, "Images as vectors.", ("images",), {"output": output}, ("images",))
        post(
            "/search", self.search, "The nearest neighbours of an image or a text in the index.", ("image",),
            {"k": {"type": "integer", "minimum": 1, "maximum": self._limits.max_neighbours},
             "text": {"type": "string", "maxLength": self._limits.max_text}}, (),
        )  # fmt: skip

        @app.get("/healthz", summary="Whether the process lives.")
        async def healthz() -> dict[str, str]:
            return {"status": "alive"}

        @app.get("/readyz", summary="Whether it takes requests.")
        async def readyz() -> JSONResponse:
            is_ready = self.is_ready and self._batcher.is_alive
            return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

        @app.get("/metrics", summary="Counters for Prometheus.")
        async def metrics() -> Response:
            return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

        @app.get("/about", summary="Which encoder, which index, and the cosines of the training data's pairs.")
        async def about() -> JSONResponse:
            return JSONResponse(self.about())

        @app.get("/picture/{item}", summary="The picture of an item of the index.")
        async def picture(item: str) -> Response:
            index = self._served.index
            is_id = item.isascii() and item.isdecimal() and len(item) < 19
            data = await self._on_thread(lambda: index.picture(int(item))) if index is not None and is_id else None
            if data is None:
                raise RefusedError(404, "not_found", "There is no picture of this id.")
            return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

        for path, name in PAGE.items():
            content = (files("dist_contrastive.service") / "page" / name).read_bytes()
            media = f"{TYPES[Path(name).suffix]}; charset=utf-8"
            app.add_api_route(path, _static(Response, content, media), include_in_schema=False)

        @app.exception_handler(RefusedError)
        async def refused(request: Request, error: RefusedError) -> JSONResponse:
            self.metrics.failed(error.kind)
            return JSONResponse({"detail": str(error)}, error.status, error.headers)

        @app.exception_handler(HTTPException)
        async def no_route(request: Request, error: HTTPException) -> JSONResponse:
            self.metrics.failed("no_route")
            sentence = {
                404: "There is no such page here; /docs lists what there is.",
                405: "This page takes another method; /docs says which.",
            }.get(error.status_code, "This request can't be answered; /docs lists what can.")
            return JSONResponse({"detail": sentence}, error.status_code, error.headers)

        guarded: App = Guard(app, self._limits, self.metrics, frozenset(ROUTES))
        if self._limits.cors:  # outermost, so that refusals can be read by these pages, too
            guarded = CORSMiddleware(
                guarded, allow_origins=list(self._limits.cors), allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )  # fmt: skip
        return guarded


REFUSALS: dict[int | str, str] = {
    401: "The token is missing or wrong.", 408: "The body came too slowly.",
    413: "The body, an image or their number is too large.", 415: "The body is neither multipart nor JSON.",
    422: "A field or an image is not what it should be.", 429: "Too many requests are under way; Retry-After says when.",
    503: "It took too long.",
}  # fmt: skip


def _described(images: Sequence[str], others: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """What OpenAPI says of a body: files in multipart, or base64 in JSON."""

    def schema(image: dict[str, Any]) -> dict[str, Any]:
        many = {name: {"type": "array", "items": image} if name == "images" else image for name in images}
        return {"schema": {"type": "object", "properties": {**many, **others}, "required": list(required)}}

    return {
        "required": True,
        "content": {
            "multipart/form-data": schema({"type": "string", "format": "binary"}),
            "application/json": schema({"type": "string", "contentEncoding": "base64"}),
        },
    }


def _static(response: Any, content: bytes, media: str) -> Callable[[], Awaitable[Any]]:
    async def answer() -> Any:
        return response(content, media_type=media)

    return answer


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)
