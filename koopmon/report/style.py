"""Style sheet of the report: light and dark mode, widths from 375 px, and print."""

from typing import Final

STYLE: Final = """
:root{color-scheme:light dark;--paper:#fff;--card:#f6f8fa;--ink:#1f2933;--soft:#52606d;--line:#d9dee4;
--link:#0b5cad;--bad:#a8281c;--good:#17733f;--warn:#8a5200}
@media screen and (prefers-color-scheme:dark){
:root{--paper:#14181d;--card:#1c222a;--ink:#e4e8ec;--soft:#a9b4bf;--line:#333c47;
--link:#7cbcf7;--bad:#ff8f80;--good:#6fd79b;--warn:#f0b566}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main,header,footer{max-width:76rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.25rem}
h1{font-size:clamp(1.4rem,4vw,2rem);line-height:1.2;margin:.1rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .5rem;padding-top:.9rem;border-top:1px solid var(--line)}
p{margin:.5rem 0;max-width:48rem}
.kicker{color:var(--soft);font-size:.85rem;letter-spacing:.06em;text-transform:uppercase;margin:0}
.headline{font-size:clamp(1.05rem,2.6vw,1.25rem);line-height:1.45;max-width:52rem;border-left:4px solid var(--mark);
padding-left:.9rem;margin:1rem 0 1.2rem}
.state{display:inline-block;border:1px solid var(--line);border-radius:1rem;padding:.05rem .7rem;font-size:.85rem;
color:var(--soft)}
.note{color:var(--soft);font-size:.92rem}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0;padding:0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.55rem .8rem}
.facts dt{color:var(--soft);font-size:.82rem}
.facts dd{margin:0;font-size:1.1rem;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
figure{margin:1rem 0}
figure img{display:block;width:100%;height:auto}
figcaption{color:var(--soft);font-size:.9rem;max-width:48rem}
.scroll{overflow-x:auto;margin:.8rem 0}
.scroll:focus-visible,pre:focus-visible,summary:focus-visible{outline:2px solid var(--link);outline-offset:2px}
summary{cursor:pointer;color:var(--link)}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.4rem 1rem .4rem 0;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-weight:600;white-space:nowrap}
td.n,th.n{text-align:right;white-space:nowrap}
td.short{white-space:nowrap}
td.why{min-width:17rem}
.good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}.warn{color:var(--warn);font-weight:600}
code,pre{font:.88em/1.5 ui-monospace,Menlo,Consolas,monospace}
pre{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.7rem .9rem;overflow-x:auto;
white-space:pre-wrap;overflow-wrap:anywhere}
footer{color:var(--soft);font-size:.85rem;padding-top:2rem;padding-bottom:3rem;overflow-wrap:anywhere}
@media print{:root{color-scheme:light}body{font-size:10.5pt}main,header,footer{max-width:none;padding:0}
.scroll{overflow:visible}figure,tr,.facts div{break-inside:avoid}h2{break-after:avoid}table{font-size:7.5pt}
th,td,td.short,td.n,thead th{white-space:normal;padding-right:.4rem}td.why{min-width:0}}
"""
