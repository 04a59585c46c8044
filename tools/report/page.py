"""The page of a report: one self-contained HTML file, light or dark according to the browser's setting.

Text of a run passes through ``html.escape``, data through JSON without "<"; the content policy allows only the two
scripts here, and forbids requests.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polargrad_dist.trainer import rundir
from polargrad_dist.trainer.console import duration
from polargrad_dist.trainer.header import describe_expected
from polargrad_dist.words import counted
from tools.report.runs import UNSET, Array, RunRecords, Summary, by_seed, differences, finite, printable

NONE = "–"
NOT_FINITE = "not finite"
HERE = Path(__file__).parent
COLOURS = 8
SAMPLES = 8
"""Steps shown for each prompt, spread over the run, including the first and the last."""

# A figure of the summary: heading, and how a run's cell reads.
COLUMNS: dict[str, Callable[[Summary], str]] = {
    "final validation loss": lambda s: measured(s.final_loss),
    "best validation loss": lambda s: (
        NONE if s.best_loss is None else f"{s.best_loss:.4f} at step {s.best_step:,}"
    ),
    "bits per byte": lambda s: measured(s.bits_per_byte),
    "bigram's bits per byte": lambda s: number(s.bigram_bits_per_byte, "{:.4f}".format),
    "steps": lambda s: f"{s.step:,} / {number(s.planned, '{:,}'.format)}",
    "tokens": lambda s: number(s.tokens, short),
    "time": lambda s: number(s.seconds, duration),
    "tokens/s, median": lambda s: number(s.tokens_per_second, "{:,.0f}".format),
    "MFU, median": lambda s: number(s.mfu, "{:.1%}".format),
    "parameters": lambda s: number(s.parameters, short),
    "skipped steps": lambda s: number(s.skipped, "{:,}".format),
}
PARTS = {
    "forward_backward": "forward and backward",
    "optimizer": "optimizer",
    "data": "data",
    "evaluation": "evaluation",
    "saving": "saving",
    "diagnostics": "diagnostics",
    "other": "other",
}


def number(value: float | None, form: Callable[[float], str]) -> str:
    return NONE if value is None or not math.isfinite(value) else form(value)


def measured(loss: float | None) -> str:
    return NOT_FINITE if loss is not None and not math.isfinite(loss) else number(loss, "{:.4f}".format)


def short(value: float) -> str:
    """A number in few characters: 0.02, 3e-05, 1,500 as 1.5k, 61.44M."""
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if unit <= size < 1e15:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"


def page(runs: list[RunRecords], drawn: dict[str, Any]) -> str:
    """The whole page. ``drawn``: what `charts` returns."""
    several = len(runs) > 1
    title = f"Comparison of {len(runs)} runs" if several else f"Run {runs[0].label}"
    groups = drawn["groups"]
    parts = [
        ("summary", "Summary", summary(runs)),
        ("loss", "Loss", charts("loss", groups, LOSS)),
        ("samples", "Samples", samples(runs)),
        ("optimizer", "Optimizer", charts("optimizer", groups, "")),
        ("speed", "Speed", bars(runs) + charts("speed", groups, SPEED)),
        ("conditioning", "Conditioning", conditioning(drawn, groups)),
        ("differences", "Differences", difference_table(runs) if several else ""),
        ("setup", "Setup", setup(runs)),
        ("configuration", "Configuration", configurations(runs)),
    ]
    shown = [(anchor, name, body) for anchor, name, body in parts if body]
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in shown)
    body = "".join(
        f'<section id="{anchor}"><h2>{name}</h2>\n{content}</section>\n' for anchor, name, content in shown
    )
    scripts = [(HERE / name).read_text(encoding="utf-8") for name in ("chart.js", "page.js")]
    allowed = " ".join(f"'sha256-{checksum(script)}'" for script in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>
{(HERE / "style.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<div class="bar"><div><p class="kicker">polargrad-dist</p><h1>{escape(title)}</h1>{subtitle(runs)}</div>
<button id="theme" type="button" title="light or dark" aria-label="light or dark">◐</button></div>
{legend(runs)}<nav aria-label="Sections">{links}</nav>
</header>
<noscript><p class="note">The charts need JavaScript, which is turned off here; tables and text are complete.</p></noscript>
<main>
{body}</main>
<footer>Hover or touch a chart for its values, drag to zoom, double-click to zoom out.</footer>
<script type="application/json" id="data">{json_text(drawn)}</script>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""


LOSS = (
    '<div class="controls"><label>smoothing <input id="smoothing" type="range" min="0" max="6" value="3"></label>'
    '<label>against <select id="against"><option value="step">steps</option><option value="tokens">tokens</option></select>'
    "</label></div>\n"
)
SPEED = ""


def checksum(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def json_text(tree: Any) -> str:
    """JSON that ends no script element: "<" and "&" only in escapes."""
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def escape(text: str) -> str:
    return html.escape(printable(text))


def subtitle(runs: list[RunRecords]) -> str:
    if len(runs) > 1:
        return ""
    run = runs[0]
    words = [run.fact("model.name") or run.summary().model]
    if isinstance(devices := run.fact("ranks.devices"), list):
        words.append(", ".join(map(str, devices)))
    if isinstance(starts := run.fact("starts"), list) and starts and isinstance(starts[0], dict):
        words.append(moment(starts[0].get("time")))
    return f'<p class="subtitle">{escape(" · ".join(str(word) for word in words if word))}</p>'


def moment(seconds: Any) -> str:
    """A time as a date and minutes of UTC; nothing for what is none."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def swatch(number: int) -> str:
    return f'<span class="swatch" style="background: var(--c{number % COLOURS})"></span>'


