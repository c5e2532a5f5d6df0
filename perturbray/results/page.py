"""The markup of pages and their look: jinja2 templates that load nothing; `report` and `evaluation` fill them."""

from jinja2 import Environment, StrictUndefined, Template

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2327; --soft: #5c666d; --line: #dfe3e6; --wash: #f5f7f8;
  --accent: #0b62a8; --good: #00694c; --bad: #a83c00; --even: #6a5a00; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14181b; --ink: #e6eaec; --soft: #a0abb2; --line: #343c42; --wash: #1c2226; --accent: #6db8f2;
    --good: #4fcf9f; --bad: #ff9a62; --even: #e3c95c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 69rem; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.22; margin: .2rem 0 .8rem; max-width: 60rem; text-wrap: balance; }
h2 { font-size: 1.18rem; margin: 2.6rem 0 .5rem; padding-top: .7rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
p, ul { max-width: 46rem; margin: .4rem 0 .8rem; }
ul { padding-left: 1.2rem; }
li { margin-bottom: .3rem; }
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.soft, figcaption, caption, .state, nav { color: var(--soft); font-size: .875rem; }
.kind { color: var(--soft); font-size: .875rem; margin: 0; }
.state { display: flex; flex-wrap: wrap; gap: .3rem .9rem; align-items: center; margin: 0 0 .6rem; }
.state progress { width: 11rem; height: .7rem; accent-color: var(--accent); }
.state b { color: var(--ink); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; margin: 0; list-style: none; max-width: none; }
.answer { font-size: 1.12rem; }
figure { margin: .6rem 0 1rem; }
figcaption { max-width: 46rem; margin-top: .5rem; }
.wide { overflow-x: auto; }
.wide > svg { width: 100%; min-width: 40rem; height: auto; display: block; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; margin: .4rem 0 1rem; }
caption { text-align: left; padding: 0 0 .35rem; max-width: 46rem; }
th, td { text-align: left; padding: .3rem 1.4rem .3rem 0; vertical-align: top; font-weight: normal;
  border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; font-weight: 600; }
thead th small { display: block; font-weight: normal; color: var(--soft); }
tbody th { font-weight: 600; }
td.n, th.n { text-align: right; }
td.n { white-space: nowrap; }
td.lines { white-space: pre; font-size: .8125rem; padding-right: 1rem; }
.board { width: 100%; table-layout: fixed; min-width: 48rem; }
.board th:first-child { width: 10.5rem; overflow-wrap: anywhere; }
.board .mean { font-weight: 600; font-size: .95rem; }
.board small { color: var(--soft); font-size: .79rem; }
.board .gap { display: block; font-size: .79rem; white-space: nowrap; }
tbody.baselines th, tbody.baselines .mean { font-weight: normal; font-style: italic; color: var(--soft); }
tbody.baselines th[colspan] { font-style: normal; padding-top: .9rem; font-size: .79rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .4rem 1.6rem; }
.plots figure { margin: .4rem 0; min-width: 0; }
.plots figcaption { margin: 0; }
.plots figcaption b { color: var(--ink); overflow-wrap: anywhere; }
.plots svg { width: 100%; height: auto; display: block; overflow: visible; }
.dot circle { fill: var(--accent); fill-opacity: .5; }
.dot text { visibility: hidden; fill: var(--ink); font-weight: 600; }
.dot:hover circle, .dot:focus circle { fill: var(--bad); fill-opacity: 1; }
.dot:hover text, .dot:focus text { visibility: visible; }
.dot:focus { outline: none; } .dot:focus-visible circle { stroke: var(--ink); stroke-width: 2; }
.plots svg text { font: 11px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
.plots svg text.axis { fill: var(--soft); font-size: 10px; }
.plots line.frame { stroke: var(--ink); } .plots line.equal { stroke: var(--soft); stroke-dasharray: 4 3; }
.plots line.anchor { stroke: var(--soft); stroke-dasharray: 1 3; }
.claim { margin: 1.1rem 0; } .claim h3 { margin: 0 0 .2rem; } .claim h3 small { color: var(--soft); font-weight: normal; }
.claim ul { margin: .2rem 0; max-width: 60rem; list-style: none; padding: 0; }
.outcome { white-space: nowrap; font-weight: 600; }
.outcome.holds { color: var(--good); } .outcome.does { color: var(--bad); } .outcome.the { color: var(--even); }
.better { color: var(--good); } .worse { color: var(--bad); } .tie { color: var(--even); }
.failed, .board small.failed, .state b.failed { color: var(--bad); }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--accent); padding: .15rem 0; }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: 4px; padding: .6rem .8rem;
  overflow-x: auto; font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; font-size: .875rem; max-width: 60rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { main { padding: 1.2rem .9rem 3rem; } h1 { font-size: 1.4rem; } }
