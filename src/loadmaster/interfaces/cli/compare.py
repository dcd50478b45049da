"""`plan --compare`: a table, a scatter plot, and the one to take."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from loadmaster.errors import UsageError
from loadmaster.interfaces.cli import scatter, svg
from loadmaster.interfaces.cli.progress import TerminalProgress
from loadmaster.interfaces.cli.render import table
from loadmaster.plan.compare import Candidate, Limits, shown
from loadmaster.plan.hf_weights import COMPUTE_BYTES
from loadmaster.plan.quality import Figure
from loadmaster.plan.types import CPU, Plan
from loadmaster.tasks.comparison import Comparison, compare
from loadmaster.tasks.planning import PlanOptions
from loadmaster.tasks.remedies import refusal
from loadmaster.units import format_size

SCHEMA_VERSION = 1


def run(
    models: Sequence[str],
    options: PlanOptions,
    limits: Limits,
    *,
    plot: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Plan, print, and end with an error when nothing keeps the limits."""
    progress = TerminalProgress(quiet=quiet or as_json)
    comparison = compare(models, options, limits, progress.say if _slow(models) else _silent)
    if plot is not None:
        _write(Path(plot), svg.scatter_svg(points(comparison)))
    if not comparison.choice.picked:
        if not as_json:
            click.echo(text(comparison))
            click.echo()
        raise refusal(comparison)
    if as_json:
        click.echo(json.dumps(to_json(comparison), ensure_ascii=False, indent=1))
        return
    click.echo(text(comparison))


def _silent(line: str) -> None:
    """Nobody is told."""


def _slow(models: Sequence[str]) -> bool:
    """Whether headers come over the network, so that a line for each is worth it."""
    return any(model.startswith(("hf:", "https://")) for model in models)


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write `{path}`: {error.strerror}") from None


# ---- text


def text(comparison: Comparison) -> str:
    """Everything that is printed."""
    plotted = scatter.scatter_text(points(comparison))
    blocks = [_headline(comparison), _table(comparison), plotted, *_answer(comparison)]
    return "\n\n".join(block for block in blocks if block)


def _headline(comparison: Comparison) -> str:
    request = comparison.request
    n_ctx = request.workload.n_ctx
    at = f" at n_ctx {n_ctx}" if n_ctx else ""
    caps = ", ".join(f"{device} {format_size(cap)}" for device, cap in request.budget.caps.items())
    return f"{len(comparison.candidates)} plans for {comparison.machine_name}{at} ({caps})"


def marks(comparison: Comparison) -> dict[int, str]:
    """A letter for each candidate that is shown, by its index."""
    kept = {id(one) for one in shown(comparison.candidates)}
    visible = [i for i, one in enumerate(comparison.candidates) if id(one) in kept]
    return {index: _letter(rank) for rank, index in enumerate(visible)}


