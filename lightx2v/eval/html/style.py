"""The style sheet of a page: light, or dark where the reader's system is."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --text: #1b1b1a; --soft: #62615c; --line: #e3e2dd;
  --mark: #2563c9; --mean: #8b8a84; --limit: #c2410c; --good: #15713c; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root {
  --page: #131312; --card: #1c1c1b; --text: #efeeea; --soft: #a3a29b; --line: #33322f;
  --mark: #6ea3f5; --mean: #8d8c85; --limit: #f0883e; --good: #57c27f; --bad: #f17b70; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; font-weight: 650; }
h2 { font-size: 17px; margin: 0 0 4px; font-weight: 650; }
p { margin: 0 0 12px; max-width: 76ch; }
.soft { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px;
  margin-top: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin-top: 18px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.tile b { display: block; font-size: 21px; line-height: 1.4; font-weight: 620; white-space: nowrap; }
.tile span { display: block; font-size: 13px; color: var(--soft); }
.pass, .fail { display: inline-block; font-weight: 650; border: 1px solid; border-radius: 6px; padding: 1px 9px; }
.pass { color: var(--good); } .fail { color: var(--bad); }
table { border-collapse: collapse; font-size: 14px; margin: 8px 0 4px; }
th, td { text-align: right; padding: 4px 0 4px 26px; border-bottom: 1px solid var(--line); vertical-align: top;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--soft); font-weight: 500; }
tr:last-child td { border-bottom: 0; }
td.words { text-align: left; overflow-wrap: anywhere; } th.words { text-align: left; }
.scroll { overflow-x: auto; }
.pair { display: flex; flex-wrap: wrap; gap: 8px 48px; align-items: flex-start; }
.pair > svg { flex: 1 1 420px; } .pair > * { min-width: 0; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--soft); }
svg { display: block; width: 100%; height: auto; margin-top: 12px; overflow: visible; }
svg text { fill: var(--text); font-size: 12px; font-family: inherit; }
svg .tick, svg .axis { fill: var(--soft); }
svg .name { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 11px; }
svg .grid { stroke: var(--line); } svg .base { stroke: var(--mean); }
svg .dot { fill: var(--mark); stroke: var(--card); stroke-width: 1; } svg .bar, svg .cell { fill: var(--mark); }
svg .line { fill: none; stroke: var(--mark); stroke-width: 2.2; }
svg .case { fill: none; stroke: var(--mark); stroke-width: 1; opacity: 0.45; }
svg line.mean { stroke: var(--mean); stroke-width: 1.5; }
svg line.limit { stroke: var(--limit); stroke-dasharray: 5 4; }
svg text.limit { fill: var(--limit); } svg text.mean { fill: var(--soft); }
svg .dot:hover, svg .bar:hover, svg .cell:hover { stroke: var(--text); stroke-width: 1.5; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 22px 26px;
  margin-top: 14px; }
figure { margin: 0; } figcaption { font-size: 13px; margin-bottom: 6px; }
figcaption .soft { display: block; }
.strip { display: grid; gap: 3px; align-items: center; }
.strip.of1 { grid-template-columns: 92px minmax(0, 1fr); }
.strip.of2 { grid-template-columns: 92px repeat(2, minmax(0, 1fr)); }
.strip.of3 { grid-template-columns: 92px repeat(3, minmax(0, 1fr)); }
.strip.of4 { grid-template-columns: 92px repeat(4, minmax(0, 1fr)); }
.strip span { font-size: 12px; color: var(--soft); }
.strip img { width: 100%; display: block; border-radius: 3px; } .small img { image-rendering: pixelated; }
"""
