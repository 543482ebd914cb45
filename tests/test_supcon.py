"""SupCon in whole runs: labels where there are some, over all ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_contrastive.methods.simclr import SimCLRConfig
from tests.betons import picture, write_beton
from tests.harness import RankError, run_ranks
from tests.runs import losses_of, tiny_config, train_on_rank, write_dataset


def test_labels_are_asked_of_data_that_has_none(tmp_path: Path) -> None:
    images = [picture(20, 20, seed) for seed in range(40)]
    path = write_beton(tmp_path / "one_class.beton", images, num_test=4, num_classes=1)
    config = replace(tiny_config(tmp_path / "run", path), method=SimCLRConfig(positives="labels"))
    with pytest.raises(
        RankError, match=r"UserError: simclr is to learn from labels, and .*one_class.beton has one class only"
    ):
        run_ranks(train_on_rank, 1, config)


def test_supcon_learns_from_labels_over_all_ranks(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "one", write_dataset(tmp_path), norm="group", stop_after_steps=8)
    config = replace(config, method=SimCLRConfig(projector=config.method.projector, positives="labels"))
    run_ranks(train_on_rank, 1, config)
    run_ranks(train_on_rank, 2, replace(config, run_dir=tmp_path / "two"))
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(config.run_dir), rtol=0, atol=1e-4)