@media print { body { font-size: 11px; } main { max-width: none; padding: 0; } nav, .reload { display: none; }
  h2, h3 { break-after: avoid; } tr, figure { break-inside: avoid; } .wide { overflow: visible; }
  .board, .wide > svg { min-width: 0; } details::details-content { content-visibility: visible; height: auto; } }
"""

SCRIPT = """
const box = document.getElementById("reload");
box.checked = sessionStorage.getItem("reload") === "on";
let timer = null;
function plan() { clearTimeout(timer); if (box.checked) timer = setTimeout(() => location.reload(), 15000); }
box.addEventListener("change", () => { sessionStorage.setItem("reload", box.checked ? "on" : "off"); plan(); });
plan();
"""

MACROS = """\
{% macro cell_of(cell, baseline) %}
{% if cell is none %}<small>not scored</small>{% else %}
<span class="mean">{{ cell.mean }}</span>
<small>{% if cell.sd %}±{{ cell.sd }}{% endif %}{% if cell.place %}&ensp;#{{ cell.place }}{% endif %}
{%- if cell.letters %}&ensp;<span title="who shares a letter cannot be told apart">{{ cell.letters }}</span>
{%- endif %}</small>
{% if cell.note %}
<small class="gap{% if "failed" in cell.note %} failed{% endif %}">{{ cell.note }}</small>
{% elif not cell.reference %}
<small class="gap">{{ "reference" if baseline else "no baseline to compare with" }}</small>
{% else %}
<span class="gap {{ cell.verdict }}" title="{{ cell.verdict }}, against {{ cell.reference }}">
{{- cell.mark }} {{ cell.difference }} {{ cell.interval }}</span>
{% endif %}
{% if cell.scaled %}
<small class="gap">{{ cell.scaled }}{% if cell.reaches %} <b>◆ reaches the replicate</b>{% endif %}</small>
{% endif %}{% endif %}
{% endmacro %}
{% macro board(level, group) %}
<div class="wide" tabindex="0" role="region" aria-label="{{ group.caption }}, {{ level.name }}">
<table class="board">
<caption>{{ group.caption }}</caption>
<thead><tr><th scope="col">model</th>
{% for scale in group.scales %}
<th scope="col">{{ scale.title }} <span role="img" aria-label="{{ scale.direction }}">{{ scale.arrow }}</span>
<small>{{ scale.effect }}{% if scale.unit %}; {{ scale.unit }}{% endif %}</small></th>
{% endfor %}
</tr></thead>
{% for part in group.parts if part.rows %}
{% set baseline = part.kind == "baselines" %}
<tbody class="{{ part.kind }}">
{% if baseline %}
<tr><th scope="rowgroup" colspan="{{ group.scales | length + 1 }}">baselines</th></tr>
{% endif %}
{% for row in part.rows %}
<tr><th scope="row">{{ row.series }}</th>
{% for cell in row.cells %}
<td>{{ cell_of(cell, baseline) }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
{% endfor %}
</table></div>
{% endmacro %}
{% macro boards(level) %}{% for group in level.groups %}{{ board(level, group) }}{% endfor %}{% endmacro %}
{% macro grid(frame) %}
<div class="wide" tabindex="0" role="region" aria-label="{{ frame.caption }}">
<table><caption>{{ frame.caption }}</caption>
<thead><tr>
{% for name in frame.columns %}
<th scope="col"{% if not loop.first %} class="{{ frame.align[loop.index0] }}"{% endif %}>{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in frame.rows %}
<tr>{% for value in row %}
{% if loop.first %}<th scope="row">{{ value }}</th>{% else %}
<td class="{{ frame.align[loop.index0] }}">{{ value }}</td>{% endif %}
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% macro said(one) %}
<li><span class="outcome {{ one.outcome.split() | first }}">
<span aria-hidden="true">{{ one.mark }}</span> {{ one.outcome }}</span>: {{ one.text }}</li>
{% endmacro %}
{% macro terms(pairs) %}
<dl>{% for term, value in pairs %}<dt>{{ term }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% endmacro %}
"""

BODY = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}: {{ question }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<p class="kind">perturbray sweep <b>{{ name }}</b>{% if data_line %} on {{ data_line }}{% endif %}</p>
<h1>{{ question }}</h1>
<div class="state">
<progress max="{{ [progress.planned, 1] | max }}" value="{{ progress.done }}" aria-label="trials done"></progress>
<span><b>{{ progress.done }} of {{ progress.planned }} trials done</b>
{%- if progress.failed %}, <b class="failed">{{ progress.failed }} failed</b>{% endif %}
{%- if progress.running %}, {{ progress.running }} running{% endif %}</span>
<span>{{ progress.state }}</span>
<span>page written <time datetime="{{ written.isoformat() }}">{{ written.strftime("%Y-%m-%d %H:%M:%S UTC") }}</time>
</span>
{% if live %}<label class="reload"><input type="checkbox" id="reload"> reload every 15 s</label>{% endif %}
</div>
<nav aria-label="sections"><ul>
{% for anchor, title in sections %}<li><a href="#{{ anchor }}">{{ title }}</a></li>{% endfor %}
</ul></nav>
</header>

<section id="answer"><h2>Answer{% if not complete %} so far{% endif %}</h2>
{% if lead %}
<p class="answer">{{ lead }}</p>
{% if findings %}
<p>By the other scores:</p>
<ul>{% for text in findings %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}
<p class="soft">{{ reading }}</p>
{% else %}
<p class="answer">{{ waiting }}</p>
{% endif %}
</section>

{% if figure %}
<section id="figure"><h2>{{ figure_title }}</h2>
<figure><div class="wide" tabindex="0" role="region" aria-label="figure">{{ figure }}</div>
<figcaption>{{ figure_caption }}</figcaption></figure></section>
{% endif %}

{% if levels %}
<section id="leaderboards"><h2>Leaderboards</h2>
<p class="soft">{{ board_caption }}</p>
{% for level in levels %}
{% if level.open %}<h3>{{ level.title }}</h3>{{ boards(level) }}
{% else %}<details><summary>{{ level.title }}</summary>{{ boards(level) }}</details>{% endif %}
{% endfor %}
</section>
{% endif %}

{% if claims %}
<section id="claims"><h2>What was claimed of models</h2>
<p class="soft">{{ claims_text }}</p>
{% for claim in claims %}
<div class="claim"><h3>{{ claim.name }}: {{ claim.text }} <small>({{ claim.source }})</small></h3>
<ul>{% for one in claim.found %}{{ said(one) }}{% endfor %}</ul>
{% if claim.rest %}<details><summary>By the other metrics: {{ claim.folded }}</summary>
<ul>{% for one in claim.rest %}{{ said(one) }}{% endfor %}</ul></details>{% endif %}
</div>
{% endfor %}
</section>
{% endif %}

{% if variants %}
<section id="variants"><h2>What a change does to a model</h2>
{% for frame in variants %}{{ grid(frame) }}{% endfor %}
</section>
{% endif %}

{% if scatters %}
<section id="conditions"><h2>Condition by condition</h2>
<p class="soft">{{ scatters_text }}</p>
{% for group in scatters %}
<h3>{{ group.title }}</h3>
<div class="plots">
{% for plot in group.open %}
<figure>{{ plot.svg }}<figcaption><b>{{ plot.series }}</b> {{ plot.caption }}</figcaption></figure>
{% endfor %}
</div>
{% if group.folded %}<details><summary>{{ group.folded | length }} more</summary><div class="plots">
{% for plot in group.folded %}
<figure>{{ plot.svg }}<figcaption><b>{{ plot.series }}</b> {{ plot.caption }}</figcaption></figure>
{% endfor %}
</div></details>{% endif %}
{% endfor %}
</section>
{% endif %}

{% if bounds %}
<section id="anchors"><h2>Floor and ceiling</h2>
<p class="soft">{{ scaled_text }}</p>
{% if scaled_figure %}
<figure><div class="wide" tabindex="0" role="region" aria-label="figure of scaled scores">{{ scaled_figure }}</div>
<figcaption>{{ scaled_caption }}</figcaption></figure>
{% endif %}
{{ grid(bounds) }}
<p class="soft">{{ reaching }}</p>
<p class="soft">{{ controls }}</p>
</section>
{% endif %}

{% if effects %}
<section id="effects"><h2>By size of effect</h2>
{% for part in effects %}
<details><summary>{{ part.title }}</summary>
{% for frame in part.grids %}{{ grid(frame) }}{% endfor %}
</details>
{% endfor %}
</section>
{% endif %}

{% if changes %}<section id="changes"><h2>What each model loses</h2>{{ grid(changes) }}</section>{% endif %}
{% if truth %}<section id="truth"><h2>Against the known truth</h2>{{ grid(truth) }}</section>{% endif %}

{% if strata %}
<section id="strata"><h2>Conditions reported apart</h2>
<p class="soft">These conditions are not in the headline, the figure or the answer above.</p>
{% for stratum in strata %}
<details><summary>{{ stratum.name }}: {{ stratum.conditions }}</summary>
{% for level in stratum.levels %}<h3>{{ level.title }}</h3>{{ boards(level) }}{% endfor %}
</details>
{% endfor %}
</section>
{% endif %}

{% if searches %}
<section id="searches"><h2>What the search learnt</h2>
<p class="soft">From the validation conditions alone; the scores above are of the test conditions.</p>
{% for one in searches %}
<h3>{{ one.title }}</h3>
{% for text in one.sentences %}<p>{{ text }}</p>{% endfor %}
{% for figure, caption in one.figures %}
<figure><div class="wide" tabindex="0" role="region" aria-label="figure of the search">{{ figure }}</div>
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% if one.importance %}{{ grid(one.importance) }}{% endif %}
{{ grid(one.space) }}
{% if one.failures %}<details><summary class="failed">{{ one.failures | length }} failed</summary>
<ul>{% for text in one.failures %}<li>{{ text }}</li>{% endfor %}</ul></details>{% endif %}
{% endfor %}
</section>
{% endif %}

{% if statuses or failures %}
<section id="failures"><h2>Flags and failures</h2>
{% if failures %}
<h3 class="failed">Failed trials</h3>
{% for failure in failures %}
<details><summary><b>{{ failure.name }}</b>: <span class="failed">{{ failure.error }}</span></summary>
<pre tabindex="0">{{ failure.traceback or "no traceback was recorded" }}</pre></details>
{% endfor %}
{% endif %}
{% if statuses %}{{ grid(statuses) }}{% endif %}
</section>
{% endif %}

<section id="data"><h2>Data and notes</h2>
{{ terms(dataset) }}
{% if notes %}<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
</section>

{% if curves_figure %}
<section id="curves"><h2>Learning curves</h2>
<figure><div class="wide" tabindex="0" role="region" aria-label="learning curves">{{ curves_figure }}</div>
<figcaption>{{ curves_text }}</figcaption></figure></section>
{% endif %}

{% if cost %}<section id="cost"><h2>Time and memory</h2>{{ grid(cost) }}</section>{% endif %}

<section id="repeat"><h2>Repeat it</h2>
{% if command %}<pre tabindex="0"><code>{{ command }}</code></pre>{% endif %}
<p class="soft">Finished trials are not run again; to run one again, delete its Parquet file. The numbers of this page
are in summary.csv, those by size of effect in strata.csv, those of claims in claims.csv.</p>
{{ terms(versions) }}
{% if shared %}<details><summary>What all trials share</summary>{{ terms(shared) }}</details>{% endif %}
<details><summary>All {{ progress.planned }} trials of the plan</summary>{{ grid(listing) }}</details>
</section>
</main>
{% if live %}<script>{{ script }}</script>{% endif %}
</body>
</html>
"""

