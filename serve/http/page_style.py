"""The look of the page, in the colours the reader's system asks for."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1b1f26;
  --soft: #5a6472; --line: #d9dee5; --accent: #1f5fd0; --on-accent: #fff; --good: #1a7f4b;
  --wait: #9a5b00; --bad: #b3261e; --code: #eef1f5; }
@media (prefers-color-scheme: dark) { :root { --back: #12151a; --card: #1b2027;
  --text: #e8ebf0; --soft: #a3adba; --line: #333b46; --accent: #8ab4ff; --on-accent: #0d1a33;
  --good: #5fd394; --wait: #f0b860; --bad: #ff8a80; --code: #12161c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header, main, footer { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 18px; padding-top: 24px; }
h1 { font-size: 1.5rem; margin: 0; } header p { margin: 0; }
h2 { font-size: 1.05rem; margin: 0 0 12px; }
.chip { display: inline-block; margin-right: 6px; padding: 1px 10px; border-radius: 99px;
  border: 1px solid var(--line); font-size: .85rem; color: var(--soft); }
.chip.ready { color: var(--good); border-color: currentColor; }
.chip.waiting { color: var(--wait); border-color: currentColor; }
.warning { flex-basis: 100%; padding: 8px 12px; border: 1px solid currentColor; border-radius: 8px;
  color: var(--wait); font-size: .9rem; overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: minmax(280px, 1fr) 2fr; gap: 16px;
  padding-top: 16px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px; min-width: 0; }
.wide { grid-column: 1 / -1; }
@media (max-width: 760px) { main { grid-template-columns: minmax(0, 1fr); } }
form, label { display: grid; gap: 12px; } label { gap: 4px; font-size: .9rem; }
label[hidden] { display: none; }
input, select, textarea, button { font: inherit; color: inherit; width: 100%; min-width: 0;
  padding: 8px 10px; border: 1px solid var(--line); border-radius: 7px; background: var(--back); }
textarea { font-family: ui-monospace, monospace; font-size: .85rem; resize: vertical; }
button { background: var(--accent); border-color: var(--accent); color: var(--on-accent);
  font-weight: 600; cursor: pointer; }
button:disabled { opacity: .55; cursor: default; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
details summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
details label { margin-top: 8px; }
#summary { margin: -6px 0 0; font-size: .85rem; color: var(--soft); }
#message { margin: 12px 0 0; min-height: 1.5em; font-size: .9rem; color: var(--soft); }
#message.bad { color: var(--bad); }
#stage { position: relative; display: grid; place-items: center; min-height: 240px;
  background: var(--code); border-radius: 8px; overflow: hidden; }
#stage.over { outline: 3px dashed var(--accent); outline-offset: -3px; }
#canvas { display: block; max-width: 100%; max-height: 70vh; }
#hint { position: absolute; margin: 0; color: var(--soft); pointer-events: none; }
#tags { margin-top: 12px; } #tags p { margin: 0 0 6px; overflow-wrap: anywhere; }
#tags b { font-weight: 600; margin-right: 8px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } tbody tr:last-child td { border-bottom: 0; }
#tasks { min-width: 36rem; } #objects { margin-top: 12px; }
#objects tbody tr:hover, #objects tbody tr:focus {
  background: var(--code); }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: 8px; }
pre { background: var(--code); border-radius: 8px; padding: 12px; margin: 8px 0; font-size: .82rem;
  overflow: auto; max-height: 26rem; } #curl { white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-size: .85em; }
a { color: var(--accent); } footer { padding: 16px 20px 32px; color: var(--soft);
  font-size: .85rem; }
"""
