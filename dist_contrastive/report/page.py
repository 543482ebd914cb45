"""The page: everything in one HTML file."""

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_contrastive.config import flatten
from dist_contrastive.report.inputs import RunReport, Section, is_number, series

CSS = """
:root { color-scheme: light dark; --page: #f5f7fa; --card: #ffffff; --ink: #1f2933; --dim: #52606d; --line: #d9e2ec;
  --blue: #0067a3; --green: #00704f; --warn: #fff4e5; --warn-ink: #7a3e00; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --card: #1e242b; --ink: #e4e7eb; --dim: #a3b1bf;
  --line: #36414d; --blue: #6cb8ee; --green: #4fd1a5; --warn: #3b2a12; --warn-ink: #f7d19b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .8rem; }
p { margin: .5rem 0; }
section, header { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 22px 24px;
  margin: 0 0 20px; }
nav { color: var(--dim); font-size: .9rem; margin-top: 1rem; }
a { color: var(--blue); }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: 6px; padding: 6px; }
figcaption { color: var(--dim); margin-top: .8rem; max-width: 76ch; }
.verdict { font-size: 1.05rem; }
.dim, .missing { color: var(--dim); }
.notice { background: var(--warn); color: var(--warn-ink); border-radius: 6px; padding: .6rem .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
td.value, table.names td:last-child { font-family: ui-monospace, monospace; font-size: .88rem; }
.scores th, .scores td { text-align: right; padding: 8px 14px; font-variant-numeric: tabular-nums; }
.scores th:first-child, .scores td:first-child { text-align: left; padding-left: 0; }
.scores td { font-size: 1.15rem; }
.scores td:first-child { font-size: 1rem; }
.scores .own { font-size: 1.7rem; font-weight: 700; color: var(--blue); }
.found { margin-top: 1.2rem; }
.found img { width: 88px; padding: 0; border-radius: 4px;
  image-rendering: pixelated; }
.found th { color: var(--dim); font-weight: 600; font-size: .85rem; }
.found td { font-size: .9rem; line-height: 1.4; }
.found td:first-child:has(img) { width: 100px; }
.found p { display: flex; gap: .5rem; margin: 0 0 .3rem; }
.found b { flex: none; min-width: 1.6rem; text-align: right; font-variant-numeric: tabular-nums; font-weight: 600;
  color: var(--dim); white-space: nowrap; }
.found p:has(img) { display: inline-flex; flex-direction: column; gap: .2rem; margin-right: 1rem; }
.found p:has(img) b { text-align: left; }
.found .right, .found .right b { color: var(--green); font-weight: 600; }
@media (max-width: 600px) { .found thead { display: none; } .found tr { display: block; padding: .8rem 0;
  border-bottom: 1px solid var(--line); } .found td { display: block; border: 0; }
  .found td::before { content: attr(data-heading); display: block; margin-bottom: .2rem; color: var(--dim); font-size: .85rem; } }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px 20px; margin: 1.2rem 0 0; }
dt { color: var(--dim); font-size: .85rem; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
@media print { body { background: #fff; font-size: 11pt; } main { max-width: none; padding: 0; } nav { display: none; }
  section, header { border: 0; padding: 0; break-inside: avoid; } }
""".strip()