def legend(runs: list[RunRecords]) -> str:
    """The runs with their colours, each to be hidden by a click."""
    if len(runs) == 1:
        return ""
    buttons = [
        f'<button type="button" class="chip" data-run="{i}" aria-pressed="true">{swatch(i)}{escape(run.label)}</button>'
        for i, run in enumerate(runs)
    ]
    return f'<div class="legend" aria-label="Runs">{"".join(buttons)}</div>\n'


def name_of(i: int, run: RunRecords, several: bool) -> str:
    """A run's label, behind its colour where there are others."""
    return (swatch(i) if several else "") + escape(run.label)


def summary(runs: list[RunRecords]) -> str:
    """Tiles of one run, a table of several; a figure that no run has is left out."""
    rows = [run.summary() for run in runs]
    filled = {
        name: [form(row) for row in rows]
        for name, form in COLUMNS.items()
        if any(form(row) != NONE for row in rows)
    }
    if all(row.best_loss == row.final_loss for row in rows):
        filled.pop("best validation loss", None)
    notes = "".join(f'<p class="note">{escape(text)}</p>\n' for run in runs for text in remarks(run))
    if len(runs) == 1:
        tiles = "".join(
            f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(cells[0])}</dd></div>'
            for name, cells in filled.items()
        )
        return f'<dl class="tiles">{tiles}</dl>\n{notes}'
    # A run that diverged is not the best one, whatever it had reached before
    losses = [row.best_loss for row in rows if row.best_loss is not None and row.final_loss != math.inf]
    targets = sorted(
        {count for run in runs if (count := finite(run.fact("data.validation_targets"))) is not None}
    )
    if len(targets) > 1:
        counts = ", ".join(f"{count:,.0f}" for count in targets)
        notes = f'<p class="note">Validated on different data ({counts} targets): do not compare these losses.</p>\n{notes}'
    judged = "best validation loss" if "best validation loss" in filled else "final validation loss"
    lines = []
    for i, (run, row) in enumerate(zip(runs, rows, strict=True)):
        cells = f'<th scope="row">{name_of(i, run, True)}</th><td>{escape(row.model or NONE)}</td>'
        for name, texts in filled.items():
            judges = name == judged and len(losses) > 1 and len(targets) < 2 and row.final_loss != math.inf
            best = judges and row.best_loss == min(losses)
            cells += f'<td class="number{" best" if best else ""}">{escape(texts[i])}</td>'
        lines.append(f"<tr>{cells}</tr>\n")
    heads = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in filled)
    head = f'<tr><th scope="col">run</th><th scope="col">model</th>{heads}</tr>'
    return f"""<div class="wide"><table><thead>{head}</thead>
<tbody>
{"".join(lines)}</tbody></table></div>
{over_seeds(runs)}{notes}"""


