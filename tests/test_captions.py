"""Captions of a packed dataset: their tokens, which one is drawn, and that their file is what pack wrote."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from dist_contrastive.batch import Batch, Samples, Share
from dist_contrastive.config import AugmentConfig, DataConfig, UserError, ViewConfig
from dist_contrastive.data.augment import Augment
from dist_contrastive.data.beton import Dataset, open_dataset
from dist_contrastive.data.captions import CaptionOptions, Captions
from dist_contrastive.data.format import NO_LABEL, TEST, TRAIN, captions_path, find_manifest, manifest_path
from dist_contrastive.data.packing import write_dataset
from dist_contrastive.data.photo_captions import NUM_CAPTIONS, measure
from dist_contrastive.data.sources import PHOTOS, Sample, Source, open_source
from dist_contrastive.data.tokenizing import learn_tokenizer, read_tokenizer, read_tokenizer_file
from dist_contrastive.stage import stage
from tests.betons import open_loader, picture

WORLD = [
    "a red bicycle leans on the wall", "二匹の猫が眠っている", "Кошка сидит на окне", "قطة نائمة على الأريكة", "बिल्ली सो रही है",
    "a cafe\u0301 at night \U0001f408\u200d\u2b1b", "x",
]  # fmt: skip


def pack(
    path: Path, captions: Sequence[Sequence[str]], *, num_test: int = 0, options: CaptionOptions | None = None
) -> Dataset:
    """A packed dataset with a small picture for each entry of `captions`; the last `num_test` are the test split."""
    samples = tuple(
        Sample(
            f"image {n}", NO_LABEL, TEST if n >= len(captions) - num_test else TRAIN, picture(8, 8, n), captions=tuple(own)
        )
        for n, own in enumerate(captions)
    )  # fmt: skip
    write_dataset(Source("tests", (), samples, "as given"), path, captions=options or CaptionOptions())
    return open_dataset(path)


def of(dataset: Dataset) -> Captions:
    assert dataset.captions is not None
    return dataset.captions


def numbered(num_samples: int, each: int) -> list[list[str]]:
    return [[f"image {n} caption {k}" for k in range(each)] for n in range(num_samples)]


def test_texts_come_back_whatever_the_language(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "x.beton", [[text, text + "!"] for text in WORLD])
    assert [of(dataset).texts(n) for n in range(len(WORLD))] == [[text, text + "!"] for text in WORLD]


def test_tokens_of_any_language_spell_the_text(tmp_path: Path) -> None:
    options = CaptionOptions(max_tokens=200)
    captions = of(pack(tmp_path / "x.beton", [[text] for text in WORLD], options=options))
    tokens = captions.tokens(torch.arange(len(WORLD)), seed=0, epoch=0)
    assert torch.equal(captions.encode(WORLD), tokens)
    tokenizer = tokenizers.Tokenizer.from_buffer(captions.tokenizer_json)
    for row, text in zip(tokens, WORLD, strict=True):
        length = row.tolist().index(captions.end_id)
        assert row[0] == captions.start_id
        assert not row[length + 1 :].any(), "what follows the end is padding"
        assert tokenizer.decode(row[1:length].tolist()).strip() == text.replace("e\u0301", "\u00e9").lower()


def test_a_long_caption_is_cut_before_its_end_and_counted(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "x.beton", [["a b"], ["a b c d e f g h i j"]], options=CaptionOptions(max_tokens=5))
    captions = of(dataset)
    assert dataset.manifest.captions is not None
    assert dataset.manifest.captions.num_cut == 1
    rows = captions.tokens(torch.arange(2), seed=0, epoch=0)
    assert rows.shape == (2, 5)
    assert rows[0].tolist()[-2:] == [captions.end_id, 0]
    assert rows[1, -1] == captions.end_id


def test_special_tokens_in_a_caption_are_text(tmp_path: Path) -> None:
    captions = of(pack(tmp_path / "x.beton", [["<end> of <pad> the <start>"], ["plain"]]))
    row = captions.tokens(torch.tensor([0]), seed=0, epoch=0)[0].tolist()
    assert row.count(captions.end_id) == row.count(captions.start_id) == 1
    assert captions.encode(["<end>"])[0].tolist().count(captions.end_id) == 1


def test_the_tokenizer_learns_from_training_captions_alone(tmp_path: Path) -> None:
    train = [["a walk in the park"] for _ in range(6)]
    datasets = [
        pack(tmp_path / f"{name}.beton", [*train, [text] * 3], num_test=1)
        for name, text in (("a", "zebra zebra zebra"), ("b", "quagga"))
    ]
    assert of(datasets[0]).tokenizer_json == of(datasets[1]).tokenizer_json
    assert b"zebra" not in of(datasets[0]).tokenizer_json


def test_the_vocabulary_is_at_most_what_is_asked_for() -> None:
    texts = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"] * 2
    assert learn_tokenizer(texts, vocabulary=300, max_tokens=8).vocabulary_size == 300
    assert learn_tokenizer(["hello hello"], vocabulary=8192, max_tokens=8).vocabulary_size < 300


LEARN = """
import random, sys
from dist_contrastive.data.tokenizing import learn_tokenizer
words = random.Random(0)
texts = [" ".join("".join(words.choices("abcdeé日", k=4)) for _ in range(6)) for _ in range(2000)]
random.Random(int(sys.argv[1])).shuffle(texts)
print(learn_tokenizer(texts, vocabulary=1000, max_tokens=8).json)
"""


def test_the_same_captions_give_the_same_tokenizer_in_any_order_process_and_number_of_threads() -> None:
    found = set()
    for order, threads in ((0, 1), (1, 4)):
        command = ["env", f"RAYON_NUM_THREADS={threads}", sys.executable, "-c", LEARN, str(order)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found.add(done.stdout)
    assert len(found) == 1


def test_packing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = set()
    for name in "ab":
        pack(tmp_path / f"{name}.beton", numbered(9, 3), num_test=2)
        contents.add(captions_path(tmp_path / f"{name}.beton").read_bytes())
    assert len(contents) == 1


def test_each_caption_is_drawn_equally_often_and_alone_from_its_sample(tmp_path: Path) -> None:
    captions = of(pack(tmp_path / "x.beton", [["one"], ["a", "b"], [f"c{k}" for k in range(5)]]))
    texts = [captions.encode(captions.texts(n)) for n in range(3)]
    num_epochs = 3000
    counts: list[Counter[int]] = [Counter() for _ in texts]
    for epoch in range(num_epochs):
        rows = captions.tokens(torch.arange(3), seed=5, epoch=epoch)
        for row, own, count in zip(rows, texts, counts, strict=True):
            (number,) = (own == row).all(1).nonzero().flatten().tolist()
            count[number] += 1
    assert counts[0] == {0: num_epochs}
    for count, each in ((counts[1], 2), (counts[2], 5)):
        expected = num_epochs / each
        assert len(count) == each
        chi_squared = sum((found - expected) ** 2 / expected for found in count.values())
        assert chi_squared < 20, count


def test_the_caption_depends_on_seed_epoch_and_sample_and_not_on_the_batch(tmp_path: Path) -> None:
    captions = of(pack(tmp_path / "x.beton", numbered(64, 5)))
    everything = captions.tokens(torch.arange(64), seed=1, epoch=2)
    assert torch.equal(captions.tokens(torch.tensor([40, 3, 3]), seed=1, epoch=2), everything[[40, 3, 3]])
    for seed, epoch in ((1, 3), (2, 2)):
        other = captions.tokens(torch.arange(64), seed=seed, epoch=epoch)
        same = (other == everything).all(1).float().mean()
        assert 0.02 < same < 0.5, "a fifth is the same by chance"


AUGMENT = AugmentConfig((ViewConfig(count=2),))


def texts_of_epoch(dataset: Dataset, share: Share, *, threads: int = 1, start_step: int = 0) -> list[torch.Tensor]:
    with open_loader(dataset, DataConfig(image_size=8), AUGMENT, seed=3, share=share, threads=threads) as loader:
        texts = [batch.text for batch in loader.epoch(1, start_step)]
    return [text for text in texts if text is not None]


def test_threads_ranks_and_restarts_give_the_same_captions(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "x.beton", numbered(50, 5), num_test=2)
    whole = texts_of_epoch(dataset, Share(12))
    assert [text.shape for text in whole] == [(12, 32)] * 4
    assert all(text.dtype == torch.int64 for text in whole)
    for threads in (2, 3):
        assert all(map(torch.equal, texts_of_epoch(dataset, Share(12), threads=threads), whole))
    of_ranks = [texts_of_epoch(dataset, Share(12, rank, 3)) for rank in range(3)]
    assert all(torch.equal(torch.cat(parts), text) for *parts, text in zip(*of_ranks, whole, strict=True))
    assert all(map(torch.equal, texts_of_epoch(dataset, Share(12), start_step=2), whole[2:]))


def test_a_batch_has_captions_of_its_own_samples_and_parts_and_augmentation_keep_them(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "x.beton", numbered(16, 1))
    with open_loader(dataset, DataConfig(image_size=8), AUGMENT, share=Share(8)) as loader:
        batch = next(loader.epoch(0))
    assert batch.text is not None
    texts = [of(dataset).texts(index)[0] for index in batch.samples.indices.tolist()]
    assert torch.equal(batch.text, of(dataset).encode(texts))
    part = batch.part(slice(2, 5))
    assert part.text is not None
    assert torch.equal(part.text, batch.text[2:5])
    augmented = Augment(AUGMENT)(batch, torch.device("cpu"))
    assert augmented.text is not None
    assert torch.equal(augmented.text, batch.text)


def test_a_dataset_without_captions_has_batches_without_text(tmp_path: Path) -> None:
    dataset = pack(tmp_path / "x.beton", [()] * 8)
    assert dataset.captions is None
    assert not captions_path(dataset.path).exists()
    assert texts_of_epoch(dataset, Share(8)) == []
    samples = Samples(torch.zeros(2), torch.zeros(2), 0)
    assert Batch((torch.zeros(1, 2, 4, 4, 3),), samples).part(slice(0, 1)).text is None


def test_packing_again_without_captions_removes_them(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.beton", numbered(4, 1)).path
    pack(path, [()] * 4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.beton", "x.beton.json"]


def damage_missing(path: Path) -> None:
    captions_path(path).unlink()


def damage_truncated(path: Path) -> None:
    captions_path(path).write_bytes(captions_path(path).read_bytes()[:-1])


def damage_altered(path: Path) -> None:
    content = bytearray(captions_path(path).read_bytes())
    content[-5] ^= 1
    captions_path(path).write_bytes(content)


def damage_foreign(path: Path) -> None:
    """The captions of a dataset that has as many images and as many bytes of captions."""
    other = pack(path.with_name("other.beton"), numbered(6, 2)[::-1])
    assert captions_path(other.path).stat().st_size == captions_path(path).stat().st_size
    captions_path(other.path).rename(captions_path(path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, r"captions, and their file x\.beton\.captions is missing"),
        (damage_truncated, r"x\.beton\.captions has \d+ bytes, its manifest says \d+"),
        (damage_altered, r"x\.beton\.captions was altered"),
        (damage_foreign, r"x\.beton\.captions was altered"),
    ],
)
def test_captions_that_are_not_what_was_packed_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = pack(tmp_path / "x.beton", numbered(6, 2)).path
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(path)
    assert "\n" not in str(caught.value)
    assert "dist_contrastive.pack" in str(caught.value)


def test_captions_of_another_dataset_are_refused_without_reading_them_whole(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.beton", numbered(6, 2)).path
    other = pack(tmp_path / "y.beton", numbered(5, 2)).path
    captions_path(other).rename(captions_path(path))
    content = json.loads(manifest_path(path).read_text())
    content["captions"] = json.loads(manifest_path(other).read_text())["captions"]
    manifest_path(path).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"holds captions of another dataset than .*x\.beton"):
        open_dataset(path, verify=False)


def test_a_file_that_is_none_of_captions_is_refused_without_reading_it_whole(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.beton", numbered(6, 2)).path
    captions_path(path).write_bytes(bytes(captions_path(path).stat().st_size))
    with pytest.raises(UserError, match=r"x\.beton\.captions is not a file of captions"):
        open_dataset(path, verify=False)


def test_an_interruption_leaves_the_captions_that_were_there(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.beton", numbered(6, 2)).path
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupt() -> None:
        raise KeyboardInterrupt

    source = open_source("photo_captions")
    with pytest.raises(KeyboardInterrupt):
        write_dataset(replace(source, samples=source.samples[:9]), path, on_sample=interrupt)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_copy_on_another_disk_has_its_captions(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.beton", numbered(6, 2)).path
    copy = stage(path, tmp_path / "disk")
    assert of(open_dataset(copy)).texts(3) == ["image 3 caption 0", "image 3 caption 1"]
    pack(path, numbered(6, 3))  # the same images with other captions
    other = stage(path, tmp_path / "disk")
    assert other != copy
    assert len(of(open_dataset(other)).texts(3)) == 3
    captions_path(copy).unlink()
    pack(path, numbered(6, 2))
    assert stage(path, tmp_path / "disk") == copy
    assert open_dataset(copy).manifest == find_manifest(path)


def save_tokenizer(path: Path, specials: list[str], *, pad: str | None = None) -> Path:
    """A tokenizer of words, with tokens of its own, that cuts and pads by itself."""
    words = ["[UNK]", *specials, "a", "red", "cat"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(specials)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=7, pad_id=1)
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize(
    ("specials", "start", "end", "size"),
    [
        (["<|startoftext|>", "<|endoftext|>"], 1, 2, 6),
        (["[CLS]", "[SEP]"], 1, 2, 6),
        (["</s>"], 5, 1, 6),  # it has no start and gets one
        ([], 4, 5, 6),
    ],
)
def test_a_given_tokenizer_keeps_its_special_tokens_or_gets_some(
    tmp_path: Path, specials: list[str], start: int, end: int, size: int
) -> None:
    path = save_tokenizer(tmp_path / "tokenizer.json", specials)
    options = CaptionOptions(max_tokens=6, tokenizer=path)
    captions = of(pack(tmp_path / "x.beton", [["a red cat"], ["a dog"]], options=options))
    first = 1 + len(specials)
    assert (captions.start_id, captions.end_id, captions.vocabulary_size) == (start, end, size)
    assert captions.tokens(torch.arange(2), seed=0, epoch=0).tolist() == [
        [start, first, first + 1, first + 2, end, 0], [start, first, 0, end, 0, 0],
    ]  # fmt: skip
    assert captions.encode(["red"])[0, :3].tolist() == [start, first + 1, end]
    again = read_tokenizer(captions.tokenizer_json, max_tokens=6, name="captions")
    assert again.json == captions.tokenizer_json


def test_the_tokenizer_of_a_dataset_serves_another(tmp_path: Path) -> None:
    first = of(pack(tmp_path / "x.beton", numbered(9, 2)))
    (tmp_path / "tokenizer.json").write_bytes(first.tokenizer_json)
    second = of(
        pack(tmp_path / "y.beton", [["other words"]] * 3, options=CaptionOptions(tokenizer=tmp_path / "tokenizer.json"))
    )
    assert second.tokenizer_json == first.tokenizer_json
    assert torch.equal(second.encode(["image 3"]), first.encode(["image 3"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "can't be read: No such file"), (b"{}", "is not a tokenizer"), (b"\xff", "is not a tok")],
)
def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_tokenizer_file(path, max_tokens=8)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        pack(tmp_path / "x.beton", [["a"]], options=CaptionOptions(tokenizer=path))
    assert not (tmp_path / "x.beton").exists()


@pytest.fixture(scope="module")
def photos() -> Source:
    return open_source("photo_captions")


def test_photographs_have_captions_that_name_them(photos: Source) -> None:
    plain = open_source("photos")
    assert photos.classes == plain.classes
    assert [(s.name, s.label, s.split) for s in photos.samples] == [(s.name, s.label, s.split) for s in plain.samples]
    for sample, other in zip(photos.samples, plain.samples, strict=True):
        assert np.array_equal(sample.image, other.image)  # type: ignore[arg-type]
        assert len(set(sample.captions)) == NUM_CAPTIONS
        name = photos.classes[sample.label].replace("_", " ")
        assert all(name in caption for caption in sample.captions)
    assert len({caption for sample in photos.samples for caption in sample.captions}) > 1000
    assert set(PHOTOS) == set(photos.classes)


def test_captions_of_photographs_are_the_same_each_time(photos: Source) -> None:
    again = open_source("photo_captions")
    assert [sample.captions for sample in again.samples] == [sample.captions for sample in photos.samples]


@pytest.mark.parametrize(
    ("color", "words"),
    [
        ((0, 0, 0), ("dark", "black")), ((255, 255, 255), ("bright", "white")), ((128, 128, 128), ("mid-tone", "grey")),
        ((255, 0, 0), ("mid-tone", "red")), ((0, 200, 0), ("mid-tone", "green")), ((0, 0, 255), ("dark", "blue")),
        ((255, 255, 0), ("bright", "yellow")), ((90, 50, 20), ("dark", "brown")), ((255, 140, 0), ("bright", "orange")),
        ((0, 255, 255), ("bright", "cyan")), ((150, 0, 255), ("mid-tone", "purple")), ((255, 20, 147), ("mid-tone", "pink")),
    ],
)  # fmt: skip
def test_colours_and_brightness_have_their_words(color: tuple[int, int, int], words: tuple[str, str]) -> None:
    found = measure(np.full((32, 32, 3), color, np.uint8))
    assert (found.brightness, found.colour) == words
    assert (found.contrast, found.texture) == ("low", "smooth")


def test_texture_and_contrast_have_their_words() -> None:
    checkers = np.indices((32, 32)).sum(0) % 2
    rough = measure(np.repeat(checkers[..., None] * 255, 3, axis=2).astype(np.uint8))
    halves = measure(
        np.repeat((np.arange(32) < 16)[None, :, None] * 255, 3, axis=2).repeat(32, axis=0).astype(np.uint8)
    )
    assert (rough.texture, rough.contrast) == ("coarse", "high")
    assert (halves.texture, halves.contrast) == ("fine", "high")
