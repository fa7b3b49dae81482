"""How the report looks: one style sheet, light and dark.

Knows colours and sizes. The decision worth arguing about: no script and no font is fetched, so the
page looks the same in ten years and behind any firewall.
"""

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b2330; --soft: #5d6878; --line: #dfe3ea;
  --card: #f6f7fa; --page: #ffffff; --a: #2457c5; --b: #0b8377; --c: #7c3fb8; --base: #c0560b;
  --heat: 36 87 197; --warn: #fff4e2; --warnline: #d98a1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa5b5; --line: #303744;
  --card: #1b212b; --page: #12161d; --a: #86a8ff; --b: #4fd1c0; --c: #c79bf5; --base: #f0a05a;
  --heat: 134 168 255; --warn: #2f2615; --warnline: #b57a22; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 52rem; margin: 2.5rem auto 4rem; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .25rem; }
p.note { color: var(--soft); margin: .2rem 0 1rem; max-width: 46rem; }
p.warning { background: var(--warn); border-left: 4px solid var(--warnline); margin: .75rem 0;
  padding: .6rem .9rem; border-radius: 0 6px 6px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem 1rem; color: var(--soft); font-size: .85rem; }
.cards b { display: block; color: var(--ink); font-size: 1.45rem; line-height: 1.35; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.pair figure, .maps figure { min-width: 0; }
.pair figcaption { display: grid; grid-template-columns: repeat(2, auto); padding-left: 1rem;
  justify-content: start; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .92rem; }
.wide { overflow-x: auto; }
th, td { text-align: right; padding: .3rem .55rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; white-space: normal; }
tr.base td { color: var(--base); } td.bar { width: 34%; }
td.bar i { display: block; height: .7rem; border-radius: 2px; background: var(--a); }
table.facts th, table.facts td { text-align: left; vertical-align: top; white-space: normal; }
table.facts th { color: var(--soft); font-weight: 500; width: 12rem; }
table.facts td, code, pre { overflow-wrap: anywhere; }
code, pre { font: .85rem/1.5 ui-monospace, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; white-space: pre-wrap; }
figure { margin: .5rem 0 0; } figure > svg { width: 100%; height: auto; display: block; }
figcaption { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; color: var(--soft);
  font-size: .85rem; padding-left: 3.2rem; }
figcaption svg { width: 28px; height: 10px; margin-right: .4rem; }
svg text { fill: var(--soft); font-size: 12px; font-family: system-ui, sans-serif; }
svg text.axis { font-size: 12.5px; } figure + p.note, .cards + p.note { margin-top: .8rem; }
.grid { stroke: var(--line); } .tick { stroke: var(--soft); }
.line { fill: none; stroke-width: 2; } .dashed { stroke-dasharray: 5 4; }
.error { fill: none; stroke-width: 1.4; opacity: .75; }
.a { stroke: var(--a); } .b { stroke: var(--b); } .c { stroke: var(--c); }
.base { stroke: var(--base); }
.dot { stroke: var(--page); stroke-width: 1; } .dot.a { fill: var(--a); }
.dot.b { fill: var(--b); } .dot.c { fill: var(--c); } .dot.base { fill: var(--base); }
svg text.name { stroke: none; font-weight: 600; } .name.a { fill: var(--a); }
svg text.name.a { fill: var(--a); } svg text.name.base { fill: var(--base); }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr));
  gap: 1rem 1.25rem; }
.maps figcaption { padding: 0; font-size: .8rem; }
svg.heat { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 3px;
  margin-bottom: 2px; }
.key { display: inline-flex; vertical-align: -2px; margin: 0 .35rem; }
.key i { width: 1.1rem; height: .8rem; } details summary { cursor: pointer; color: var(--soft); }
""" + "".join(
    f".s{i} {{ fill: rgb(var(--heat) / {alpha}); background: rgb(var(--heat) / {alpha}); }}\n"
    for i, alpha in enumerate((0.03, 0.14, 0.26, 0.39, 0.53, 0.68, 0.84, 1.0))
)