def over_seeds(runs: list[RunRecords]) -> str:
    """The last validations of runs that differ in nothing but their seed, as mean, least and largest; else nothing."""
    groups = by_seed(runs)
    if all(len({run.setting("trainer.seed") for run in group}) == 1 for group in groups):
        return ""
    lines = []
    for group in groups:
        names = ", ".join(name_of(runs.index(run), run, True) for run in group)
        seeds = ", ".join(str(run.setting("trainer.seed")) for run in group)
        ends = [run.curve("validation_loss")[0][-1:].tolist() for run in group]
        # A mean over different steps would say nothing
        alike = ends[0] != [] and all(end == ends[0] for end in ends)
        diverged = any(run.diverged_at is not None for run in group)
        cells = [f"{ends[0][0]:,.0f}" if alike and not diverged else "not the same"]
        cells += [
            NOT_FINITE if diverged else spread_of([run.curve(name)[1] for run in group], alike)
            for name in ("validation_loss", "bits_per_byte")
        ]
        numbers = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
        lines.append(
            f'<tr><th scope="row">{names}</th><td class="number">{escape(seeds)}</td>{numbers}</tr>\n'
        )
    heads = "".join(
        f'<th scope="col" class="number">{name}</th>'
        for name in ("seeds", "at step", "validation loss", "bits per byte")
    )
    return f"""<h3>Over seeds: mean (least to largest)</h3>
<div class="wide"><table><thead><tr><th scope="col">runs</th>{heads}</tr></thead>
<tbody>
{"".join(lines)}</tbody></table></div>
"""


def spread_of(curves: list[Array], alike: bool) -> str:
    """The last values of curves as mean, least and largest."""
    last = [float(curve[-1]) for curve in curves if curve.size]
    if not alike or len(last) < len(curves):
        return NONE
    mean = f"{sum(last) / len(last):.4f}"
    return mean if len(last) == 1 else f"{mean} ({min(last):.4f} to {max(last):.4f})"


def remarks(run: RunRecords) -> list[str]:
    found = []
    if run.unreadable:
        found.append(
            f"{run.label}: {run.unreadable:,} of {run.unreadable + run.records:,} lines of metrics.jsonl could not be read, "
            "as happens to the last line of a run that is being written."
        )
    if (step := run.diverged_at) is not None:
        found.append(
            f"{run.label}: the last validation loss, at step {step:,}, is not finite: this run diverged."
        )
    if not run.records:
        found.append(f"{run.label}: nothing is recorded yet.")
    return found


def charts(group: str, groups: dict[str, Any], controls: str) -> str:
    """The place of a group's charts, which the script fills; nothing for a group without any."""
    if group not in groups:
        return ""
    places = "".join(
        f'<figure data-chart="{i}"{" class=large" if one.get("large") else ""}></figure>'
        for i, one in enumerate(groups[group])
    )
    return f'{controls}<div class="charts" data-group="{group}">{places}</div>\n'


def samples(runs: Sequence[RunRecords]) -> str:
    """What the runs wrote from each prompt, a card a step, in the order in which they learnt."""
    several, folds = len(runs) > 1, list[str]()
    for prompt in dict.fromkeys(asked for run in runs for _, asked, _ in run.samples):
        films = []
        for i, run in enumerate(runs):
            mine = [(step, text) for step, asked, text in run.samples if asked == prompt]
            cards = "".join(
                f"<li><h4>step {step:,}</h4><pre><b>{escape_text(prompt)}</b>{escape_text(text)}</pre></li>"
                for step, text in spread(mine, SAMPLES)
            )
            label = f'<p class="sample">{name_of(i, run, True)}</p>' if several else ""
            films += [f'{label}<ol class="film" tabindex="0">{cards}</ol>\n'] if mine else []
        asked = f"<q>{escape(prompt)}</q>" if prompt else "a new document"
        opened = " open" if not (folds and several) else ""
        folds.append(f"<details{opened}><summary>{asked}</summary>\n{''.join(films)}</details>\n")
    return "".join(folds)


