"""An export, from a run's folder to a folder of its own: made, checked against the run, then put in place."""

import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import dist_contrastive
from dist_contrastive.atomic import sync_folder, write_synced, writing
from dist_contrastive.batch import Share
from dist_contrastive.checkpoint import save_module, sha256_of
from dist_contrastive.config import require
from dist_contrastive.data.beton import Dataset, open_dataset
from dist_contrastive.data.compiled import announced_compilation
from dist_contrastive.data.resident import loader_of
from dist_contrastive.embedder import Embedder
from dist_contrastive.evaluation.features import extract_views
from dist_contrastive.exporting.graphs import image_graph, text_graph, with_preprocessing
from dist_contrastive.exporting.measure import (
    CPU,
    MAX_LOSS,
    MIN_RECALL,
    MIN_SPEARMAN,
    NUM_PAIRS,
    TOLERANCE,
    Form,
    Vectors,
    cosines,
    failures,
    form_of,
    likeness,
    probe_scores,
    quantiles,
    random_pairs,
    read_images,
    unit,
)
from dist_contrastive.exporting.model import PROVIDERS, ExportedModel, open_session, sum_of
from dist_contrastive.exporting.names import (
    EMBEDDING,
    FACTS,
    FEATURE,
    IMAGES,
    MODEL,
    MODEL_INT8,
    TEXT_MODEL,
    TIMM_CONFIG,
    TIMM_WEIGHTS,
    TOKENS,
    VERSION,
)
from dist_contrastive.exporting.packages import require_packages
from dist_contrastive.exporting.preprocessing import PIXELS
from dist_contrastive.exporting.processor import int8_instructions, processor_name
from dist_contrastive.exporting.quantize import Int8
from dist_contrastive.exporting.search import Found, search
from dist_contrastive.exporting.timm_config import timm_config
from dist_contrastive.methods.image_text import ImageText
from dist_contrastive.run_folder.names import EXPORT, TOKENIZER
from dist_contrastive.run_folder.trained import FILES as PARTS
from dist_contrastive.run_folder.trained import TrainedRun, open_run

if TYPE_CHECKING:
    import onnx

CALIBRATION_IMAGES, CALIBRATION_BATCH = 512, 64
MAX_POSITIVES = 5_000
"""Of how many training images two views are compared."""
ODD_SIZES = ((1, 1), (1, 7), (9, 4), (31, 57), (64, 64), (120, 87), (333, 250))
"""Sizes of images at which the graph is compared with torch."""
PACKAGES = ("onnx", "onnxruntime", "timm", "torch")

Say = Callable[[str], None]


def export(
    run: Path,
    *,
    checkpoint: int | None,
    data: Path | None,
    out: Path | None,
    int8: bool,
    max_images: int,
    say: Say = print,
) -> Path:
    """Export the run in folder `run`; the options are the command's. Returns the folder."""
    require_packages("onnx", "onnxruntime", "onnxscript")
    trained = open_run(run, checkpoint=checkpoint)
    folder = out or run / EXPORT
    require(
        not folder.exists() or (folder / FACTS).is_file() or (folder.is_dir() and not any(folder.iterdir())),
        f"--out {folder} is there and no export; give another folder, or delete it",
    )
    dataset = open_dataset(data or trained.config.data.path)
    require(
        dataset.manifest.identity == trained.dataset_sha256,
        f"{dataset.path} is not the dataset that {run} was trained on (its SHA-256 differs): --data PATH names where that lies",
    )
    incomplete = folder.with_name(f".{folder.name}.incomplete")
    with writing(folder, lambda: "the same command exports again"):
        shutil.rmtree(incomplete, ignore_errors=True)
        incomplete.mkdir(parents=True)
    try:
        with announced_compilation(say):
            facts = _Export(trained, dataset, incomplete, max_images, say).make(int8=int8)
        with writing(folder, lambda: "the same command exports again"):
            write_synced(incomplete / FACTS, json.dumps({**facts, "sha256": sum_of(facts)}, indent=1).encode())
            ExportedModel(incomplete)  # it opens
            sync_folder(incomplete)
            _replace(folder, incomplete)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)
    say(f"written to {folder}")
    return folder


