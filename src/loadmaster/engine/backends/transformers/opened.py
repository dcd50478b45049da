"""An open model with its slots: steps in, logits out."""

import gc
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface

from loadmaster.engine.backends.transformers import attention, cuda
from loadmaster.engine.backends.transformers.attention import SlotAttention, StepCutError
from loadmaster.engine.backends.transformers.environment import keep_scratch
from loadmaster.engine.backends.transformers.packing import PackedStep, check_work
from loadmaster.engine.backends.transformers.slots import Slots
from loadmaster.engine.backends.transformers.weights import bytes_by_device
from loadmaster.engine.types import SequenceWork
from loadmaster.errors import EngineError, EngineRefusedError
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.types import LayerKind
from loadmaster.plan.types import BufferSizes, TransformersSettings
from loadmaster.units import Bytes


class OpenModel:
    """Owns a model of transformers and the cells of its sequences."""

    def __init__(
        self,
        model: Any,
        spec: CheckpointSpec,
        settings: TransformersSettings,
        name: str = attention.NAME,
    ) -> None:
        """`name` is that of its attention, one for each open model.

        Raises:
            EngineRefusedError: there is no memory for the cells.
        """
        self._model = model
        self.n_seq_max = settings.n_seq_max
        self.n_ctx_seq = settings.n_ctx // settings.n_seq_max
        self.n_ubatch = settings.n_ubatch
        self.n_vocab = int(model.get_output_embeddings().weight.shape[0])
        self.device = model.get_input_embeddings().weight.device
        self.slots = Slots(
            n_slots=self.n_seq_max,
            n_cells=self.n_ctx_seq,
            windows=windows_of(spec),
            type_k=settings.type_k,
            type_v=settings.type_v,
        )
        self._attention = SlotAttention(
            self.slots, windows_of(spec), plain=settings.attention == "eager"
        )
        self._name = name
        AttentionInterface.register(name, self._attention.attend)
        if name != attention.NAME:
            model.set_attn_implementation(name)
        fix_rotary(model, self.n_ctx_seq)
        self._make_slots()

    def _make_slots(self) -> None:
        """One token through the model: every layer's cells are allocated as it comes by."""
        try:
            self.logits(PackedStep([filler(0, 1, 0)]))
        except (RuntimeError, MemoryError) as error:
            raise EngineRefusedError(
                f"the engine cannot open the model: {cuda.words_of(error)}",
                hint=cuda.hint_of(error),
            ) from None
        self.slots.clear()

    # -- steps

    def step(self, work: Sequence[SequenceWork]) -> tuple[PackedStep, Any] | None:
        """Feed a step; None when it was cut.

        Raises:
            EngineError: it failed.
        """
        check_work(work, self.slots.n_slots, self.slots.n_cells)
        packed = PackedStep(work)
        for part in work:
            self.slots.begin(part.seq_id, part.position + len(part.tokens))
        try:
            logits = self.logits(packed)
        except StepCutError:
            return None
        except (RuntimeError, MemoryError) as error:
            raise EngineError(
                f"the engine failed a step: {cuda.words_of(error)}", hint=cuda.hint_of(error)
            ) from None
        for part in work:
            self.slots.written(part.seq_id, part.position + len(part.tokens))
        return packed, logits

    def logits(self, step: PackedStep) -> Any:
        """A row for each output of the step."""
        self._attention.begin(step)
        keep_scratch(len(step.tokens))
        with torch.inference_mode():
            return self._model(**step.inputs(self.device)).logits[0]

    def cut(self, *, now: bool) -> None:
        """End steps at their next layer, or no longer."""
        self._attention.cut = now

    # -- what it takes

    def buffers(self) -> tuple[BufferSizes, ...]:
        """Weights and cells by device, as they are."""
        weights, cells = bytes_by_device(self._model), self.slots.bytes_by_device()
        return tuple(
            BufferSizes(
                device=cuda.device_id(device),
                model_bytes=Bytes(weights.get(device, 0)),
                context_bytes=Bytes(cells.get(device, 0)),
                compute_bytes=Bytes(0),  # made and dropped in every step
            )
            for device in sorted({*weights, *cells})
        )

    def close(self) -> None:
        """Free everything."""
        self._model = None
        self._attention = None  # type: ignore[assignment]
        self.slots = None  # type: ignore[assignment]
        AttentionInterface.register(self._name, attention.closed)
        gc.collect()
        cuda.release()


def filler(seq_id: int, n_tokens: int, position: int) -> SequenceWork:
    """Tokens that mean nothing."""
    return SequenceWork(seq_id=seq_id, tokens=(0,) * n_tokens, position=position, sample=True)


def windows_of(spec: CheckpointSpec) -> list[int | None]:
    """The window of each layer, as planned."""
    return [spec.n_swa if layer.kind is LayerKind.SWA else None for layer in spec.layers]


def fix_rotary(model: Any, n_ctx_seq: int) -> None:
    """Positions are turned alike in every step, whoever shares it.

    `dynamic` and `longrope` choose their frequencies by the longest sequence of a step: another
    request would change the meaning of cells that are there. As in llama.cpp, n_ctx decides.

    Raises:
        EngineRefusedError: the frequencies change with every token.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if kind == "longrope":
            _fix_longrope(module, n_ctx_seq)
        elif isinstance(kind, str) and "dynamic" in kind:
            most = int(module.max_seq_len_cached)
            if n_ctx_seq > most:
                raise EngineRefusedError(
                    f"the model stretches its positions beyond {most} tokens anew with each one",
                    hint=f"take at most `--ctx {most}`",
                )


def _fix_longrope(module: Any, n_ctx_seq: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    original = int(module.config.rope_parameters["original_max_position_embeddings"])
    if n_ctx_seq > original:
        make, device = ROPE_INIT_FUNCTIONS["longrope"], module.inv_freq.device
        frequencies, _ = make(module.config, device, seq_len=original + 1)
        module.inv_freq.copy_(frequencies)
    module.rope_type = "default"  # what would choose again looks at this