def escape_text(text: str) -> str:
    """Text of several lines."""
    return "\n".join(escape(line) for line in text.split("\n"))


def spread(items: list[tuple[int, str]], count: int) -> list[tuple[int, str]]:
    """``count`` of the items, denser at the beginning, where most is learnt; the first and the last among them."""
    if len(items) <= count:
        return items
    last = len(items) - 1
    chosen = {round(last * (i / (count - 1)) ** 1.5) for i in range(count)}
    return [items[i] for i in sorted(chosen)]


def bars(runs: list[RunRecords]) -> str:
    """Where the time of each run went, as one bar of a hundred percent."""
    rows, used = [], set()
    for i, run in enumerate(runs):
        parts = run.time_by_part()
        whole = sum(parts.values())
        if not whole > 0:
            continue
        names = [*(name for name in PARTS if name in parts), *(name for name in parts if name not in PARTS)]
        used |= set(names)
        pieces = "".join(
            f'<span class="part {css(name)}" style="width:{100 * parts[name] / whole:.2f}%" '
            f'title="{escape(PARTS.get(name, name))}: {parts[name] / whole:.1%}, {duration(parts[name])}"></span>'
            for name in names
        )
        words = ", ".join(f"{PARTS.get(name, name)} {parts[name] / whole:.1%}" for name in names)
        label = f"<h3>{name_of(i, run, True)}</h3>" if len(runs) > 1 else ""
        rows.append(f'{label}<div class="share" role="img" aria-label="{escape(words)}">{pieces}</div>'
                    f'<p class="parts">{key(names, parts, whole)}</p>\n')  # fmt: skip
    return (
        f'<div class="card shares"><h3 class="title">Where the time went</h3>{"".join(rows)}</div>\n'
        if rows
        else ""
    )


def key(names: list[str], parts: dict[str, float], whole: float) -> str:
    return " ".join(
        f'<span class="key"><i class="part {css(name)}"></i>{escape(PARTS.get(name, name))} '
        f"<b>{parts[name] / whole:.1%}</b></span>"
        for name in names
    )


def css(name: str) -> str:
    """The class of a part of the time; of one that this version does not know, that of the rest."""
    return f"p-{name}" if name in PARTS else "p-other"


def conditioning(drawn: dict[str, Any], groups: dict[str, Any]) -> str:
    """One heat map over all matrices, then the matrix that is chosen in it; folded away until wanted."""
    looked = sum(len(found) for found in drawn["matrices"])
    maps = (
        "<p>κ is the largest over the smallest singular value, of the gradient G and of the momentum M. The residual is the "
        "update's distance from orthogonality, the cosine that between it and the exact polar factor. Choose a row for its "
        'curves.</p>\n<div class="controls" id="map-controls"></div><div class="wide"><div id="map"></div></div>\n'
        '<div class="charts" id="matrix"></div>\n'
        if looked
        else ""
    )
    roles = charts("polar", groups, "<h3>The oracle, by role</h3>\n")
    if not maps and not roles:
        return ""
    count = counted(looked, "matrix", "matrices") if looked else "by role"
    return f"<details><summary>Condition numbers, norms and orthogonality: {count}</summary>\n{maps}{roles}</details>\n"


def setup(runs: Sequence[RunRecords]) -> str:
    """Hardware, versions, commit and command of each run, as far as its ``run.json`` says."""
    rows: dict[str, Callable[[RunRecords], Any]] = {
        "ranks": lambda r: _ranks(r),
        "machine": lambda r: _machine(r.fact("machine")),
        "precision": lambda r: r.fact("training.precision"),
        "expected": lambda r: _expected(r),
        "data": lambda r: _data(r),
        "rules": lambda r: _rules(r.fact("roles")),
        "versions": lambda r: _pairs(r.fact("versions")),
        "commit": lambda r: r.fact("commit"),
        "starts": lambda r: _starts(r.fact("starts")),
        "command": lambda r: r.fact("command"),
        "run directory": lambda r: str(r.folder),
    }
    cells = {name: [of(run) for run in runs] for name, of in rows.items()}
    lines = [
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{_cell(name, text)}</td>" for text in texts)}</tr>\n'
        for name, texts in cells.items()
        if any(texts)
    ]
    several = len(runs) > 1
    heads = "".join(f'<th scope="col">{name_of(i, run, True)}</th>' for i, run in enumerate(runs))
    head = f'<thead><tr><th scope="col"></th>{heads}</tr></thead>' if several else ""
    return f'<div class="wide"><table class="setup">{head}<tbody>\n{"".join(lines)}</tbody></table></div>\n'


