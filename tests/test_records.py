"""Records of what was measured: each says what it is, holds its raw numbers, and is whole; pages link to what exists."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted(path for path in (ROOT / "benchmarks" / "records").iterdir() if path.is_dir())
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("benchmarks/records/*/README.md"))]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_a_record_has_a_page_and_raw_numbers(record: Path) -> None:
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}_[a-z0-9]+_[a-z0-9_]+", record.name)
    page = (record / "README.md").read_text()
    assert page.startswith("# ")
    assert "python -m" in page or "make " in page or "accelerate launch" in page, "how it was measured"
    assert re.search(r"^\|.*\d", page, re.MULTILINE), "a table with what was measured"
    raw = [*record.glob("*.json"), *record.glob("*.jsonl")]
    assert raw
    for path in raw:
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text)
    for name in re.findall(r"`([\w./]+\.(?:jsonl?|txt|png))`", page):
        assert (record / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_no_gaps_and_links_to_what_exists(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r"@\w+@|TODO|TBD|XXX", text)
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
