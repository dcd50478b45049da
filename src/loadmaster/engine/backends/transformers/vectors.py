"""An open model that makes vectors: whole prompts side by side, of which nothing is kept."""

import gc
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import AttentionInterface

from loadmaster.engine.backends.transformers import attention, cuda
from loadmaster.engine.backends.transformers.attention import PromptAttention, StepCutError
from loadmaster.engine.backends.transformers.opened import fix_rotary, windows_of
from loadmaster.engine.backends.transformers.packing import PackedStep, Part
from loadmaster.engine.backends.transformers.weights import bytes_by_device
from loadmaster.engine.types import SequenceWork
from loadmaster.errors import EngineError, EngineRefusedError
from loadmaster.model.checkpoint import CheckpointSpec
from loadmaster.model.types import Pooling
from loadmaster.plan.types import BufferSizes, TransformersSettings
from loadmaster.units import Bytes


class VectorModel:
    """Owns a model of transformers; its output matrix is loaded and not used."""

    def __init__(
        self, model: Any, spec: CheckpointSpec, settings: TransformersSettings, pooling: Pooling
    ) -> None:
        """Raises EngineRefusedError: the model attends as no text is written."""
        self._model = model
        self.pooling = pooling
        self.n_seq_max = settings.n_seq_max
        self.n_ubatch = settings.n_ubatch
        self.n_vocab = int(model.get_input_embeddings().weight.shape[0])
        self.n_embd = spec.n_embd
        self.device = model.get_input_embeddings().weight.device
        self._attention = PromptAttention(windows_of(spec), plain=settings.attention == "eager")
        AttentionInterface.register(attention.NAME, self._attention.attend)
        fix_rotary(model, settings.n_ubatch)
        try:
            self._hidden(PackedStep([_prompt(0, (0,))], prompts=True))
        except (RuntimeError, MemoryError) as error:
            raise EngineRefusedError(
                f"the engine cannot open the model: {cuda.words_of(error)}",
                hint=cuda.hint_of(error),
            ) from None

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The vector of each prompt, not scaled.

        Raises:
            EngineError: the step failed, was interrupted, or is larger than it may be.
        """
        n_tokens = sum(map(len, prompts))
        if not all(prompts) or len(prompts) > self.n_seq_max or n_tokens > self.n_ubatch:
            raise EngineError(
                f"{len(prompts)} prompts of {n_tokens} tokens in a step of {self.n_seq_max} prompts"
                f" and n_ubatch {self.n_ubatch}"
            )
        work = [_prompt(index, tuple(prompt)) for index, prompt in enumerate(prompts)]
        step = PackedStep(work, prompts=True)
        try:
            hidden = self._hidden(step)
        except StepCutError:
            raise EngineError("the step was interrupted") from None
        except (RuntimeError, MemoryError) as error:
            raise EngineError(
                f"the engine failed a step: {cuda.words_of(error)}", hint=cuda.hint_of(error)
            ) from None
        with torch.inference_mode():
            return [self._pooled(hidden, part).tolist() for part in step.parts]

    def _hidden(self, step: PackedStep) -> Any:
        """What the last layer says of each token."""
        self._attention.begin(step)
        inputs = step.inputs(self.device)
        del inputs["logits_to_keep"]
        with torch.inference_mode():
            return self._model.base_model(**inputs).last_hidden_state[0]

    def _pooled(self, hidden: Any, part: Part) -> Any:
        rows = hidden[part.row : part.row + part.n_tokens]
        if self.pooling == "mean":
            return rows.float().mean(0)
        return (rows[-1] if self.pooling == "last" else rows[0]).float()

    def cut(self, *, now: bool) -> None:
        """End steps at their next layer, or no longer."""
        self._attention.cut = now

    def commit_peak(self) -> None:
        """The longest prompt, as far as time is left for it."""
        with suppress(StepCutError):
            self._hidden(PackedStep([_prompt(0, (0,) * self.n_ubatch)], prompts=True))

    def buffers(self) -> tuple[BufferSizes, ...]:
        """Weights by device, as they are."""
        return tuple(
            BufferSizes(
                device=cuda.device_id(device),
                model_bytes=Bytes(size),
                context_bytes=Bytes(0),
                compute_bytes=Bytes(0),
            )
            for device, size in sorted(bytes_by_device(self._model).items())
        )

    def close(self) -> None:
        """Free everything."""
        self._model = None
        AttentionInterface.register(attention.NAME, attention.closed)
        gc.collect()
        cuda.release()


def _prompt(index: int, tokens: tuple[int, ...]) -> SequenceWork:
    return SequenceWork(seq_id=index, tokens=tokens, position=0, sample=False)
