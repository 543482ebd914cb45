"""What one reads before the first run: help pages with commands that work and a sentence for each option, and the recipes."""

import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import benchmarks
import dist_contrastive
from dist_contrastive import cli, embed, export, index, pack, probe, serve, stage, status, train
from dist_contrastive.methods import METHODS
from dist_contrastive.recipes import RECIPES, list_recipes, summary_of

ROOT = Path(dist_contrastive.__file__).parents[1]
WIDTH = 100


@dataclass(frozen=True)
class EntryPoint:
    main: Callable[[list[str]], object]
    config: type
    """What its command line builds, by `parse`."""
    parse: Callable[[list[str]], Any]


def entry_point(module: Any, config: type) -> EntryPoint:
    return EntryPoint(module.main, config, lambda argv: cli.parse(config, argv))


def parse_train(argv: list[str]) -> Any:
    arguments, _ = train.take_dry_run(argv)
    return train.parse(arguments)


BENCHMARKS = {
    f"benchmarks.{found.name}": importlib.import_module(f"benchmarks.{found.name}")
    for found in pkgutil.iter_modules(benchmarks.__path__)
    if found.name != "frame"
}
ENTRY_POINTS = {
    "dist_contrastive.train": EntryPoint(train.main, train.TrainConfig, parse_train),
    "dist_contrastive.export": entry_point(export, export.ExportCommand),
    "dist_contrastive.pack": entry_point(pack, pack.PackConfig),
    "dist_contrastive.index": entry_point(index, index.IndexOptions),
    "dist_contrastive.probe": entry_point(probe, probe.ProbeCommand),
    "dist_contrastive.embed": entry_point(embed, embed.EmbedOptions),
    "dist_contrastive.serve": entry_point(serve, serve.ServeCommand),
    "dist_contrastive.stage": entry_point(stage, stage.StageConfig),
    "dist_contrastive.status": entry_point(status, status.StatusCommand),
    **{name: entry_point(module, module.Command) for name, module in BENCHMARKS.items()},
}
RECIPE_OF = {recipe().method.name: name for name, recipe in RECIPES.items()}
"""A recipe of each method."""
PAGES = [*((name, []) for name in ENTRY_POINTS), *(("dist_contrastive.train", [RECIPE_OF[name]]) for name in METHODS)]


@pytest.fixture
def help_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def page(name: str, arguments: list[str], width: int = WIDTH) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit) as stop:
            ENTRY_POINTS[name].main([*arguments, "--help"])
        assert not stop.value.code
        return capsys.readouterr().out

    return page


def texts_of(page: str) -> tuple[dict[str, str], dict[str, str]]:
    """What a help page says of each option, and first in each section that has a name; with frames or without."""
    options: dict[str, str] = {}
    sections: dict[str, str] = {}
    entry: tuple[dict[str, str], str] | None = None
    for framed in page.partition("usage:")[2].splitlines():
        row = framed.strip("│╭╮╰╯─ ")
        section = re.fullmatch(r"([\w.]+) options", row)
        if section:
            entry = (sections, section[1])
            sections[section[1]] = ""
        elif re.match(r"--?\w", row):
            option, _, text = row.partition("  ")
            entry = (options, option)
            options[option] = text.strip()
        elif entry and re.match(r"[\w(]", row):
            texts, key = entry
            texts[key] = f"{texts[key]} {row}".strip()
    return options, sections


@pytest.mark.parametrize(("name", "arguments"), PAGES, ids=[" ".join([name, *rest]) for name, rest in PAGES])
def test_every_option_and_section_has_a_sentence(
    name: str, arguments: list[str], help_page: Callable[..., str]
) -> None:
    page = help_page(name, arguments)
    assert "{fixed}" not in page
    options, sections = texts_of(page)
    assert options
    if arguments:
        assert {"method.projector", "data", "augment", "encoder", "batch", "optim", "probe"} <= sections.keys()
    for key, text in {**options, **sections}.items():
        assert re.match(r"\w", text), f"{key} has no text"


def test_an_option_without_a_sentence_would_be_found(help_page: Callable[..., str]) -> None:
    page = help_page("dist_contrastive.train", [])
    silent = page.replace("Passes over the training split.", "").replace("SimCLR and two variants of its loss.", "")
    options, sections = texts_of(silent)
    assert options["--epochs INT"].startswith("(default")
    assert sections["method"] == ""


def examples_of(page: str) -> list[list[str]]:
    """The words of the commands on a help page, each an indented line, or several that end in a backslash."""
    text = page.partition("usage:")[0].replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_help_page_starts_with_commands_that_are_understood(name: str, help_page: Callable[..., str]) -> None:
    examples = examples_of(help_page(name, []))
    assert 2 <= len(examples) <= 5
    for words in examples:
        if words[:2] == ["accelerate", "launch"]:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        else:
            assert words[:2] == ["python", "-m"]
        position = words.index("-m")
        assert words[position + 1] == name
        if words[position + 2 :] != ["--list"]:
            assert isinstance(ENTRY_POINTS[name].parse(words[position + 2 :]), ENTRY_POINTS[name].config)


def test_the_list_has_a_line_for_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--list"])
    assert not stop.value.code
    assert capsys.readouterr().out == f"{list_recipes()}\n"
    lines = list_recipes().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) <= len(RECIPES) + 4
    heading, *rows = [re.split(r" {2,}", line) for line in lines[: len(RECIPES) + 1]]
    assert heading == ["recipe", "what", "cost", "linear, kNN", "expected"]
    assert [row[0] for row in rows] == list(RECIPES)
    for name, what, cost, measured, expected in rows:
        stated, facts = summary_of(RECIPES[name])
        assert (what, cost) == (stated, facts["Cost"])
        # Measured and expected are never in one column.
        assert (measured != "-") == ("Measured" in facts)
        assert expected == facts.get("Expected", "-")
        if measured != "-":
            assert [f"linear {measured[:5]}", f"kNN {measured[7:]}"] == [
                part.partition(" ±")[0] for part in facts["Measured"].split(", ")
            ]


@pytest.mark.parametrize("page", ["pack --help", "train --help", "train --list"])
def test_a_reader_may_leave_before_the_page_ends(page: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m dist_contrastive.{page} | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60)
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--help", "--list"])
def test_one_rank_of_a_host_shows_the_page(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit) as stop:
            train.main([option])
        assert not stop.value.code
        assert bool(capsys.readouterr().out) == (local_rank == "0")
