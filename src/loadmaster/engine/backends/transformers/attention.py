"""Attention over slots: the function that transformers calls in every layer of a step.

transformers lets a program register an attention of its own, which then gets every layer's queries,
keys and values. Here the step's tokens are in one row; their keys and values go to their slots, and
each part of the step attends to the cells of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AttentionInterface

from loadmaster.engine.backends.transformers.cells import LayerCells
from loadmaster.engine.backends.transformers.packing import PackedStep, Part
from loadmaster.engine.backends.transformers.slots import Slots
from loadmaster.errors import EngineError, EngineRefusedError

NAME = "loadmaster"
DRAFT_NAME = "loadmaster_draft"
_sdpa = torch.nn.functional.scaled_dot_product_attention


def closed(*_: Any, **__: Any) -> Any:
    """In place of the attention of a model that is not open."""
    raise EngineError("no model is open")


AttentionInterface.register(NAME, closed)  # a model is loaded for an attention that is known


class StepCutError(Exception):
    """The step was interrupted between two layers."""


class SlotAttention:
    """One step's attention, layer by layer. `cut` ends the step at the next layer."""

    def __init__(self, slots: Slots, windows: Sequence[int | None], *, plain: bool) -> None:
        """`windows` are those that were planned; with `plain` products are spelled out."""
        self.cut = False
        self._slots, self._windows, self._plain = slots, tuple(windows), plain
        self._step: PackedStep | None = None

    def begin(self, step: PackedStep) -> None:
        self._step = step

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any,
        scaling: float | None = None, sliding_window: int | None = None,
        softcap: float | None = None, s_aux: Any = None, **others: Any,
    ) -> tuple[Any, None]:  # fmt: skip
        """What transformers' attention functions take and return.

        Raises:
            StepCutError: the step is to end.
            EngineRefusedError: the model wants what these slots do not have.
        """
        if self.cut:
            raise StepCutError
        step = self._step
        assert step is not None
        index: int = module.layer_idx
        check_layer(self._windows, module, sliding_window, attention_mask, others)
        cells = self._slots.layer(index, key, value)
        cells.put_each(step, key[0], value[0])
        weigh = Weighing(scaling, softcap, s_aux, plain=self._plain)
        found = []
        for part in step.parts:
            rows = slice(part.row, part.row + part.n_rows)
            queries = query[0, :, rows]
            if part.n_tokens == 1:
                found.append(weigh.one_each(step, part, queries, cells))
            else:
                seen = cells.feed(part, key[0, :, rows], value[0, :, rows])
                found.append(weigh.chunk(step, part, queries, *seen, cells.window))
        return (found[0] if len(found) == 1 else torch.cat(found))[None], None


class PromptAttention:
    """Attention of whole prompts side by side, of which no cell is kept."""

    def __init__(self, windows: Sequence[int | None], *, plain: bool) -> None:
        self.cut = False
        self._windows, self._plain = tuple(windows), plain
        self._step: PackedStep | None = None

    def begin(self, step: PackedStep) -> None:
        self._step = step

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any,
        scaling: float | None = None, sliding_window: int | None = None,
        softcap: float | None = None, s_aux: Any = None, **others: Any,
    ) -> tuple[Any, None]:  # fmt: skip
        """As `SlotAttention.attend`."""
        if self.cut:
            raise StepCutError
        step = self._step
        assert step is not None
        check_layer(self._windows, module, sliding_window, attention_mask, others)
        weigh = Weighing(scaling, softcap, s_aux, plain=self._plain)
        found = []
        for part in step.parts:
            rows = slice(part.row, part.row + part.n_rows)
            seen = (query[0, :, rows], key[0, :, rows], value[0, :, rows])
            found.append(weigh.chunk(step, part, *seen, self._windows[module.layer_idx]))
        return (found[0] if len(found) == 1 else torch.cat(found))[None], None


def check_layer(
    windows: Sequence[int | None], module: Any, window: int | None, mask: Any,
    others: Mapping[str, Any],
) -> None:  # fmt: skip
    """Raises EngineRefusedError: a layer attends in another way than was planned."""
    index: int = module.layer_idx
    if not getattr(module, "is_causal", True):
        raise EngineRefusedError(
            f"layer {index} attends in both directions: the model reads texts, and writes none",
            hint="take a GGUF of the model for embeddings",
        )
    if index >= len(windows) or window != windows[index]:
        planned = windows[index] if index < len(windows) else "no such layer"
        raise EngineRefusedError(
            f"layer {index} has a window of {window} tokens, planned was {planned}"
        )
    if mask is not None or others.get("position_bias") is not None:
        raise EngineRefusedError(f"layer {index} masks or biases its attention in a way of its own")


class Weighing:
    """How one layer weighs what its tokens see."""

    def __init__(
        self, scaling: float | None, softcap: float | None, sinks: Any, *, plain: bool
    ) -> None:
        self._scaling, self._softcap, self._sinks = scaling, softcap, sinks
        self._plain = plain or softcap is not None or sinks is not None

    def one_each(self, step: PackedStep, part: Part, queries: Any, cells: LayerCells) -> Any:
        """A token of each sequence: the heads that share keys are rows of one product."""
        keys, values, first = cells.seen_by_each(part)
        keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        n_head, n_slots, width = queries.shape
        n_kv = keys.shape[1]
        group = n_head // n_kv
        grouped = queries.transpose(0, 1).reshape(n_slots, n_kv, group, width)
        window = None if cells.is_ring else cells.window
        seen = range(first, first + keys.shape[2])
        mask = step.mask_each(part, window, seen, queries.device)
        if self._plain:
            found = self._spelled_out(grouped, keys, values, mask, (1, n_kv, group, 1))
        else:
            found = _sdpa(grouped, keys, values, attn_mask=mask, scale=self._scaling)
        return found.reshape(n_slots, n_head, -1)

    def chunk(
        self, step: PackedStep, part: Part, queries: Any, keys: Any, values: Any, window: int | None
    ) -> Any:
        """Tokens of one sequence, and all that they see: keys are seen by several heads and copied
        for none."""
        keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        n_head, n_tokens, width = queries.shape
        n_kv = keys.shape[0]
        group = n_head // n_kv
        grouped = queries.reshape(n_kv, group, n_tokens, width)
        keys = keys[:, None].expand(n_kv, group, *keys.shape[1:])
        values = values[:, None].expand(n_kv, group, *values.shape[1:])
        whole = part.end == n_tokens and (window or n_tokens) >= n_tokens
        if whole and not self._plain:
            found = _sdpa(grouped, keys, values, scale=self._scaling, is_causal=True)
            return found.reshape(n_head, n_tokens, -1).transpose(0, 1)
        mask = step.mask_chunk(part, window, queries.device)
        if self._plain:
            found = self._spelled_out(grouped, keys, values, mask, (n_kv, group, 1, 1))
        else:
            found = _sdpa(grouped, keys, values, attn_mask=mask, scale=self._scaling)
        return found.reshape(n_head, n_tokens, -1).transpose(0, 1)

    def _spelled_out(
        self, queries: Any, keys: Any, values: Any, mask: Any, heads: tuple[int, ...]
    ) -> Any:
        """With what torch's own function does not take; `heads` is the shape of one per head."""
        scale = queries.shape[-1] ** -0.5 if self._scaling is None else self._scaling
        scores = queries @ keys.transpose(-1, -2) * scale
        if self._softcap is not None:
            scores = torch.tanh(scores / self._softcap) * self._softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        if self._sinks is not None:  # a score of each head for seeing nothing
            sinks = self._sinks.view(heads).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
        shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype)
        return shares[..., : keys.shape[-2]] @ values
