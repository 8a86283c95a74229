"""What the reports of the benchmarks have in common: differences with their intervals, and tables in a page."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t

from impact_optim.experiments.results import spread


def difference(a: Sequence[float], b: Sequence[float], comparisons: int = 1) -> tuple[float, float]:
    """Mean of a - b, paired by seed, and half of its 95% interval.

    Args:
        a, b: in the order of the seeds, at least two of each.
        comparisons: how many the table makes; all of its intervals together hold at 95% then (Bonferroni).
    """
    pairs = [x - y for x, y in zip(a, b, strict=True)]
    quantile = float(t.ppf(1 - 0.05 / (2 * comparisons), len(pairs) - 1))
    return fmean(pairs), quantile * stdev(pairs) / math.sqrt(len(pairs))


def signed(mean: float, half: float, digits: int = 1) -> str:
    """A difference and half of its interval, bold where the interval leaves out 0."""
    text = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    return f"**{text}**" if abs(mean) > half else text


def shown(values: Iterable[float], digits: int = 1) -> str:
    """Mean ± standard deviation over the seeds."""
    return f"{spread(values):.{digits}f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, whose header is the first row."""
    header, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body))


def filled(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page with new tables between `<!-- table NAME -->` and `<!-- end -->`; its words stay."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n\n{tables[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def report(
    description: str | None, page: Path, tables: Mapping[str, Callable[[], str]], draw: Callable[[], None]
) -> None:
    """The program of a report: fills a page and draws its pictures, or prints tables."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", nargs="+", choices=tables, help="show these tables instead")
    args = parser.parse_args()
    for name in args.print or ():
        print(f"{name}\n\n{tables[name]()}\n")
    if not args.print:
        page.write_text(filled(page.read_text(), tables))
        draw()