def _replace(folder: Path, by: Path) -> None:
    """Put the folder `by` in the place of `folder`."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    by.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


class _Export:
    def __init__(self, run: TrainedRun, dataset: Dataset, folder: Path, max_images: int, say: Say) -> None:
        self._run, self._dataset, self._folder, self._say = run, dataset, folder, say
        self._embedder = Embedder(run)
        self._view, self._method = run.view, self._embedder.method
        self._seed = run.config.seed
        with loader_of(run.config, dataset, Share(1), CPU):  # FFCV is there, before anything that takes time
            pass
        self._images = read_images(run.config, dataset, max_images)

    def make(self, *, int8: bool) -> dict[str, Any]:
        """Write all files but `FACTS`; what that holds."""
        config, method = self._run.config, self._method
        graph = image_graph(method, self._view)
        self._write(MODEL, with_preprocessing(graph, self._view).SerializeToString())
        differences = self._check(MODEL)
        text = self._make_text(differences)
        too_far = {name: value for name, value in differences.items() if not value <= TOLERANCE}
        require(not too_far, f"ONNX differs from torch by more than {TOLERANCE:g}: {too_far}; nothing was exported")
        self._say(f"{MODEL} equals torch to {max(differences.values()):.1e}, images of any size")
        self._make_timm()

        torch_form = form_of(self._images, self._by_torch)
        onnx_form = form_of(self._images, lambda squares: self._by_graph(graph, squares))
        scores: dict[str, Mapping[str, float]] = {"torch": self._scores(torch_form, torch_form)}
        scores["onnx"] = self._scores(onnx_form, torch_form, scores["torch"])
        facts_int8: dict[str, Any] = {"offered": False, "why": "it was not asked for (--no-int8)"}
        if int8:
            facts_int8 = self._make_int8(graph, torch_form, scores)
        return {
            "version": VERSION,
            "run": {
                "method": config.method.name,
                "encoder": asdict(config.encoder),
                "step": self._run.step,
                "weights_sha256": {part: self._run.sha256(part) for part in self._parts()},
                "dataset_sha256": self._run.dataset_sha256,
            },
            "view": asdict(self._view),
            "feature_size": torch_form.test[FEATURE].shape[1],
            "embedding_size": torch_form.test[EMBEDDING].shape[1],
            "text": text,
            "onnx_differs_from_torch": differences,
            "scores": scores,
            "gate": {
                "largest_loss": MAX_LOSS, "least_spearman": MIN_SPEARMAN, "least_recall_at_10": MIN_RECALL,
                "largest_difference": TOLERANCE, "num_pairs": NUM_PAIRS,
                "num_train": len(self._images.train), "num_test": len(self._images.test),
            },
            "int8": facts_int8,
            "cosines": self._cosines(torch_form),
            "providers": list(PROVIDERS),
            "processor": {"name": processor_name(), "int8_instructions": int8_instructions()},
            "versions": {
                "dist_contrastive": dist_contrastive.__version__, "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
            "files": {
                path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size}
                for path in sorted(self._folder.iterdir())
            },
        }  # fmt: skip

    def _parts(self) -> list[str]:
        return [part for part in PARTS if part != "text" or isinstance(self._method, ImageText)]

    def _write(self, name: str, content: bytes) -> None:
        with writing(self._folder / name, lambda: "the same command exports again"):
            write_synced(self._folder / name, content)

    def _check(self, name: str) -> dict[str, float]:
        """How far the graph `name` is from torch on images of odd sizes, by output."""
        session = open_session(self._folder / name)
        generator = np.random.default_rng(self._seed)
        farthest = {FEATURE: 0.0, EMBEDDING: 0.0}
        for height, width in ODD_SIZES:
            images = generator.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
            expected = self._embedder(list(images))
            for output, values in ((FEATURE, expected), (EMBEDDING, self._embedder.embeddings(expected))):
                (found,) = session.run([output], {IMAGES: images})
                farthest[output] = max(farthest[output], float(np.abs(found - values.numpy()).max()))
        return farthest

    def _make_text(self, differences: dict[str, float]) -> dict[str, Any] | None:
        if not isinstance(self._method, ImageText):
            return None
        config = self._method.text.config
        self._write(TEXT_MODEL, text_graph(self._method).SerializeToString())
        self._write(TOKENIZER, self._run.tokenizer_json())
        lengths = torch.arange(1, config.context + 1)[:, None]
        tokens = torch.randint(1, config.vocabulary, (config.context, config.context))
        tokens = tokens * (torch.arange(config.context) < lengths)
        (found,) = open_session(self._folder / TEXT_MODEL).run([EMBEDDING], {TOKENS: tokens.numpy()})
        with torch.no_grad():
            differences["text"] = float((torch.from_numpy(found) - self._method.embed_text(tokens)).abs().max())
        return {"context": config.context}

    def _make_timm(self) -> None:
        encoder = self._method.exported
        save_module(self._folder / TIMM_WEIGHTS, encoder.body, {"step": str(self._run.step)})
        self._write(TIMM_CONFIG, json.dumps(timm_config(encoder, self._view), indent=1).encode())

    def _by_torch(self, squares: Tensor) -> Vectors:
        features = self._embedder.of_squares(squares)
        return {FEATURE: features, EMBEDDING: self._embedder.embeddings(features)}

    def _by_graph(self, graph: "onnx.ModelProto", squares: Tensor) -> Vectors:
        session = open_session(graph.SerializeToString())
        parts = [session.run([FEATURE, EMBEDDING], {PIXELS: pixels}) for pixels in self._pixels(squares)]
        features, embeddings = (torch.from_numpy(np.concatenate(values)) for values in zip(*parts, strict=True))
        return {FEATURE: features, EMBEDDING: embeddings}

    def _pixels(self, squares: Tensor) -> Sequence[np.ndarray]:
        return [self._view.normalized(part, CPU).contiguous().numpy() for part in squares.split(CALIBRATION_BATCH)]

    def _scores(
        self, form: Form, reference: Form, of_reference: Mapping[str, float] | None = None
    ) -> Mapping[str, float]:
        probe = self._run.config.probe
        if of_reference and "linear_strength" in of_reference:
            # Of two strengths that are as good, the last digit of a feature can choose either.
            probe = replace(probe, strengths=(of_reference["linear_strength"],))
        num_classes = len(self._dataset.manifest.classes)
        probes = probe_scores(form, self._images, probe, num_classes=num_classes, seed=self._seed)
        return {**probes, **likeness(form, reference, self._seed)}

    def _make_int8(
        self, graph: "onnx.ModelProto", reference: Form, scores: dict[str, Mapping[str, float]]
    ) -> dict[str, Any]:
        instructions = int8_instructions()
        # Spread over the training images, which may lie class by class; batches of one size, as the calibrator asks.
        num = len(self._images.train)
        num_images = min(CALIBRATION_IMAGES, num // CALIBRATION_BATCH * CALIBRATION_BATCH or num)
        places = torch.linspace(0, num - 1, num_images).long()
        forms = Int8(graph, self._pixels(self._images.train[places]), full_range=bool(instructions))

        def measure(in_fp32: Sequence[str]) -> Mapping[str, float]:
            form = form_of(self._images, lambda squares: self._by_graph(forms.form(in_fp32), squares))
            return self._scores(form, reference, scores["torch"])

        few = self._images.test[:256]
        expected = self._by_torch(few)

        layers = {layer.name: layer for layer in forms.layers}
        num_weights = sum(layer.num_weights for layer in forms.layers)

        def damage(layer: str) -> float:
            """For what the layer in fp32 costs: its share of the layers and of the weights."""
            found = self._by_graph(forms.form([other for other in layers if other != layer]), few)
            by = sum(float((unit(found[name]) - unit(expected[name])).norm()) for name in (FEATURE, EMBEDDING))
            return by / (1 / len(layers) + layers[layer].num_weights / num_weights)

        found = search(list(layers), measure, damage, lambda tried: failures(tried, scores["torch"]))
        facts = {
            "layers": len(forms.layers), "full_range": forms.full_range,
            "tried": [{"in_fp32": len(entry.in_fp32), **entry.scores} for entry in found.tried],
        }  # fmt: skip
        for line in _table(found, scores["torch"]):
            self._say(line)
        best = found.best
        if best is None:
            why = found.tried[-1].failures[0] if found.tried else "no layer of it can be quantized"
            self._say(f"int8 is not offered: {why}. The export has fp32 alone")
            return {"offered": False, "why": f"it lost too much ({why})", **facts}
        scores["int8"] = best.scores
        self._write(MODEL_INT8, with_preprocessing(forms.form(best.in_fp32), self._view).SerializeToString())
        size, full = ((self._folder / name).stat().st_size for name in (MODEL_INT8, MODEL))
        self._say(
            f"{MODEL_INT8} passes: {len(forms.layers) - len(best.in_fp32)} of {len(forms.layers)} layers in int8, "
            f"{size / full:.2f} of the size"
        )
        if best.in_fp32:
            self._say(f"in fp32 stay, as they do most damage for their size: {', '.join(best.in_fp32)}")
        self._say(
            f"this processor has {instructions}, by which int8 layers can be quicker; python -m benchmarks.export measures it"
            if instructions
            else "this processor has no instructions for int8: no gain in time is known, and weights have 7 bits"
        )
        return {"offered": True, "why": "it passes the gate", "in_fp32": list(best.in_fp32), **facts}

    def _cosines(self, form: Form) -> dict[str, Any]:
        """Quantiles of cosines of random pairs of training images, and of those that the method took for the same."""
        samples = self._images.samples[:MAX_POSITIVES]
        config = self._run.config
        with loader_of(config, self._dataset, Share(config.batch.size), CPU) as loader:
            views = extract_views(self._method.exported, loader, samples, CPU)[:2]
        of_views = {
            FEATURE: views,
            EMBEDDING: self._embedder.embeddings(views.flatten(0, 1)).unflatten(0, views.shape[:2]),
        }
        pairs = random_pairs(len(form.train[FEATURE]), self._seed)
        found: dict[str, Any] = {
            name: {
                "random": quantiles(cosines(unit(form.train[name]), pairs)),
                "positive": quantiles((unit(views[0]) * unit(views[1])).sum(-1)),
            }
            for name, views in of_views.items()
        }
        captions = self._dataset.captions
        if isinstance(self._method, ImageText) and captions is not None:
            images = unit(form.train[EMBEDDING][: len(samples)])
            tokens = captions.tokens(torch.from_numpy(samples), seed=self._seed, epoch=0)
            texts = unit(self._texts(tokens))
            others = random_pairs(len(texts), self._seed)
            found["caption"] = {
                "random": quantiles((images[others[0]] * texts[others[1]]).sum(1)),
                "positive": quantiles((images * texts).sum(1)),
            }
        return found

    def _texts(self, tokens: Tensor) -> Tensor:
        assert isinstance(self._method, ImageText)
        with torch.no_grad():
            return torch.cat([self._method.embed_text(part) for part in tokens.split(CALIBRATION_BATCH)])


def _table(found: Found, reference: Mapping[str, float]) -> list[str]:
    """What was tried, if the first was not good enough."""
    if len(found.tried) < 2 and found.best is not None:
        return []
    names = [name for name in ("linear_top1", "knn_top1") if name in reference]
    names += [f"{output}_{ending}" for ending in ("spearman", "recall_at_10") for output in (FEATURE, EMBEDDING)]
    rows = [["in fp32", *(name.replace("_", " ") for name in names), ""]]
    rows.append(["all", *(f"{reference[name]:.3f}" for name in names), ""])
    for entry in sorted(found.tried, key=lambda entry: len(entry.in_fp32)):
        scores = [f"{entry.scores[name]:.3f}" for name in names]
        rows.append([f"{len(entry.in_fp32)} layers", *scores, "too much is lost" if entry.failures else "passes"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