def build_page(inputs: RunReport, sections: Sequence[Section], plots: Path) -> str:
    """The whole page; whatever comes from outside is escaped here, in `_table` and in what sections have for a table."""
    flat, seconds = flatten(inputs.config), inputs.seconds()
    name = str(flat.get("recipe") or inputs.run_dir.name)
    shown = [section for section in sections if not section.missing]
    left_out = [section for section in sections if section.missing]
    order = [section.name for section in shown]
    tables = [
        (anchor, title, values)
        for anchor, title, values in (
            ("course", "When it ran, and where its time went", _course(inputs, seconds)),
            ("machine", "Machine", flatten(inputs.machine)),
            ("protocol", "Protocol of the probe", _protocol(inputs.probe or {})),
            ("configuration", "Configuration", flat),
        )
        if values
    ]
    entries = [(section.name, section.title) for section in shown] + [(anchor, title) for anchor, title, _ in tables]
    nav = " · ".join(f'<a href="#{anchor}">{html.escape(title)}</a>' for anchor, title in entries)
    body = [
        f"<header><h1>{html.escape(_headline(flat, name))}</h1>",
        _summary(inputs, flat, order, seconds),
        f"<nav>{nav}</nav>" if nav else "",
        "</header>",
    ]
    for position, section in enumerate(shown):
        caption = f"<figcaption>{_with_places(section.caption, position, order)}</figcaption>"
        if section.table:  # which may be long: what it shows is said first
            content = caption + section.table
        else:
            content = embedded((plots / f"{section.name}.png").read_bytes(), section.title) + caption
        body.append(
            f'<section id="{section.name}"><h2>{html.escape(section.title)}</h2><figure>{content}</figure></section>'
        )
    if left_out:
        items = "".join(f"<li>{html.escape(s.title)}: {html.escape(s.missing)}.</li>" for s in left_out)
        body.append(f'<section class="missing"><h2>Left out</h2><ul>{items}</ul></section>')
    body += [f'<section id="{anchor}"><h2>{title}</h2>{_table(values)}</section>' for anchor, title, values in tables]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)}: report</title><style>\n{CSS}\n</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def embedded(png: bytes, alt: str) -> str:
    """A picture that the page holds."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def _headline(flat: Mapping[str, Any], name: str) -> str:
    method, encoder = flat.get("method.name"), flat.get("encoder.name")
    return f"{name}: what {method} taught {encoder}" if method and encoder else name


def _with_places(text: str, position: int, order: Sequence[str]) -> str:
    """`text` as HTML, its ` [[name]]` resolved (see `Section.caption`) for a text at `position` of `order` (-1: on top)."""

    def place(match: re.Match[str]) -> str:
        name = match[1]
        if name not in order:
            return ""
        return f' <a href="#{name}">{"above" if order.index(name) < position else "below"}</a>'

    return re.sub(r" \[\[(\w+)\]\]", place, html.escape(text))


def _summary(inputs: RunReport, flat: Mapping[str, Any], order: Sequence[str], seconds: Mapping[str, float]) -> str:
    """The scores beside their baselines in words and as a table, then the run in a few facts."""
    probe = inputs.probe or {}
    parts = []
    linear, raw, init = (probe.get(key) for key in ("linear_top1", "raw_linear_top1", "init_linear_top1"))
    if is_number(linear) and is_number(raw) and is_number(init):
        text = (
            f"A linear classifier on the frozen features gets {_percent(linear)} of the test images right, where raw pixels "
            f"give {_percent(raw)} and the same network untrained {_percent(init)}."
        )
        parts.append(f'<p class="verdict">{html.escape(text)}</p>')
        if linear <= max(raw, init):
            text = (
                "The training did not pay: the features are no better than a baseline. Look at the loss [[loss]] and at the "
                "agreement of views [[positive_cosine]] for the reason."
            )
            parts.append(f'<p class="notice">{_with_places(text, -1, order)}</p>')
    columns = (("This run", ""), ("Untrained encoder", "init_"), ("Raw pixels", "raw_"))
    scores = _score_table(
        "Test images classified right",
        probe,
        [("Linear classifier", "linear_top1"), (_knn_label(probe), "knn_top1")],
        columns,
        _percent,
    )
    free = _score_table(
        "Test images' features, without labels",
        probe,
        [
            ("Alignment: distance of two views, 0 to 4", "alignment"),
            ("Uniformity: −4 and lower is spread evenly, 0 is one point", "uniformity"),
            ("Effective rank: directions in use", "effective_rank"),
        ],
        columns[:2],
        lambda value: f"{value:.2f}".replace("-", "−") if is_number(value) else "–",
    )
    pairs = _score_table(
        "Test images and captions that find each other",
        probe,
        [
            ("Zero-shot: images classified right by prompts", "zero_shot_top1"),
            *((f"Images with a caption of theirs among the {k} nearest", f"text_recall_at_{k}") for k in (1, 5, 10)),
            *((f"Captions with an image of theirs among the {k} nearest", f"image_recall_at_{k}") for k in (1, 5, 10)),
        ],
        (("This run", ""), ("Untrained towers", "init_"), ("Chance", "chance_")),
        _percent,
    )
    if scores:
        parts += [scores, _other_k(probe), _best(probe)]
    elif free:
        parts.append(
            '<p class="notice">The dataset has no labels: the linear classifier and the nearest neighbours\' vote, which need '
            "them, are not given. Both alignment and uniformity should be low; low alignment with a uniformity near 0 is "
            "collapse.</p>"
        )
    else:
        parts.append('<p class="notice">This run was not probed, so there are no scores.</p>')
    parts += [pairs, free]
    facts = "".join(
        f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in _facts(inputs, flat, seconds).items()
    )
    return "".join(parts) + "<dl>" + facts.replace("<dt>", "<div><dt>").replace("</dd>", "</dd></div>") + "</dl>"


def _score_table(
    title: str,
    probe: Mapping[str, Any],
    rows: Sequence[tuple[str, str]],
    columns: Sequence[tuple[str, str]],
    text: Callable[[Any], str],
) -> str:
    """The scores `rows` (label and name) beside their baselines `columns` (heading and prefix); empty where there are none."""
    lines = [(label, [probe.get(prefix + name) for _, prefix in columns]) for label, name in rows]
    lines = [(label, scores) for label, scores in lines if any(is_number(score) for score in scores)]
    if not lines:
        return ""
    cells = "".join(
        f"<tr><td>{html.escape(label)}</td>"
        + "".join(f"<td{' class=own' if column == 0 else ''}>{text(score)}</td>" for column, score in enumerate(scores))
        + "</tr>"
        for label, scores in lines
    )
    headings = "".join(f"<th>{html.escape(heading)}</th>" for heading in (title, *(heading for heading, _ in columns)))
    return f'<div class="scroll"><table class="scores"><thead><tr>{headings}</tr></thead><tbody>{cells}</tbody></table></div>'


def _protocol(probe: Mapping[str, Any]) -> dict[str, Any]:
    """How the scores came about, without the classes' names, of which there may be thousands."""
    return {name: value for name, value in flatten(probe.get("protocol") or {}).items() if name != "classes"}


