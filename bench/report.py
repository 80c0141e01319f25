"""Turn bench/results/<device>/<bench>.json into Markdown tables, in place in the README.

    python bench/report.py                          # print every table
    python bench/report.py --write README.md        # refresh the marked tables of files
    python bench/report.py --check README.md        # exit 1 where a marked table is stale

A marked table stands between `<!-- bench: <device>/<bench> [<metric>] [cases <prefix>] -->` and
`<!-- /bench -->`: rows are cases, columns implementations, and the last column says how many times
better aidx is than the best of the others (above 1 is better, whichever way the unit points).
"""

import argparse
import json
import pathlib
import re
import sys

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
MARK = re.compile(
    r"(<!-- bench: (?P<file>\S+)(?: \[(?P<metric>[^\]]+)\])?(?: cases (?P<prefix>\S+))? -->\n)"
    r".*?(<!-- /bench -->)",
    re.DOTALL,
)


def load(name: str, results: pathlib.Path = RESULTS) -> dict:
    """The JSON of `<device>/<bench>`: meta and rows."""
    path = results / f"{name}.json"
    if not path.is_file():
        known = sorted(
            p.relative_to(results).with_suffix("").as_posix() for p in all_files(results)
        )
        raise FileNotFoundError(f"no results {name!r}; there are {known}")
    return json.loads(path.read_text())


def all_files(results: pathlib.Path = RESULTS) -> list[pathlib.Path]:
    """Every result file, sorted."""
    return sorted(results.glob("*/*.json"))


def higher_is_better(unit: str) -> bool:
    """Rates and shares grow with quality; times and bytes shrink.

    >>> [higher_is_better(u) for u in ("tokens/s", "TB/s", "%", "ms", "GiB")]
    [True, True, True, False, False]
    """
    return "/s" in unit or unit in ("%", "x")


def number(value: float) -> str:
    """Three significant digits, thousands separated.

    >>> [number(v) for v in (0.01234, 0.974, 1.5, 23.456, 456.7, 12345.6)]
    ['0.0123', '0.974', '1.50', '23.5', '457', '12,300']
    """
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    if abs(rounded) >= 100:
        return f"{rounded:,.0f}"
    digits = 2 if abs(rounded) >= 1 else 3 if abs(rounded) >= 0.1 else 4
    return f"{rounded:.{digits}f}" if abs(rounded) < 10 else f"{rounded:.1f}"


def ratio(values: dict[str, float], unit: str) -> str:
    """How many times better aidx is than the best other implementation, or nothing to compare."""
    others = [v for name, v in values.items() if name != "aidx" and v > 0]
    mine = values.get("aidx")
    if not others or not mine:
        return ""
    better = mine / max(others) if higher_is_better(unit) else min(others) / mine
    return f"{better:.2f}x"


def table(data: dict, metric: str | None = None, prefix: str = "") -> str:
    """One Markdown table a metric (all metrics unless one is named), then the command."""
    rows = [r for r in data["rows"] if r["case"].startswith(prefix)]
    metrics = list(dict.fromkeys(r["metric"] for r in rows))
    if metric is not None:
        if metric not in metrics:
            raise ValueError(f"no metric {metric!r} among {metrics}")
        metrics = [metric]
    parts = []
    for name in metrics:
        chosen = [r for r in rows if r["metric"] == name]
        unit = chosen[0]["unit"]
        makers = sorted(
            dict.fromkeys(r["implementation"] for r in chosen), key=lambda m: m != "aidx"
        )
        compare = "aidx" in makers and len(makers) > 1
        head = [name if unit in name else f"{name}, {unit}", *makers]
        head += ["aidx / best other"] if compare else []
        lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
        for case in dict.fromkeys(r["case"] for r in chosen):
            values = {r["implementation"]: r["value"] for r in chosen if r["case"] == case}
            line = [case, *(number(values[m]) if m in values else "" for m in makers)]
            lines.append(line + ([ratio(values, unit)] if compare else []))
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    meta = data["meta"]
    versions = ", ".join(f"{k} {v}" for k, v in meta.get("versions", {}).items())
    parts.append(f"{meta['device']}, {meta['date']}, {versions}: `{meta['command']}`")
    return "\n\n".join(parts)


def refresh(text: str, results: pathlib.Path = RESULTS) -> str:
    """`text` with every marked table written anew from the results."""

    def fill(match: re.Match) -> str:
        data = load(match["file"], results)
        body = table(data, match["metric"], match["prefix"] or "")
        return f"{match.group(1)}{body}\n{match.groups()[-1]}"

    return MARK.sub(fill, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="<device>/<bench> to print (default: all)")
    files = dict(nargs="+", type=pathlib.Path, default=[])
    parser.add_argument("--write", help="Markdown files to refresh in place", **files)
    parser.add_argument("--check", help="Markdown files that must be fresh", **files)
    args = parser.parse_args(argv)
    try:
        if args.write or args.check:
            for path in args.write:
                path.write_text(refresh(path.read_text()))
            stale = [path for path in args.check if refresh(path.read_text()) != path.read_text()]
            for path in stale:
                print(f"report: the tables of {path} are stale", file=sys.stderr)
            return int(bool(stale))
        names = args.names or [
            p.relative_to(RESULTS).with_suffix("").as_posix() for p in all_files()
        ]
        for name in names:
            print(f"### {name}\n\n{table(load(name))}\n")
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
