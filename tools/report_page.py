"""The page of a report: one HTML file that loads nothing, light or dark as its reader's screen is.

Every text that comes from a run passes through ``html.escape``; the content policy forbids scripts and requests besides.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from polargrad_dist.trainer import rundir
from polargrad_dist.trainer.console import duration
from tools.report_draw import INKS, colour, short
from tools.report_figures import Section
from tools.report_runs import UNSET, RunRecords, Summary, differences, printable

NONE = "–"
LIGHT, DARK = (" ".join(f"--{name}: {inks[i]};" for name, inks in INKS.items()) for i in (0, 1))
STYLE = f"""
:root {{ color-scheme: light dark; --paper: #ffffff; --card: #f5f6f8; --link: #0a5fa3; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #14171c; --card: #1d2128; --link: #74bdf5; {DARK} }} }}
@media print {{ :root {{ color-scheme: light; --paper: #ffffff; --card: #ffffff; --link: #1c2128; {LIGHT} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1120px; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 2.5rem 0 .25rem; padding-top: .75rem; border-top: 1px solid var(--grid); }}
p {{ margin: .25rem 0 .75rem; max-width: 46rem; color: var(--quiet); }}
a {{ color: var(--link); }}
nav {{ display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin-top: .75rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; }}
th, td {{ padding: .35rem .8rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }}
thead th {{ color: var(--quiet); font-weight: 500; vertical-align: bottom; }}
tbody th {{ font-weight: 500; white-space: nowrap; }}
td.number {{ text-align: right; white-space: nowrap; }}
th.number {{ text-align: right; }}
td.best {{ font-weight: 700; }}
.unset {{ color: var(--quiet); font-style: italic; }}
.swatch {{ display: inline-block; width: .8em; height: .8em; margin-right: .45em; border-radius: 2px;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
figure {{ margin: .75rem 0 1.25rem; overflow-x: auto; break-inside: avoid; }}
svg {{ display: block; width: 100%; height: auto; stroke-linejoin: round; }}
svg text {{ font-family: system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }}
code, pre {{ font: .8125rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }}
pre {{ padding: .75rem; background: var(--card); overflow-x: auto; margin: .5rem 0; }}
details {{ margin: .5rem 0; }}
summary {{ cursor: pointer; }}
@media print {{ body {{ max-width: none; padding: 0; }} nav {{ display: none; }} svg {{ min-width: 0 !important; }}
  h2 {{ break-after: avoid; }} tr {{ break-inside: avoid; }} .wide, figure {{ overflow: visible; }} }}
"""

# The summary's columns that hold numbers: heading, and how a run's cell reads.
COLUMNS: dict[str, Callable[[Summary], str]] = {
    "parameters": lambda s: number(s.parameters, short),
    "steps": lambda s: f"{s.step:,} / {number(s.planned, '{:,}'.format)}",
    "final validation loss": lambda s: number(s.final_loss, "{:.4f}".format),
    "best validation loss": lambda s: (
        NONE if s.best_loss is None else f"{s.best_loss:.4f} at step {s.best_step:,}"
    ),
    "bits per byte": lambda s: number(s.bits_per_byte, "{:.4f}".format),
    "tokens": lambda s: number(s.tokens, short),
    "tokens/s, median": lambda s: number(s.tokens_per_second, "{:,.0f}".format),
    "skipped steps": lambda s: number(s.skipped, "{:,}".format),
    "time": lambda s: number(s.seconds, duration),
}


def number(value: float | None, form: Callable[[float], str]) -> str:
    return NONE if value is None or not math.isfinite(value) else form(value)


def page(runs: list[RunRecords], parts: list[Section], drawings: dict[str, str], left_out: str) -> str:
    """The whole page. ``drawings``: figure name -> inline SVG; ``left_out`` says which parameters have no figures."""
    several = len(runs) > 1
    title = f"Comparison of {len(runs)} runs" if several else f"Run {runs[0].label}"
    anchors = [("summary", "Summary"), *((part.anchor, part.title) for part in parts)]
    written = [run for run in runs if run.samples]
    anchors += [("samples", "Samples")] if written else []
    anchors += [("differences", "Differences")] if several else []
    anchors += [("configuration", "Configuration")]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name in anchors)
    body = [summary(runs)]
    for part in parts:
        body.append(section(part, drawings, left_out if part.anchor == "conditioning" else ""))
    body += [samples(written, several)] if written else []
    body += [difference_table(runs)] if several else []
    body.append(configurations(runs))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{"".join(body)}</main>
</body>
</html>
"""


def escape(text: str) -> str:
    return html.escape(printable(text))


def name_of(i: int, run: RunRecords, several: bool) -> str:
    """A run's label, behind its colour where there are others."""
    swatch = f'<span class="swatch" style="background: var(--{colour(i)})"></span>' if several else ""
    return swatch + escape(run.label)


def summary(runs: list[RunRecords]) -> str:
    """A row per run; the lowest validation loss of several is bold."""
    rows = [run.summary() for run in runs]
    shown = [name for name in COLUMNS if name != "parameters" or any(row.parameters for row in rows)]
    losses = [row.best_loss for row in rows if row.best_loss is not None]
    lines = []
    for i, (run, row) in enumerate(zip(runs, rows, strict=True)):
        cells = [f'<th scope="row">{name_of(i, run, len(runs) > 1)}</th><td>{escape(row.model or NONE)}</td>']
        for name in shown:
            best = name == "best validation loss" and len(losses) > 1 and row.best_loss == min(losses)
            cells.append(f'<td class="number{" best" if best else ""}">{escape(COLUMNS[name](row))}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    heads = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in shown)
    notes = [
        f"<p>{escape(run.label)}: {run.unreadable:,} of {run.unreadable + run.records:,} lines of metrics.jsonl could not be "
        "read, as happens to the last line of a run that is being written.</p>\n"
        for run in runs
        if run.unreadable
    ]
    notes += [f"<p>{escape(run.label)}: nothing is recorded yet.</p>\n" for run in runs if not run.records]
    return f"""<section id="summary"><h2>Summary</h2>
<p>Losses in nats per token. The time is what the recorded rates imply.</p>
<div class="wide"><table><thead><tr><th scope="col">run</th><th scope="col">model</th>{heads}</tr></thead>
<tbody>
{"".join(lines)}</tbody></table></div>
{"".join(notes)}</section>
"""


def section(part: Section, drawings: dict[str, str], note: str) -> str:
    figures = "".join(f"<figure>{drawings[figure.name]}</figure>\n" for figure in part.figures)
    text = part.text if part.figures else f"Nothing to show: {part.missing}."
    notes = "".join(f"<p>{escape(words)}</p>\n" for words in (text, note) if words)
    return f'<section id="{part.anchor}"><h2>{escape(part.title)}</h2>\n{notes}{figures}</section>\n'


SAMPLES = 12  # the newest of each run


def samples(runs: Sequence[RunRecords], several: bool) -> str:
    """What the runs wrote when they were asked to, the newest first."""
    rows = []
    for run in runs:
        label = f"{escape(run.label)}, " if several else ""
        for step, prompt, text in reversed(run.samples[-SAMPLES:]):
            shown = f"<strong>{escape(prompt)}</strong>{escape(text)}"
            rows.append(f"<details open><summary>{label}step {step}</summary><pre>{shown}</pre></details>")
    return f'<section id="samples"><h2>Samples</h2>\n{"".join(rows)}</section>\n'


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
    shown = table if rows else "<p>The configurations are the same.</p>\n"
    return f'<section id="differences"><h2>Differences in configuration</h2>\n{shown}</section>\n'


def setting(value: str) -> str:
    if value == UNSET:
        return f'<td class="unset">{UNSET}</td>'
    return f"<td><code>{escape(value)}</code></td>"


def configurations(runs: Sequence[RunRecords]) -> str:
    """Each run's whole configuration, folded."""
    folded = []
    for i, run in enumerate(runs):
        lines = "\n".join(escape(line) for line in rundir.dump(run.config).splitlines())
        head = f"{name_of(i, run, len(runs) > 1)}: <code>{escape(str(run.folder))}</code>"
        folded.append(f"<details><summary>{head}</summary><pre>{lines}</pre></details>\n")
    return f'<section id="configuration"><h2>Configuration</h2>\n{"".join(folded)}</section>\n'