def _knn_label(probe: Mapping[str, Any]) -> str:
    protocol = probe.get("protocol")
    k = protocol.get("knn_k") if isinstance(protocol, Mapping) else None
    return f"Nearest neighbours, k = {k}" if k is not None else "Nearest neighbours"


def _other_k(probe: Mapping[str, Any]) -> str:
    """The scores of the neighbours at every k that was tried, as the choice of k decides between runs that are close."""
    scores = probe.get("knn_top1_by_k")
    if not isinstance(scores, Mapping) or len(scores) < 2:
        return ""
    text = ", ".join(f"k = {k}: {_percent(score)}" for k, score in scores.items())
    return f'<p class="dim">{html.escape(f"Nearest neighbours at {text}.")}</p>'


def _best(probe: Mapping[str, Any]) -> str:
    """The best epoch's score, when it is not the last one's: reported beside it, never instead of it."""
    best = probe.get("best")
    if (
        not isinstance(best, Mapping)
        or not is_number(best.get("linear_top1"))
        or best.get("epoch") == probe.get("epoch")
    ):
        return ""
    text = f"These are the last epoch's scores. The best linear score was {_percent(best['linear_top1'])}"
    text += f", after epoch {best['epoch']:g}." if is_number(best.get("epoch")) else "."
    return f'<p class="dim">{html.escape(text)}</p>'


def _facts(inputs: RunReport, flat: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, str]:
    """The run in a few words, label -> text, without what is not known."""
    facts: dict[str, str] = {}

    def add(label: str, value: Any, text: str = "{}") -> None:
        if value not in (None, ""):
            facts[label] = text.format(value)

    add("Method", flat.get("method.name"))
    add("Encoder", flat.get("encoder.name"))
    add("Dataset", Path(str(flat["data.path"])).name if flat.get("data.path") else None)
    add("Classes", len(inputs.class_names) or None)
    add("Epochs", flat.get("epochs"))
    steps = series(inputs.metrics, "step")[1]
    add("Steps", int(steps[-1]) if len(steps) else None, "{:,}")
    add("Global batch", flat.get("batch.size"), "{} images")
    add("Seed", flat.get("seed"))
    add("Ranks", inputs.machine.get("ranks"))
    add("Duration", _duration(sum(seconds.values())) if seconds else None)
    add("Resumed", _times(len(inputs.starts) - 1) if inputs.starts else None)
    rates = series(inputs.metrics, "images_per_s")[1]
    add("Throughput", float(np.median(rates)) if len(rates) else None, "{:,.0f} images/s")
    memory = series(inputs.metrics, "peak_memory_mib")[1]
    add("Peak memory of a rank", float(memory.max()) if len(memory) else None, "{:,.0f} MiB")
    version, commit = inputs.machine.get("dist_contrastive"), inputs.machine.get("commit")
    add("Version", f"{version}, commit {commit}" if version and commit else version)
    return facts


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _course(inputs: RunReport, seconds: Mapping[str, float]) -> dict[str, Any]:
    """When the run was started and resumed, and its time by part, the longest first."""
    rows: dict[str, Any] = {}
    if inputs.starts:
        rows["started"] = inputs.starts[0]["time"]
        rows["resumed"] = [f"after step {start['step']}: {start['time']}" for start in inputs.starts[1:]] or "never"
    total = sum(seconds.values())
    for part, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        rows[part.replace("_", " ")] = f"{_duration(spent)} ({100 * spent / max(total, 1e-9):.0f} %)"
    return rows


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _percent(score: Any) -> str:
    return f"{100 * float(score):.1f}\u00a0%" if is_number(score) else "–"


def _table(values: Mapping[str, Any]) -> str:
    """Names and values, one row each."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.4g}" if abs(value) >= 1 else f"{value:.4g}"
        if isinstance(value, (list, tuple)):
            return ", ".join(text(item) for item in value)
        return str(value)

    rows = "".join(
        f'<tr><td>{html.escape(str(name))}</td><td class="value">{html.escape(text(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<div class="scroll"><table class="names"><tbody>{rows}</tbody></table></div>'