def _letter(rank: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return letters[rank % len(letters)]


def _table(comparison: Comparison) -> str:
    longest = comparison.limits.goal == "context"
    engines = len({one.engine for one in comparison.candidates}) > 1
    head = [
        "",
        "model",
        "quant",
        "KV",
        "file",
        "on GPU",
        "in RAM",
        "decode",
        "prefill",
        "KL",
        "MMLU",
    ]
    if engines:
        head.insert(3, "engine")
    rows = [[*head, *(["n_ctx"] if longest else []), ""]]
    letters = marks(comparison)
    for index, letter in letters.items():
        one = comparison.candidates[index]
        row = [letter, *_cells(one), *([_n_ctx(one)] if longest else [])]
        if engines:
            row.insert(3, one.engine)
        rows.append([*row, _remark(comparison, index, letters)])
    return table(rows, right=set(range(4 + engines, 11 + longest + engines)))


def _cells(one: Candidate) -> list[str]:
    plan = one.plan
    gpu, ram = one.weights_on(gpu=True), one.weights_on(gpu=False)
    cache = one.type_k if one.type_k == one.type_v else f"{one.type_k}/{one.type_v}"
    decode = _rate(plan.predicted.decode_tok_s) if plan else "–"
    prefill = _rate(plan.predicted.prefill_tok_s) if plan else "–"
    return [
        one.model, one.quantization, cache, format_size(one.file_bytes),
        format_size(gpu) if plan else "–", format_size(ram) if plan else "–", decode, prefill,
        "?" if one.kl is None else f"{one.kl:.4f}", "" if one.mmlu is None else f"{one.mmlu:.1f}",
    ]  # fmt: skip


def _rate(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _n_ctx(one: Candidate) -> str:
    return "" if one.largest_n_ctx is None else str(one.largest_n_ctx)


def _remark(comparison: Comparison, index: int, letters: dict[int, str]) -> str:
    one = comparison.candidates[index]
    if one.plan is None:
        return "does not fit"
    if any(one is picked for picked in comparison.choice.picked):
        return "<- take this"
    beaten_by = comparison.dominated_by[index]
    if beaten_by is None:
        return ""
    return f"beaten by {letters.get(beaten_by, comparison.candidates[beaten_by].quantization)}"


def _answer(comparison: Comparison) -> list[str]:
    lines = []
    for one in comparison.choice.picked:
        assert one.plan is not None
        speed = one.decode_tok_s
        rate = "" if speed is None else f", {_rate(speed)} tok/s"
        longest = f", n_ctx up to {one.largest_n_ctx}" if one.largest_n_ctx else ""
        plain = one.engine == "transformers" and one.type_k in COMPUTE_BYTES
        usual = one.type_k == "f16" or plain
        cache = "" if usual else f" --kv {one.type_k}"
        lines.append(f"take {one.reference}{cache}{rate}{longest}")
    if lines:
        lines.append(f"rule: {comparison.choice.rule}")
    return ["\n".join(lines), "\n".join(notes(comparison))]


def notes(comparison: Comparison) -> list[str]:
    """What a person needs to know to read the figures."""
    candidates = comparison.candidates
    found = [
        "note: KL divergence is from a model's own unquantized weights; measured on "
        f"{' and '.join(_measured_on(candidates)) or 'none of these'}, larger models lose less"
    ]
    models = dict.fromkeys(one.model for one in candidates)
    if len(models) > 1:
        known = [m for m in models if any(one.model == m and one.mmlu for one in candidates)]
        ranked = ", ".join(known) or "none of them"
        found.append(
            "note: KL divergence does not rank different models; published MMLU does, and there is"
            f" some of {ranked}"
        )
    if any(one.engine == "transformers" for one in candidates):
        found.append(
            "note: `file` of safetensors is before they are quantized, which happens at every load;"
            " no engine is asked for their buffers"
        )
    if any(one.kl is None for one in candidates):
        found.append("note: `?` is a quantization or a cache type without a published figure")
    if not comparison.sized:
        found.append("note: compute buffers are bounds: no engine build was asked")
    found += [f"source: {source}" for source in _sources(candidates)]
    return found


def _measured_on(candidates: Sequence[Candidate]) -> list[str]:
    figures = (one.quality.weights_kl for one in candidates)
    return list(dict.fromkeys(figure.measured_on for figure in figures if figure and figure.value))


def _sources(candidates: Sequence[Candidate]) -> list[str]:
    figures = [
        figure
        for one in candidates
        for figure in (one.quality.weights_kl, one.quality.cache_kl, one.quality.mmlu)
        if figure is not None
    ]
    return list(dict.fromkeys(figure.source for figure in figures))


# ---- the plot


def points(comparison: Comparison) -> list[scatter.Point]:
    """Candidates with a speed and a quality, for both plots."""
    picked = {id(one) for one in comparison.choice.picked}
    return [
        scatter.Point(
            letter=letter,
            label=f"{one.model} {one.quantization}",
            speed=one.decode_tok_s,
            kl=one.kl,
            beaten=comparison.dominated_by[index] is not None,
            picked=id(one) in picked,
        )
        for index, letter in marks(comparison).items()
        if (one := comparison.candidates[index]).decode_tok_s and one.kl is not None
    ]


# ---- JSON


def to_json(comparison: Comparison) -> dict[str, Any]:
    """One versioned object: every candidate, also those the table leaves out."""
    picked = {id(one) for one in comparison.choice.picked}
    limits = comparison.limits
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": comparison.machine_name,
        "goal": limits.goal,
        "min_speed": limits.min_speed,
        "max_kl": limits.max_kl,
        "rule": comparison.choice.rule,
        "sized_by_engine": comparison.sized,
        "candidates": [
            {
                **_candidate_json(one),
                "dominated_by": comparison.dominated_by[index],
                "picked": id(one) in picked,
            }
            for index, one in enumerate(comparison.candidates)
        ],
        "notes": [note.removeprefix("note: ") for note in notes(comparison)],
    }


def _candidate_json(one: Candidate) -> dict[str, Any]:
    plan, quality = one.plan, one.quality
    predicted = plan.predicted if plan else None
    return {
        "reference": one.reference,
        "model": one.model,
        "quantization": one.quantization,
        "engine": one.engine,
        "type_k": one.type_k,
        "type_v": one.type_v,
        "file_bytes": one.file_bytes,
        "fits": plan is not None,
        "n_ctx": _planned_n_ctx(plan),
        "largest_n_ctx": one.largest_n_ctx,
        "weights_bytes": {"gpu": one.weights_on(gpu=True), CPU: one.weights_on(gpu=False)},
        "planned_bytes": {device.id: device.planned_bytes for device in one.outcome.devices},
        "decode_tok_s": predicted.decode_tok_s if predicted else None,
        "prefill_tok_s": predicted.prefill_tok_s if predicted else None,
        "bound_by": predicted.bound_by if predicted else None,
        "basis": predicted.basis if predicted else None,
        "kl": one.kl,
        "weights_kl": _figure_json(quality.weights_kl),
        "cache_kl": _figure_json(quality.cache_kl),
        "mmlu": _figure_json(quality.mmlu),
    }


def _planned_n_ctx(plan: Plan | None) -> int | None:
    return None if plan is None else plan.engine.n_ctx // plan.engine.n_seq_max


def _figure_json(figure: Figure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    return {"value": figure.value, "measured_on": figure.measured_on, "source": figure.source}
