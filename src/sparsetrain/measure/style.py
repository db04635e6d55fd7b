"""The report's style sheet; in Python, so that it needs no packaging of its own."""

from __future__ import annotations

from sparsetrain.measure.colours import COLOURS, css_name, variables

_MEANINGS = "\n".join(f".{css_name(name)} {{ --c: var(--{css_name(name)}); }}" for name in COLOURS)

STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --paper: #ffffff;
  --ground: #f5f7fa; {variables(dark=False)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e7eb; --soft: #a3aebb; --line: #323c48; --paper: #1b222b;
  --ground: #12171d; {variables(dark=True)} }} }}
{_MEANINGS}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }}
header, main {{ max-width: 1180px; margin: 0 auto; padding: 0 24px; }}
header {{ padding-top: 32px; }}
h1 {{ font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }}
header p {{ color: var(--soft); margin: 4px 0 0; }}
section {{ background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin: 20px 0; min-width: 0; }}
h2 {{ font-size: 18px; margin: 0 0 12px; }}
h3 {{ font-size: 15px; margin: 0 0 4px; }}
.headline {{ font-size: 19px; line-height: 1.4; font-weight: 600; margin: 0 0 6px; }}
.advice {{ margin: 0 0 16px; color: var(--soft); font-size: 16px; }}
.note {{ border-left: 3px solid var(--line); padding-left: 12px; margin: 12px 0 0; color: var(--soft);
  overflow-wrap: anywhere; }}
.won {{ display: inline-block; border-radius: 999px; padding: 0 10px; font-size: 13px; font-weight: 600;
  white-space: nowrap; border: 1px solid var(--line); color: var(--soft); }}
.won.sparse, .won.dense, .won.checkpointing {{ border-color: var(--c); color: var(--c); }}
.bars {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 12px 32px;
  margin: 16px 0; }}
.bars h3 {{ display: flex; justify-content: space-between; align-items: baseline; gap: 8px; margin-bottom: 8px; }}
.bars p, figcaption {{ color: var(--soft); font-size: 13px; margin: 4px 0 0; }}
.bar-row {{ margin: 0 0 8px; }}
.bar-row > div:first-child {{ display: flex; justify-content: space-between; gap: 12px; font-size: 14px; }}
.bar-row b {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
.track {{ display: flex; height: 14px; border-radius: 4px; overflow: hidden; background: var(--ground); }}
.track i {{ display: block; height: 100%; background: var(--c); }}
.legend {{ display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; margin: 6px 0; padding: 0;
  list-style: none; }}
.legend li {{ margin: 0; }}
.legend li::before {{ content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  background: var(--c); margin-right: 6px; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 24px; }}
.figures > * {{ min-width: 0; }}
figure {{ margin: 0; }}
figure img {{ width: 100%; height: auto; display: block; background: #fff; border-radius: 6px; }}
svg {{ width: 100%; height: auto; display: block; }}
svg text {{ fill: var(--soft); font-size: 12px; }}
svg .grid {{ stroke: var(--line); }}
svg .line {{ stroke: var(--c); fill: none; stroke-width: 2; stroke-linejoin: round; }}
svg .dot {{ fill: var(--c); }}
svg .faint {{ opacity: .4; stroke-width: 1.2; }}
.sample {{ border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; margin: 12px 0 0; min-width: 0; }}
.sample h3 {{ font-size: 13px; color: var(--soft); margin: 8px 0 2px; }}
.sample h3.dense, .sample h3.sparse {{ color: var(--c); }}
pre {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, Menlo, Consolas,
  monospace; }}
.sample pre.prompt {{ max-height: 11em; overflow-y: auto; color: var(--soft); }}
.table {{ overflow-x: auto; margin-top: 16px; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th {{ text-align: left; font-size: 13px; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }}
th, td {{ padding: 6px 12px 6px 0; vertical-align: top; }}
td {{ border-bottom: 1px solid var(--line); overflow-wrap: break-word; }}
tbody tr:last-child td {{ border-bottom: 0; }}
table.numbers {{ width: auto; min-width: min(420px, 100%); }}
table.numbers th:not(:first-child), table.numbers td:not(:first-child) {{ text-align: right; padding-left: 24px; }}
table.numbers td:not(:first-child) {{ white-space: nowrap; }}
table.totals tbody tr:last-child td {{ font-weight: 600; border-top: 2px solid var(--line); }}
table.judgements td:first-child {{ white-space: nowrap; font-weight: 600; }}
table.settings td {{ overflow-wrap: anywhere; }}
table.settings td:first-child {{ color: var(--soft); width: 220px; }}
details {{ margin-top: 12px; }}
summary {{ cursor: pointer; color: var(--soft); }}
ul {{ margin: 0; padding-left: 20px; }}
li {{ margin: 4px 0; overflow-wrap: anywhere; }}
@media (max-width: 560px) {{
  header, main {{ padding: 0 12px; }} section {{ padding: 16px 14px; }} h1 {{ font-size: 21px; }}
  table.judgements, table.judgements tbody, table.judgements tr, table.judgements td,
  table.settings, table.settings tbody, table.settings tr, table.settings td {{ display: block; width: auto; }}
  table.judgements thead {{ display: none; }}
  table.judgements td, table.settings td {{ border: 0; padding: 0 0 4px; }}
  table.judgements tr, table.settings tr {{ border-bottom: 1px solid var(--line); padding: 8px 0; }}
  table.numbers th:not(:first-child), table.numbers td:not(:first-child) {{ padding-left: 12px; }}
}}
@media print {{ body {{ background: #fff; }} section {{ break-inside: avoid; }} }}
"""
