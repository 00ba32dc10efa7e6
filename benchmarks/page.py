"""Put the figures of `docs/benchmarks/*.json` into docs/benchmarks.md: `python -m benchmarks.page`.

What stands between `<!-- results: NAME -->` and `<!-- end -->` is written anew from NAME.json: where it was measured,
its tables, and a plot where the benchmark gives one. Everything else on the page is prose and stays.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.report import console, shown

PAGE = Path("docs/benchmarks.md")
RESULTS = Path("docs/benchmarks")
_REGION = re.compile(r"(<!-- results: ([a-z0-9_-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_OURS, _PEER = "#1f6feb", "#b6bec9"


def main() -> None:
    """Rewrite the page; a region whose results are missing keeps what it has."""

    def region(match: re.Match[str]) -> str:
        source = RESULTS / f"{match[2]}.json"
        if not source.exists():
            console.print(f"no results for {match[2]}: its figures stay as they are")
            return match[0]
        return f"{match[1]}{section(match[2], json.loads(source.read_text()))}{match[3]}"

    PAGE.write_text(_REGION.sub(region, PAGE.read_text()))


def section(name: str, results: dict[str, Any]) -> str:
    """Markdown of one benchmark's results."""
    parts = [_machine(results["machine"])]
    if results.get("charts"):
        image = RESULTS / f"{name}.svg"
        _draw(results["charts"], image)
        parts.append(f"![{name}: bars of the figures below]({RESULTS.name}/{image.name})")
    parts += [_markdown(table) for table in results.get("tables", [])]
    return "\n" + "\n\n".join(parts) + "\n\n"


def _machine(about: dict[str, Any]) -> str:
    packages = ("torch", "transformers", "redis")
    versions = ", ".join(f"{package} {about[package]}" for package in packages if package in about)
    return (
        f"Measured on {about['cores']} cores of {about['cpu']} ({', '.join(about['isa'])}), {about['memory_gib']} GiB; "
        f"Python {about['python']}, {versions}."
    )


def _markdown(table: dict[str, Any]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    columns = table["columns"]
    rule = "|---|" + "---:|" * (len(columns) - 1)
    return "\n".join([f"**{table['title']}**", "", line(columns), rule, *map(line, table["rows"])])


def _draw(charts: list[dict[str, Any]], path: Path) -> None:
    """Small multiples side by side: one panel per figure, one bar per contestant, ours coloured."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = path.stem  # the same figures draw the same file
    from matplotlib import pyplot as plt

    height = 0.6 + 0.28 * max(len(chart["bars"]) for chart in charts)
    figure, panels = plt.subplots(1, len(charts), figsize=(2.4 * len(charts) + 1.0, height), squeeze=False)
    for place, (chart, panel) in enumerate(zip(charts, panels[0], strict=True)):
        names, values = list(chart["bars"]), list(chart["bars"].values())
        peers = any(name.startswith("penstock") for name in names)
        colors = [_PEER if peers and not name.startswith("penstock") else _OURS for name in names]
        panel.bar_label(panel.barh(names, values, color=colors), fmt=shown, padding=2, fontsize=7)
        panel.invert_yaxis()
        panel.margins(x=0.25)
        panel.set_title(chart["title"], fontsize=9)
        panel.tick_params(left=False, labelleft=place == 0, bottom=False, labelbottom=False, labelsize=8)
        for spine in panel.spines.values():
            spine.set_visible(False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
