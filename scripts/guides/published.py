"""`docs/published.md`: predicted decode rates beside published ones."""

import json

from benchmarks.predict_published import DATA, OUTLIER_PCT, Row, cause, predict_all, summary


def published_page() -> str:
    """The whole page."""
    content = json.loads(DATA.read_text("utf-8"))
    rows = predict_all(content)
    whole = summary(rows)
    rule = "\n".join(f"- {line}" for line in content["rule"])
    excluded = "\n".join(f"| {one['what']} | {one['why']} |" for one in content["excluded"])
    table = "\n".join(
        _row(row, given["source"]) for row, given in zip(rows, content["rows"], strict=True)
    )
    return f"""# Published measurements

{whole["n"]} published decode rates beside what `loadmaster plan` predicts from tables of nominal bandwidths, without a
measurement on the machine: **median error {whole["median"]} %, 90th percentile {whole["p90"]} %**. Nothing is fitted to a
row. `loadmaster doctor --measure` replaces the table by a machine's own rates.

| | rows | median error | 90th percentile |
|---|---|---|---|
{_groups(rows)}

## Where the error is from

{_causes(rows)}

## The rule

{rule}

## Rows

| machine and model | published, tok/s | predicted | error | source |
|---|---|---|---|---|
{table}

## Left out

| what | why |
|---|---|
{excluded}

---

Written by `python -m scripts.guides` from `benchmarks/data/published.json`; `python -m benchmarks.predict_published`
prints the same figures.
"""


def _groups(rows: list[Row]) -> str:
    lines = []
    for kind in dict.fromkeys(row.kind for row in rows):
        figures = summary(row for row in rows if row.kind == kind)
        lines.append(f"| {kind} | {figures['n']} | {figures['median']} % | {figures['p90']} % |")
    return "\n".join(lines)


def _causes(rows: list[Row]) -> str:
    outliers = [row for row in rows if abs(row.error_pct) > OUTLIER_PCT]
    head = f"{len(outliers)} rows are off by more than {OUTLIER_PCT} %:\n"
    lines = [
        f"- {reason}: " + ", ".join(row.label for row in outliers if cause(row) == reason)
        for reason in dict.fromkeys(map(cause, outliers))
    ]
    return "\n".join([head, *lines])


def _row(row: Row, source: str) -> str:
    predicted = "does not fit" if row.predicted_tok_s is None else f"{row.predicted_tok_s:.1f}"
    return (
        f"| {row.label} | {row.measured_tok_s:g} | {predicted} | {row.error_pct:+.0f} % "
        f"| [page]({source}) |"
    )
