"""How the page looks, on paper, on a phone and in the dark."""

STYLE = """
:root { --ink: #1d1f23; --soft: #5c6370; --paper: #ffffff; --line: #d9dce1; --tint: #f3f5f8;
  --link: #0b57d0; --good: #1a7f37; --bad: #b42318; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a3a8b1; --paper: #191919; --line: #3b3f46; --tint: #24272c;
    --link: #8ab4f8; --good: #57c475; --bad: #ff8a7a; }
  /* White figures turn to the colour of the page; the rotation brings their hues back. */
  .chart { filter: invert(0.902) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 16px; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 8px 0 16px; }
h2 { font-size: 1.25rem; margin: 36px 0 8px; padding-top: 12px;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 20px 0 4px; }
p { max-width: 75ch; margin: 8px 0; }
a { color: var(--link); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0;
  font-size: 0.9rem; }
dt { color: var(--soft); }
dd { margin: 0; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 16px 0 0; font-size: 0.9rem; }
.charts { display: grid; gap: 8px; margin: 8px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.chart { width: 100%; max-width: 540px; height: auto; }
.gallery { display: grid; gap: 14px 12px; margin: 8px 0;
  grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); }
figure { margin: 0; font-size: 0.8rem; line-height: 1.35; }
.texts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); }
.sequence { margin: 0 0 4px; padding: 6px 8px; white-space: pre-wrap; background: var(--tint);
  font: 12px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
.thumbnail { display: block; width: 84px; height: 84px; margin-bottom: 4px;
  image-rendering: pixelated; border: 1px solid var(--line); }
.good, .right { color: var(--good); }
.wrong { color: var(--bad); font-weight: 600; }
code { font: 0.92em/1 ui-monospace, "DejaVu Sans Mono", monospace; white-space: nowrap; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 8px 0; }
th, td { padding: 6px 12px; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 400; }
td ul { margin: 0; padding-left: 18px; }
.warnings { width: 100%; }
.warnings th[scope="row"] { color: var(--bad); width: 20%; }
.warnings td:nth-child(2) { width: 30%; }
.numbers td { text-align: right; font-variant-numeric: tabular-nums; }
.numbers td:first-child { text-align: left; }
.here { background: var(--tint); font-weight: 600; }
@media (max-width: 640px) {
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: 6px; }
  .warnings, .warnings tbody, .warnings tr, .warnings th, .warnings td { display: block;
    width: auto !important; border: 0; padding: 2px 0; }
  .warnings thead { display: none; }
  .warnings tr { padding: 10px 12px; margin: 10px 0; background: var(--tint); }
}
"""