EVALUATION = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}
.plots circle { fill: var(--accent); fill-opacity: .55; }
.plots circle.edge { fill: var(--paper); stroke: var(--bad); }
.plots circle:hover { fill-opacity: 1; }
.plots line { stroke: var(--line); } .plots line.median { stroke: var(--ink); stroke-dasharray: 2 3; }
.plots text { fill: var(--soft); font: 10px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
</style>
</head>
<body>
<main>
<header>
<p class="kind">perturbray evaluate, convention <b>{{ convention }}</b></p>
<h1>{{ title }}</h1>
<div class="state"><span><b>{{ conditions }}</b></span>
<span>page written <time datetime="{{ written.isoformat() }}">{{ written.strftime("%Y-%m-%d %H:%M:%S UTC") }}</time>
</span></div>
<nav aria-label="sections"><ul>
{% for anchor, name in sections %}<li><a href="#{{ anchor }}">{{ name }}</a></li>{% endfor %}
</ul></nav>
</header>
<section id="summary"><h2>Summary</h2>{{ grid(summary) }}</section>
{% if anchors %}
<section id="anchors"><h2>Floor and ceiling</h2>
<p class="soft">{{ anchors_text }}</p>
{% for frame in anchors %}{{ grid(frame) }}{% endfor %}
<p class="soft">{{ reaching }}</p></section>
{% endif %}
{% if strata %}
<section id="effects"><h2>By size of effect</h2>
{% for frame in strata %}{{ grid(frame) }}{% endfor %}
</section>
{% endif %}
<section id="conditions"><h2>Condition by condition</h2>
<p class="soft">{{ plots_caption }}</p>
<div class="plots">
{% for plot in plots %}
<figure>{{ plot.svg }}<figcaption><b>{{ plot.metric }}</b> {{ plot.caption }}</figcaption></figure>
{% endfor %}
</div></section>
{% if statuses %}<section id="statuses"><h2>Values with a reason</h2>{{ grid(statuses) }}</section>{% endif %}
<section id="notes"><h2>How it was scored</h2>
{% for text in sentences %}<p>{{ text }}</p>{% endfor %}
{{ terms(facts) }}
</section>
<section id="repeat"><h2>Repeat it</h2>
{% if command %}<pre tabindex="0"><code>{{ command }}</code></pre>{% endif %}
<p class="soft">All values are in metrics.csv and metrics.parquet, a row a condition and metric; the means are in
summary.csv{% if further %}, intervals and anchors in calibration.csv, means by size of effect in strata.csv{% endif %}.</p>
</section>
</main>
</body>
</html>
"""

TEMPLATE = MACROS + BODY
EVALUATION = MACROS + EVALUATION


def template(text: str) -> Template:
    """A template in which names from data never become markup, and a missing value is an error."""
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(**options).from_string(text)
