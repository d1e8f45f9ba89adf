# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The report on a model's exits as one HTML page: pictures inside it, no script, nothing from the network.

All text that comes from a model, a file or the user is escaped. The pictures are matplotlib's SVG; their only texts
are numbers, names of exits and labels written here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from nemo_ee.evaluation.exit_report import FULL, ExitReport, PolicyRow
from nemo_ee.text.token_view import escape as printable

# Colour-blind safe (Okabe and Ito), dark enough for lines on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#444444")
# Backgrounds of the text, from the first exit to the last; black text on them.
_SHALLOW, _DEEP = (178, 223, 138), (253, 205, 172)
_VERDICTS = {True: ("good", "#1b7837"), None: ("little", "#8a6d00"), False: ("bad", "#b2182b")}
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.verdict { border-left: .5rem solid; background: #f6f6f6; padding: .7rem 1rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } .facts td { text-align: left; white-space: normal; }
figure { margin: 1rem 0; } figcaption, .note { color: #555; font-size: .9rem; }
svg { width: 100%; height: auto; max-height: 26rem; }
.text { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; background: #fafafa;
        padding: .7rem; border: 1px solid #ddd; }
.text span, .key { border-radius: .2rem; } .key { display: inline-block; padding: 0 .4rem; margin-right: .6rem; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } h2 { break-after: avoid; }
  figure, table, .verdict { break-inside: avoid; } .text, .key { print-color-adjust: exact; } }
""".strip()


def report_page(
    report: ExitReport, *, title: str, facts: Mapping[str, str], certificates: Iterable[Mapping[str, Any]] = ()
) -> str:
    """The page.

    Args:
        report: what was measured.
        title: heading.
        facts: further rows for the table of what was measured.
        certificates: `Certificate.to_mapping` of each certificate of the model.
    """
    kind, colour = _VERDICTS[report.verdict[0]]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict {kind}" style="border-color:{colour}">{escape(report.verdict[1])}</p>',
        "<h2>Policies</h2>",
        _policies(report.policies, "The fastest thresholds within a limit on perplexity, chosen on one half of the "
                  "text and measured on the other. Speed is over full depth, one sequence at a time: in forced "
                  "decoding on this machine, as the times of the parts give it, and the bound, which is the weights "
                  "that full depth reads over those that the policy reads."),
        "<h2>Speed and quality</h2>",
        _picture(_draw_frontier, report, "Speed over full depth against perplexity: one threshold at every exit, and "
                 "the chosen policies. Dashed: the bound."),
        _policies(report.frontier, "One threshold at every exit; 1 is full depth."),
        "<h2>Exits</h2>",
        _exits(report),
        _picture(_draw_exits, report, "Loss and agreement with the full model's most likely token, by depth."),
        "<h2>Calibration</h2>",
        _picture(_draw_calibration, report, "How often an exit agrees with the full model where it is so confident, "
                 "in tenths. On the diagonal its confidence means what it says; a larger point is more tokens."),
        "<h2>Where tokens leave</h2>",
        _picture(_draw_histogram, report, f"Share of tokens by exit, policy: {report.policies[-1].label}."),
        _text(report),
        "<h2>Certificates</h2>",
        _certificates(list(certificates)),
        "<h2>What was measured</h2>",
        _table([[name, value] for name, value in {**facts, **report.facts}.items()], css="facts"),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{_STYLE}\n</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(rows: Sequence[Sequence[str]], heading: Sequence[str] = (), css: str = "") -> str:
    head = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in heading)}</tr>" if heading else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{css}">{head}{body}</table></div>'


def _policies(policies: Sequence[PolicyRow], note: str) -> str:
    measured = any(policy.measured is not None for policy in policies)
    heading = ["policy", "perplexity", "agreement", "depth", *(["speed"] if measured else []), "expected", "bound"]
    rows = []
    for policy in policies:
        numbers = [f"{policy.perplexity:.3f}x", f"{policy.agreement:.1%}", f"{policy.depth:.0%}"]
        numbers += [f"{policy.measured:.2f}x"] if policy.measured is not None else []
        rows.append([policy.label, *numbers, f"{policy.expected:.2f}x", f"{policy.bound:.2f}x"])
    thresholds = "; ".join(
        f"{policy.label}: {', '.join(f'{name} above {value:g}' for name, value in policy.thresholds.items()) or FULL}"
        for policy in policies
        if policy.measured is not None  # the label of the others is their threshold
    )
    return f'{_table(rows, heading)}<p class="note">{escape(note)} {escape(thresholds)}</p>'


def _exits(report: ExitReport) -> str:
    heading = ["exit", "layer", "architecture", "loss", "agreement", "confidence", "cost"]
    rows = [
        [
            exit.name,
            str(exit.layer),
            exit.architecture,
            f"{exit.loss:.3f}",
            f"{exit.agreement:.1%}",
            f"{exit.confidence:.1%}",
            f"{exit.cost:.1%}",
        ]
        for exit in report.exits
    ]
    rows.append(["full model", "", "", f"{report.full_loss:.3f}", "", "", ""])
    note = "Loss in nats per token. Cost: the time of one evaluation over that of a whole token at full depth."
    return f'{_table(rows, heading)}<p class="note">{note}</p>'


def _text(report: ExitReport) -> str:
    names = [exit.name for exit in report.exits]
    colours = dict(zip(names, _backgrounds(len(names)), strict=True))
    keys = "".join(
        f'<span class="key" style="background:{colour}">{escape(name)}</span>' for name, colour in colours.items()
    )
    spans = []
    for token in report.sample:
        text = escape(printable(token.text))
        marked = f'<span style="background:{colours[token.exit]}" title="{escape(token.exit)}">' if token.exit else ""
        spans.append(f"{marked}{text}</span>" if marked else text)
    note = f"Held-out text under the same policy; each token in the colour of the exit it would leave at. {keys}"
    return f'<p class="note">{note}no colour: {FULL}</p><div class="text">{"".join(spans)}</div>'


def _backgrounds(count: int) -> list[str]:
    steps = [index / max(1, count - 1) for index in range(count)]
    mixed = [[round(a + (b - a) * step) for a, b in zip(_SHALLOW, _DEEP, strict=True)] for step in steps]
    return [f"rgb({r},{g},{b})" for r, g, b in mixed]


def _certificates(certificates: Sequence[Mapping[str, Any]]) -> str:
    if not certificates:
        return (
            "<p>None that holds for these files. A certificate bounds a risk of the thresholds on unseen prompts: "
            "<code>examples/megatron_gpt_early_exit_calibrate.py</code>.</p>"
        )
    heading = ["name", "risk", "at most", "with probability", "measured", "mean depth", "prompts"]
    rows = []
    for one in certificates:
        own = one["guarantee"]
        numbers = [own["risk"], f"{own['epsilon']:g}", f"{1 - own['delta']:g}"]
        numbers += [f"{own['empirical_risk']:.3f}", f"{own['mean_depth']:.1f}", str(one["data"]["num_prompts"])]
        rows.append([one["name"], *numbers])
    return _table(rows, heading)


def _picture(draw: Callable[[Any, ExitReport], None], report: ExitReport, caption: str) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The salt keeps the ids of two pictures of one page apart, and makes them the same in every run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": draw.__name__, "font.family": "sans-serif"}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, report)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", svg, count=1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _axes(figure: Any, count: int = 1) -> list[Any]:
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)
    return axes


def _draw_frontier(figure: Any, report: ExitReport) -> None:
    (axes,) = _axes(figure)
    lost = [100 * (row.perplexity - 1) for row in report.frontier]
    axes.plot(lost, [row.expected for row in report.frontier], "o-", color=_COLOURS[0], label="one threshold")
    axes.plot(lost, [row.bound for row in report.frontier], "--", color=_COLOURS[0], alpha=0.6, label="its bound")
    for row, x in zip(report.frontier, lost, strict=True):
        axes.annotate(row.label, (x, row.expected), textcoords="offset points", xytext=(4, 5), fontsize=8)
    axes.plot(
        [100 * (row.perplexity - 1) for row in report.policies],
        [row.measured or row.expected for row in report.policies],
        "s",
        color=_COLOURS[1],
        label="chosen policies",
    )
    axes.axhline(1.0, color="#222222", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=min(0, *lost))
    axes.set_xlabel("perplexity above full depth, % (logarithmic above 1)")
    axes.set_ylabel("times the speed of full depth")
    axes.legend(frameon=False, fontsize=9)


def _draw_exits(figure: Any, report: ExitReport) -> None:
    left, right = _axes(figure, 2)
    for index, kind in enumerate(dict.fromkeys(exit.architecture for exit in report.exits)):
        own = [exit for exit in report.exits if exit.architecture == kind]
        layers, style = [exit.layer for exit in own], {"color": _COLOURS[index % len(_COLOURS)], "label": kind}
        left.plot(layers, [exit.loss for exit in own], "o-", **style)
        right.plot(layers, [100 * exit.agreement for exit in own], "o-", **style)
    left.axhline(report.full_loss, color="#222222", linestyle="--", linewidth=1, label="full model")
    left.set_ylabel("loss, nats per token")
    right.set_ylabel("agreement with the full model, %")
    right.set_ylim(0, 100)
    for axes in (left, right):
        axes.set_xlabel("layer")
        axes.legend(frameon=False, fontsize=9)


def _draw_calibration(figure: Any, report: ExitReport) -> None:
    (axes,) = _axes(figure)
    axes.plot([0, 100], [0, 100], color="#999999", linewidth=0.8)
    for index, exit in enumerate(report.exits):
        colour, total = _COLOURS[index % len(_COLOURS)], sum(one.tokens for one in exit.bins)
        x, y = ([100 * getattr(one, name) for one in exit.bins] for name in ("confidence", "agreement"))
        axes.plot(x, y, color=colour, linewidth=1, alpha=0.7, label=exit.name)
        axes.scatter(x, y, s=[8 + 120 * one.tokens / total for one in exit.bins], color=colour)
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("agreement, %")
    axes.set_box_aspect(1)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))


def _draw_histogram(figure: Any, report: ExitReport) -> None:
    (axes,) = _axes(figure)
    used = {name: 100 * share for name, share in report.histogram.items() if share or name == FULL}
    bars = axes.barh(range(len(used)), list(used.values()), color=_COLOURS[0])
    axes.bar_label(bars, fmt="%.1f %%", padding=3, fontsize=9)
    axes.set_yticks(range(len(used)), list(used))
    axes.invert_yaxis()
    axes.set_xlabel("tokens, %")
    axes.margins(x=0.12)
