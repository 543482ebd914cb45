"""`dist_contrastive.load`: a run as a module that takes images of any kind and gives what training's evaluation saw."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import dist_contrastive
from dist_contrastive.config import TrainConfig, UserError
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.evaluation.features import extract
from tests.betons import jpeg, open_loader, picture, write_beton
from tests.harness import run_ranks
from tests.runs import newest_checkpoint, tiny_config, train_on_rank, write_dataset

CPU = torch.device("cpu")
SHAPES = [(8, 8), (5, 31), (40, 9), (1, 1), (16, 16), (23, 57)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder / "run", write_dataset(folder), epochs=1, stop_after_steps=0)
    config = replace(config, data=replace(config.data, eval_crop=0.8))
    run_ranks(train_on_rank, 1, config)
    return config


def test_features_are_those_that_evaluation_sees(config: TrainConfig, tmp_path: Path) -> None:
    pictures = [picture(*shape, seed=number) for number, shape in enumerate(SHAPES)]
    path = write_beton(tmp_path / "x.beton", [*pictures, jpeg(pictures[-1])])
    module = dist_contrastive.load(config.run_dir)
    with open_loader(open_dataset(path), config.data, config.augment) as loader:
        expected = extract(module.method.exported, loader, np.arange(len(pictures)), CPU)
    found = module(pictures)
    assert torch.equal(found, expected)
    assert torch.equal(module.embed(pictures), module.method.exported_projector(expected).detach())
    for number, shown in enumerate(pictures):
        torch.testing.assert_close(module(shown), expected[number : number + 1])


def test_an_image_may_come_in_any_form(config: TrainConfig) -> None:
    module, image = dist_contrastive.load(str(config.run_dir)), picture(12, 20, seed=5)
    expected = module(image)
    turned = Image.fromarray(np.rot90(image).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    forms = {
        "PIL": Image.fromarray(image), "turned by its EXIF": turned, "tensor": torch.from_numpy(image),
        "channels first": np.moveaxis(image, -1, 0), "tensor, channels first": torch.from_numpy(image).permute(2, 0, 1),
        "a list": [image], "a batch": image[None],
    }  # fmt: skip
    for name, form in forms.items():
        assert torch.equal(module(form), expected), name
    assert module([]).shape == (0, module.feature_size)
    grey = Image.fromarray(image[..., 0])
    assert torch.equal(module(grey), module(np.repeat(image[..., :1], 3, -1)))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 4, 3), np.float32), ((4, 4), np.uint8), ((4, 4, 4), np.uint8), ((0, 4, 3), np.uint8)]
)
def test_what_is_no_image_is_refused(config: TrainConfig, shape: tuple[int, ...], dtype: type) -> None:
    module = dist_contrastive.load(config.run_dir)
    wrong: np.ndarray = np.zeros(shape, dtype)
    with pytest.raises(ValueError, match=r"an image is uint8 \[h, w, 3\] or \[3, h, w\]"):
        module([wrong])
    with pytest.raises(TypeError, match="not str"):
        module(["cat.jpg"])


def test_it_stays_frozen_and_in_eval_mode(config: TrainConfig) -> None:
    module, image = dist_contrastive.load(config.run_dir), picture(8, 8, seed=1)
    before = module(image)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(part.training for part in module.train().modules())
    module([picture(8, 8, seed=seed) for seed in range(4)])
    assert torch.equal(module(image), before)


def test_a_checkpoint_of_a_run_that_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    step = newest_checkpoint(config.run_dir).step
    finished, checkpoint = dist_contrastive.load(config.run_dir), dist_contrastive.load(config.run_dir, checkpoint=step)
    image = picture(8, 8, seed=2)
    assert torch.equal(finished.embed(image), checkpoint.embed(image))
    with pytest.raises(UserError, match="has no checkpoint of step 1"):
        dist_contrastive.load(config.run_dir, checkpoint=1)
    with pytest.raises(UserError, match=r"is no run's folder: it has no config\.json"):
        dist_contrastive.load(tmp_path)


def test_plain_timm_loads_the_encoder(config: TrainConfig) -> None:
    module, image = dist_contrastive.load(config.run_dir), picture(8, 8, seed=3)
    name = config.encoder.name
    body = timm.create_model(name, num_classes=0)
    body.conv1, body.maxpool = module.method.exported.body.conv1, torch.nn.Identity()  # its stem
    body.load_state_dict(safetensors.torch.load_file(config.run_dir / "encoder.safetensors"))
    squares = module.view.normalized(module.view.cut([image]), CPU)
    with torch.no_grad():
        torch.testing.assert_close(body.eval()(squares), module(image))
