"""The page /alerts: meaning and runbook of each alert. Links of firing alerts lead here."""

from __future__ import annotations

import html
import re

from koopmon.telemetry.alerts import ALERTS, Alert

STYLE = (
    ":root{color-scheme:light dark}body{font:1rem/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;"
    "padding:0 1rem}code,pre{font-size:.9em}pre{white-space:pre-wrap;overflow-wrap:anywhere}dt{font-weight:600}"
    "dd{margin:0 0 .6rem}section{border-top:1px solid;padding-top:.5rem}section:target{border-top-width:4px}"
)


def alerts_page() -> str:
    """HTML with one section and one anchor for each alert of the table."""
    index = "".join(
        f'<li><a href="#{alert.anchor}">{alert.name}</a>: {html.escape(_plain(alert.summary))}</li>' for alert in ALERTS
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>koopmon alerts</title><style>{STYLE}</style></head>\n<body><main><h1>koopmon alerts</h1>"
        f'<nav aria-label="Alerts"><ul>{index}</ul></nav>\n{"".join(map(_section, ALERTS))}</main>'
        "</body></html>\n"
    )


def _section(alert: Alert) -> str:
    parts = (("What it means", alert.means), ("What to look at", alert.look), ("What to do", alert.do))
    told = "".join(f"<dt>{title}</dt><dd>{_inline(text)}</dd>" for title, text in parts)
    times = f"after {alert.for_seconds} s" if alert.for_seconds else "at once"
    kept = f", kept for {alert.keep_firing_seconds} s" if alert.keep_firing_seconds else ""
    return (
        f'<section id="{alert.anchor}"><h2>{alert.name}</h2><p>{alert.severity}, {times}{kept}</p>'
        f"<dl>{told}</dl><pre><code>{html.escape(alert.expr)}</code></pre></section>\n"
    )


def _inline(markdown: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(markdown))


def _plain(template: str) -> str:
    """Replace the templates of a summary by words: `{{ $labels.run }}` becomes "the run"."""
    return re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"the \1", template)