def _cell(name: str, text: Any) -> str:
    if not text:
        return NONE
    shown = "<br>".join(escape(line) for line in str(text).splitlines())
    return f"<code>{shown}</code>" if name in ("command", "commit", "run directory") else shown


def _pairs(tree: Any) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in tree.items()) if isinstance(tree, dict) else ""


def _machine(found: Any) -> str:
    if not isinstance(found, dict):
        return ""
    parts = [
        f"{counted(found[key], noun)}{where}"
        for key, noun, where in (("cores", "core", ""), ("threads", "thread", " per rank"))
        if isinstance(found.get(key), int)
    ]
    parts += [str(found["system"])] if "system" in found else []
    parts += [f"{found['memory_gib']} GiB of memory"] if "memory_gib" in found else []
    return ", ".join(parts)


def _rules(roles: Any) -> str:
    if not isinstance(roles, dict):
        return ""
    return "\n".join(f"{role}: {one.get('rule')}" for role, one in roles.items() if isinstance(one, dict))


def _ranks(run: RunRecords) -> str:
    devices = run.fact("ranks.devices")
    if not isinstance(devices, list):
        return ""
    return f"{run.fact('ranks.world')} ({run.fact('ranks.strategy')}) on {', '.join(map(str, devices))}"


def _expected(run: RunRecords) -> str:
    found = run.fact("expected")
    try:
        return describe_expected(found) if found else ""
    except (AttributeError, KeyError, TypeError, ValueError):
        # Of a file that another program wrote
        return ""


def _data(run: RunRecords) -> str:
    data = run.fact("data")
    if not isinstance(data, dict):
        return ""
    parts = [str(data[name]) for name in ("source", "tokenizer") if data.get(name)]
    if isinstance(tokens := data.get("train_tokens"), int):
        parts.append(counted(tokens, "training token"))
    if isinstance(epochs := run.fact("training.epochs"), int | float):
        parts.append(f"{epochs:,.0f} epochs" if epochs >= 10 else f"{epochs:.2g} epochs")
    return ", ".join(parts)


def _starts(starts: Any) -> str:
    if not isinstance(starts, list):
        return ""
    known = [one for one in starts if isinstance(one, dict)]
    return ", ".join(f"step {one.get('step')} ({moment(one.get('time'))})" for one in known[-6:])


def difference_table(runs: list[RunRecords]) -> str:
    rows = differences(runs)
    heads = "".join(f'<th scope="col">{name_of(i, run, several=True)}</th>' for i, run in enumerate(runs))
    lines = [
        f'<tr><th scope="row"><code>{escape(key)}</code></th>{"".join(map(setting, values))}</tr>\n'
        for key, values in rows.items()
    ]
    table = (
        f'<div class="wide"><table><thead><tr><th scope="col">key</th>{heads}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody></table></div>\n"
    )
    return table if rows else "<p>The configurations are the same.</p>\n"


def setting(value: str) -> str:
    if value == UNSET:
        return f'<td class="unset">{UNSET}</td>'
    return f"<td><code>{escape(value)}</code></td>"


def configurations(runs: Sequence[RunRecords]) -> str:
    """Each run's whole configuration, folded."""
    folded = []
    for i, run in enumerate(runs):
        lines = "\n".join(escape(line) for line in rundir.dump(run.config).splitlines())
        head = f"{name_of(i, run, len(runs) > 1)}: <code>config.yaml</code>"
        folded.append(f"<details><summary>{head}</summary><pre>{lines}</pre></details>\n")
    return "".join(folded)
