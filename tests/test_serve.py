"""The service, over HTTP against its own process: what it answers, what it refuses, and that it goes on after each."""

import asyncio
import base64
import io
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks import serve as benchmark
from dist_contrastive import cli, serve
from dist_contrastive.exporting.model import ExportedModel
from dist_contrastive.run_folder.names import DONE
from dist_contrastive.searching.index_file import SearchIndex
from dist_contrastive.service.app import percentile
from dist_contrastive.service.server import listening
from tests.betons import picture
from tests.services import DEADLINE_S, Exported, Running, make_exported, make_indexed, running

KEYS = {"cosine", "percentile_random", "percentile_positive", "output", "encoder"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return make_exported(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def service(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("service") / "log"
    words = ("--max-images", 8, "--max-body-mib", 1, "--receive-s", 2, "--max-pixels", 1_000_000)
    with running(log, exported.run, "--index", exported.neighbours, *words) as found:
        yield found
    assert found.process.returncode == 0
    assert log.read_text() == ""  # no error that nobody foresaw, in any test


@pytest.fixture
def client(service: Running) -> Iterator[httpx.Client]:
    with service.client() as found:
        yield found
        answers(found)  # whatever the test did to it


def answers(client: httpx.Client) -> None:
    files = {"a": encoded(picture(30, 20, 1)), "b": encoded(picture(30, 20, 1))}
    assert client.post("/similarity", files=files).json()["cosine"] == pytest.approx(1, abs=1e-5)


def encoded(values: np.ndarray | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    image, buffer = values if isinstance(values, Image.Image) else Image.fromarray(values), io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def bomb(width: int = 20_000, height: int = 20_000) -> bytes:
    """A PNG with this header and next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def vectors(client: httpx.Client, *images: bytes, output: str = "embedding") -> np.ndarray:
    answer = client.post("/embed", files=[("images", image) for image in images], data={"output": output})
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["vectors"], np.float32)


def assert_refused(answer: httpx.Response, status: int, *words: str) -> None:
    assert answer.status_code == status, answer.text
    detail = answer.json()["detail"]
    assert set(answer.json()) == {"detail"}
    assert "\n" not in detail
    assert "Traceback" not in detail
    assert "/tmp" not in detail
    assert ".py" not in detail
    for word in words:
        assert word in detail


def test_vectors_are_the_exports(exported: Exported, client: httpx.Client) -> None:
    pictures = [picture(20, 31, 1), picture(16, 16, 2), picture(50, 9, 3)]
    for output, expected in zip(("feature", "embedding"), ExportedModel(exported.export).embed(pictures), strict=True):
        found = vectors(client, *(encoded(one) for one in pictures), output=output)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_pair_has_its_cosine_and_where_it_stands_among_pairs(exported: Exported, client: httpx.Client) -> None:
    a, b = picture(20, 31, 1), picture(44, 30, 2)
    files = {"a": encoded(a), "b": encoded(b)}
    found = client.post("/similarity", files=files).json()
    assert found.keys() == KEYS
    one, other = (x / np.linalg.norm(x) for x in ExportedModel(exported.export).embed([a, b])[1])
    assert found["cosine"] == pytest.approx(one @ other, abs=1e-4)
    quantiles = json.loads((exported.export / "export.json").read_text())["cosines"]["embedding"]
    for kind in ("random", "positive"):
        assert found[f"percentile_{kind}"] == pytest.approx(percentile(found["cosine"], quantiles[kind]), abs=0.1)
    page = {name: base64.b64encode(image).decode() for name, image in files.items()}
    assert client.post("/similarity", json=page).json() == found


def test_a_percentile_is_the_share_of_smaller_ones() -> None:
    quantiles = [0.0, 0.1, 0.2, 0.3, 1.0]
    assert percentile(-1, quantiles) == 0
    assert percentile(2, quantiles) == 100
    assert percentile(0.15, quantiles) == pytest.approx(37.5)
    assert percentile(0.2, quantiles) == pytest.approx(50)
    assert percentile(0.5, [0.5, 0.5, 0.5]) == 50


def test_neighbours_are_the_indexs_with_pictures(exported: Exported, client: httpx.Client) -> None:
    shown = client.get("/picture/7")
    assert shown.headers["content-type"] == "image/jpeg"
    found = client.post("/search", files={"image": shown.content}, data={"k": "4"}).json()["neighbours"]
    query = ExportedModel(exported.export).embed([np.asarray(Image.open(io.BytesIO(shown.content)))])[1]
    with SearchIndex(exported.neighbours) as index:
        expected = index.search(query, 4)
    assert [one["id"] for one in found] == expected.ids[0].tolist()
    np.testing.assert_allclose([one["score"] for one in found], expected.scores[0], atol=1e-4)
    assert found[0]["picture"] == f"/picture/{found[0]['id']}"
    assert found[0]["class"] == f"class {found[0]['label']}"
    assert len(client.post("/search", data={"text": "1 of 2"}, files={"k": (None, "3")}).json()["neighbours"]) == 3
    assert_refused(client.get("/picture/99999"), 404)
    assert_refused(client.get("/picture/..%2F..%2Fetc%2Fpasswd"), 404)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_every_format_is_read(client: httpx.Client, form: str) -> None:
    assert vectors(client, encoded(picture(20, 24, 1), form)).shape[0] == 1


def test_pixels_count_and_not_how_they_are_written(client: httpx.Client) -> None:
    values = picture(20, 28, 5)
    upright = vectors(client, encoded(values))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise to be seen upright
    turned = encoded(np.rot90(values), exif=exif)
    np.testing.assert_allclose(vectors(client, turned), upright, atol=1e-6)
    frames = [Image.fromarray(values), Image.fromarray(picture(20, 28, 6))]
    animated = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_allclose(vectors(client, animated), upright, atol=1e-6)
    grey = values[..., 0]
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    as_rgb = np.repeat(grey[..., None], 3, 2)
    np.testing.assert_allclose(vectors(client, encoded(deep)), vectors(client, encoded(as_rgb)), atol=1e-6)
    cmyk = Image.fromarray(values).convert("CMYK")
    np.testing.assert_allclose(vectors(client, encoded(cmyk, "TIFF")), upright, atol=1e-6)
    assert vectors(client, encoded(picture(1, 1, 1))).shape == upright.shape


def test_bad_images_are_refused_with_a_sentence(client: httpx.Client) -> None:
    good = encoded(picture(300, 300, 1))

    def similarity(image: bytes) -> httpx.Response:
        return client.post("/similarity", files={"a": good, "b": image})

    assert_refused(similarity(b"no image"), 422, "b can't be read as an image")
    assert_refused(similarity(good[: len(good) // 2]), 422, "b can't be read")
    assert_refused(similarity(b""), 422, "b is empty")
    assert_refused(similarity(bomb()), 413, "pixels")  # beyond Pillow's own limit
    assert_refused(similarity(bomb(2000, 600)), 413, "2000 x 600 pixels")
    assert_refused(similarity(bomb(0, 10)), 422)
    assert_refused(similarity(encoded(Image.new("F", (4, 4)), "TIFF")), 422, "32 bits")


def test_bad_requests_are_refused_with_a_sentence(client: httpx.Client) -> None:
    good = encoded(picture(20, 20, 1))
    text = base64.b64encode(good).decode()
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert_refused(client.post("/similarity"), 415)
    assert_refused(client.post("/similarity", content=b"", headers=form), 422)
    assert_refused(client.post("/similarity", content=b"", headers={"content-type": "application/json"}), 422, "JSON")
    assert_refused(client.post("/similarity", content=b"{}", headers={"content-type": "multipart/form-data"}), 422)
    assert_refused(client.post("/similarity", files={"a": good, "c": good}), 422, "'c'", "a, b")
    assert_refused(client.post("/similarity", files={"a": good}), 422, "b once")
    assert_refused(client.post("/similarity", files=[("a", good), ("a", good), ("b", good)]), 422, "a once", "2 times")
    assert_refused(client.post("/similarity", files={"a": good, "b": (None, "text")}), 422, "b is an image's file")
    assert_refused(client.post("/similarity", json={"a": text, "b": "§"}), 422, "base64")
    assert_refused(client.post("/similarity", json={"a": text, "b": {"x": 1}}), 422, "wrong kind")
    assert_refused(client.post("/similarity", json={"a": text, "b": text, "output": "x"}), 422, "feature, embedding")
    assert_refused(client.post("/similarity", json=[text]), 422, "object")
    deep = client.post("/similarity", content=b"[" * 100_000, headers={"content-type": "application/json"})
    assert_refused(deep, 422, "JSON")
    for k in ("0", "-1", "x", "1e3", "9" * 30, "²"):
        assert_refused(client.post("/search", files={"image": good}, data={"k": k}), 422, "k is a number")
    assert_refused(client.post("/search", json={"image": text, "text": "x"}), 422, "either")
    assert_refused(client.post("/search", json={"k": 3}), 422, "either")
    assert_refused(client.post("/search", json={"text": " "}), 422, "characters")
    assert client.post(
        "/search", content=b'{"text": "\\ud800"}', headers={"content-type": "application/json"}
    ).is_success
    assert_refused(client.post("/nothing", json={}), 404)
    assert_refused(client.get("/similarity"), 405)


def test_too_much_is_refused_with_a_sentence(client: httpx.Client) -> None:
    good = encoded(picture(8, 8, 1))
    assert_refused(client.post("/embed", files=[("images", good)] * 9), 413, "8 images")
    assert_refused(client.post("/embed", json={"images": [base64.b64encode(good).decode()] * 9}), 413, "8 images")
    assert_refused(client.post("/embed", files=[("images", good)] * 10_000), 413)
    assert_refused(client.post("/embed", content=bytes(2**20 + 1)), 413, "1,048,576 bytes")
    assert_refused(client.post("/embed", content=iter([bytes(2**19)] * 3)), 413, "bytes")  # its length not told


GOOD = encoded(picture(20, 20, 1), "JPEG")
REQUEST = httpx.Request("POST", "http://service/similarity", files={"a": GOOD, "b": GOOD})
FORM = REQUEST.headers["content-type"]
BODIES = {
    FORM: REQUEST.read(),
    "application/json": json.dumps({"a": base64.b64encode(GOOD).decode(), "b": "", "output": "feature"}).encode(),
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """A path, a content type, and a body: of that type and then damaged, of another, or of any bytes."""
    form = draw(st.sampled_from([*BODIES, "multipart/form-data; boundary=x", "multipart/form-data", "text/plain"]))
    body = bytearray(draw(st.sampled_from([BODIES.get(form, b""), *BODIES.values()]) | st.binary(max_size=300)))
    places = st.integers(0, max(0, len(body) - 1))
    for place, value in draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)) if body else ():
        body[place] = value
    end = draw(st.none() | places)
    return draw(st.sampled_from(["/similarity", "/embed", "/search"])), form, bytes(body[:end])


@settings(
    max_examples=1000, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(asked=requests())
def test_a_thousand_random_bodies_are_answered_in_form(client: httpx.Client, asked: tuple[str, str, bytes]) -> None:
    path, form, body = asked
    answer = client.post(path, content=body, headers={"content-type": form})
    assert answer.status_code in (200, 413, 415, 422), answer.text
    if answer.status_code != 200:
        assert_refused(answer, answer.status_code)


def test_slow_clients_are_hung_up_on(service: Running, client: httpx.Client) -> None:
    for sent in (b"", b"POST /simi", b"GET /healthz HTTP/1.1\r\nhost: x\r\n"):
        with socket.create_connection(service.address, timeout=DEADLINE_S) as slow:
            slow.sendall(sent)
            assert slow.recv(100) == b""
    with socket.create_connection(service.address, timeout=DEADLINE_S) as slow:
        slow.sendall(
            b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n{"
        )
        assert b" 408 " in slow.recv(1000).splitlines()[0]


def test_clients_that_go_away_cost_nothing_more(service: Running, client: httpx.Client) -> None:
    request = client.build_request("POST", "/embed", files=[("images", encoded(picture(200, 200, 1)))] * 8)
    body, form = request.read(), request.headers["content-type"]
    head = f"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: {form}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    for sent in (head, head + body[:1000], head + body):
        for _ in range(10):
            with socket.create_connection(service.address, timeout=DEADLINE_S) as gone:
                gone.sendall(sent)
    answers(client)
    for _ in range(600):
        if "dist_contrastive_queue_requests 0.0" in client.get("/metrics").text:
            return
        threading.Event().wait(0.1)
    raise AssertionError("requests of clients that are gone are still under way")


def test_many_at_once_share_batches_and_get_their_own(client: httpx.Client) -> None:
    images = [encoded(picture(20 + seed, 24, seed)) for seed in range(64)]
    alone = [vectors(client, image)[0] for image in images]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda image: vectors(client, image)[0], images))
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_an_answers_body_does_not_wait_for_its_head_to_be_acknowledged() -> None:
    async def has_no_delay() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listening("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(accepted, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                no_delay = await found
                writer.close()
        return no_delay

    assert asyncio.run(has_no_delay())


def test_it_tells_how_it_is_doing(client: httpx.Client) -> None:
    assert client.get("/healthz").is_success
    assert client.get("/readyz").json() == {"status": "ready"}
    client.post("/similarity", content=b"x", headers={"content-type": "application/json"})
    page = client.get("/metrics").text
    assert 'dist_contrastive_request_seconds_count{route="/similarity",status="422"}' in page
    assert 'dist_contrastive_errors_total{kind="bad_request"}' in page
    assert "dist_contrastive_batch_images_count" in page
    described = client.get("/openapi.json").json()["paths"]
    assert {"/similarity", "/embed", "/search"} <= described.keys()


def test_the_examples_of_docs_work(client: httpx.Client, service: Running, tmp_path: Path) -> None:
    page = client.get("/docs").text
    assert "://" not in page.replace("http://127.0.0.1:8000", "")  # nothing from elsewhere
    for name in ("one.jpg", "other.jpg"):
        (tmp_path / name).write_bytes(encoded(picture(20, 20, len(name)), "JPEG"))
    examples = [part.partition("</pre>")[0] for part in page.split("<pre>")[1:]]
    assert len(examples) == 6
    for example in examples:
        command = example.replace("http://127.0.0.1:8000", service.url).replace("curl", "curl -sS --fail-with-body")
        done = subprocess.run(
            ["bash", "-ec", command], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_token_origins_queue_and_time(exported: Exported, tmp_path: Path) -> None:
    good = encoded(picture(20, 20, 1))
    words = ("--token", "secret", "--cors", "https://a.example", "--max-queue", 1)
    with running(tmp_path / "log", exported.export, *words) as service:
        with service.client() as stranger:
            assert_refused(stranger.post("/embed", files={"images": good}), 401, "token")
            assert_refused(stranger.post("/embed", headers={"authorization": "Bearer secreT"}), 401)
            assert_refused(stranger.get("/metrics"), 401)
            assert stranger.get("/healthz").is_success
            assert stranger.get("/").is_success
        with service.client(headers={"authorization": "Bearer secret", "origin": "https://a.example"}) as client:
            answer = client.post("/embed", files={"images": good})
            assert answer.is_success
            assert answer.headers["access-control-allow-origin"] == "https://a.example"
            other = client.get("/about", headers={"origin": "https://b.example"})
            assert "access-control-allow-origin" not in other.headers
            assert_refused(client.post("/search", files={"image": good}), 404, "--index")
            with socket.create_connection(service.address, timeout=DEADLINE_S) as slow:
                slow.sendall(
                    b"POST /embed HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\ncontent-length: 9\r\n\r\n"
                )
                while "queue_requests 1.0" not in client.get("/metrics").text:
                    pass
                full = client.post("/embed", files={"images": good})
                assert_refused(full, 429, "under way")
                assert full.headers["retry-after"] == "1"
    with (
        running(tmp_path / "log", exported.export, "--timeout-s", 1e-6) as service,
        service.client() as client,
    ):
        assert_refused(client.post("/embed", files={"images": good}), 503, "took longer")


def test_sigterm_finishes_what_is_under_way(exported: Exported, tmp_path: Path) -> None:
    with running(tmp_path / "log", exported.export) as service, service.client() as client:
        request = client.build_request("POST", "/embed", files={"images": encoded(picture(20, 20, 1))})
        body, form = request.read(), request.headers["content-type"]
        with socket.create_connection(service.address, timeout=DEADLINE_S) as under_way:
            head = f"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: {form}\r\ncontent-length: {len(body)}\r\n\r\n"
            under_way.sendall(head.encode() + body[:50])
            while "queue_requests 1.0" not in client.get("/metrics").text:
                pass
            client.close()
            service.process.terminate()
            threading.Event().wait(0.5)
            assert service.process.poll() is None
            under_way.sendall(body[50:])
            answer = b""
            while piece := under_way.recv(100_000):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"vectors" in answer
        assert service.process.wait(DEADLINE_S) == 0


def test_what_can_not_be_served_is_refused_in_one_line(
    exported: Exported, service: Running, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: object) -> str:
        assert cli.main_guard(lambda: serve.main([str(word) for word in words])) == 2
        out, errors = capfd.readouterr()
        assert out == ""
        (line,) = errors.splitlines()
        return line

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "uvicorn", None)
        assert "uvicorn is not installed: pip install" in refused(exported.run)
    assert "give another --port" in refused(exported.run, "--port", service.address[1])
    run = tmp_path / "run"
    shutil.copytree(exported.run, run)
    path = run / "export" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert "SHA-256" in refused(run)
    shutil.rmtree(run / "export")
    assert "dist_contrastive.export" in refused(run)
    (run / DONE).unlink()
    assert "not done" in refused(run)
    assert "no export" in refused(tmp_path)
    assert "no folder" in refused(tmp_path / "nothing")
    other = tmp_path / "other"
    other.mkdir()
    changed = make_indexed(other, seed=1)
    capfd.readouterr()
    assert "another encoder" in refused(exported.run, "--index", changed.neighbours)
    assert "no index" in refused(exported.run, "--index", tmp_path)
    assert "--max-queue" in refused(exported.run, "--max-queue", 0)


def test_the_benchmark_counts_answers_of_both_ways_and_memory(exported: Exported, tmp_path: Path) -> None:
    words = (
        "--clients",
        1,
        4,
        "--seconds",
        0.5,
        "--rounds",
        1,
        "--side",
        24,
        "--soak-minutes",
        0.02,
        "--out",
        tmp_path,
    )
    benchmark.main([str(exported.export), *(str(word) for word in words)])
    found = json.loads((tmp_path / "serve.json").read_text())
    values = {(one["case"], one["contender"], one["metric"]): one["values"] for one in found["series"]}
    cases = [*((case, way) for case in ("1 client", "4 clients") for way in benchmark.OPTIONS)]
    for case in (*cases, ("4 clients, 0.02 min", benchmark.TOGETHER)):
        assert min(values[*case, benchmark.REQUESTS]) > 0
        assert max(values[*case, benchmark.FAILED]) == 0
        quantiles = [values[*case, name][0] for name in benchmark.QUANTILES]
        assert 0 < quantiles[0] <= quantiles[1] <= quantiles[2]
    assert min(values["4 clients, 0.02 min", benchmark.TOGETHER, benchmark.MEMORY]) > 10
    assert (tmp_path / "memory.png").exists()


def test_the_benchmark_counts_what_failed(exported: Exported, service: Running, client: httpx.Client) -> None:
    answers = benchmark.ask(service.address[1], benchmark.similarity_request([b"x", b"x"]), 2, 0.2)
    assert answers.num_failed == len(answers.seconds) > 0
    assert answers.per_s == 0
