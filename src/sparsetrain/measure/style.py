"""The report's style sheet; in Python, so that it needs no packaging of its own."""

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --paper: #ffffff; --ground: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header, main { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 32px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
header p { color: var(--soft); margin: 4px 0 0; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin: 20px 0; }
h2 { font-size: 18px; margin: 0 0 12px; }
h3 { font-size: 15px; margin: 0 0 4px; }
.headline { font-size: 19px; line-height: 1.4; font-weight: 600; margin: 0 0 6px; }
.advice { margin: 0 0 16px; color: var(--soft); font-size: 16px; }
.note { border-left: 3px solid #e07a1f; padding-left: 12px; margin: 12px 0 0; }
.won { display: inline-block; border-radius: 999px; padding: 1px 10px; font-size: 13px; font-weight: 600;
  white-space: nowrap; background: #eef1f4; color: var(--soft); }
.won.sparse { background: #e3f4e8; color: #17672f; }
.won.dense { background: #fdecea; color: #a4211a; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 24px; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: 13px; }
.table { overflow-x: auto; margin-top: 16px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-size: 13px; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th, td { padding: 6px 12px 6px 0; vertical-align: top; }
td { border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
tbody tr:last-child td { border-bottom: 0; }
table.numbers { width: auto; min-width: 420px; }
table.numbers th:not(:first-child), table.numbers td:not(:first-child) { text-align: right; padding-left: 24px; }
table.totals tbody tr:last-child td { font-weight: 600; border-top: 2px solid var(--line); }
table.judgements td:first-child { white-space: nowrap; font-weight: 600; }
table.settings td:first-child { color: var(--soft); width: 220px; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--soft); }
ul { margin: 0; padding-left: 20px; }
li { margin: 4px 0; }
@media (max-width: 560px) { .figures { grid-template-columns: 1fr; } section { padding: 16px; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
