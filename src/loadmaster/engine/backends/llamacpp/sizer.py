"""Dry runs: the engine sizes every buffer for some settings and allocates none of them."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from loadmaster.engine.backends.llamacpp.library import Library
from loadmaster.engine.backends.llamacpp.params import context_params, model_params
from loadmaster.errors import EngineRefusedError
from loadmaster.plan.types import DRAFT_STEP_TOKENS, EngineSettings, Sizing, SizingFailure


def _steps(settings: EngineSettings) -> Iterator[EngineSettings]:
    """The settings, and with drafts those of a step of so many tokens: what a prompt streams to a
    GPU is computed on the host there, each token with its row of logits."""
    yield settings
    if settings.n_draft and settings.n_ubatch > DRAFT_STEP_TOKENS:
        width = max(DRAFT_STEP_TOKENS, settings.n_seq_max)
        yield replace(settings, n_batch=width, n_ubatch=width, n_draft=0)


def _largest(sizings: Iterable[Sizing]) -> Sizing:
    """The first, with the largest compute buffer of all on each device."""
    first, *others = sizings
    if not others:
        return first
    rows = []
    for row in first.buffers:
        compute = (one.on(row.device).compute_bytes for one in (first, *others))
        rows.append(replace(row, compute_bytes=max(compute)))
    return replace(first, buffers=tuple(rows))


class DryRuns:
    """Keeps the last model: plans often differ in the context alone."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._key: object = None
        self._model = 0

    def size(self, path: Path, settings: EngineSettings) -> Sizing | SizingFailure:
        """Sizes of all buffers. Recurrent state is really allocated, and freed again."""
        try:
            model = self._model_for(path, settings)
            return _largest(self._with_context(model, each) for each in _steps(settings))
        except EngineRefusedError as error:
            return SizingFailure(reason=error.message)

    def _model_for(self, path: Path, settings: EngineSettings) -> int:
        key = (
            str(path),
            settings.n_gpu_layers,
            settings.layers_per_device,
            settings.op_offload,  # it decides whether a GPU without layers is opened
            settings.overrides,
            settings.use_extra_bufts,
        )
        if key != self._key:
            self.forget()
            params = model_params(self._library, settings, dry_run=True)
            self._model = (
                self._library.api.llama_model_load_from_file(str(path).encode(), params.struct) or 0
            )
            if not self._model:
                raise EngineRefusedError(f"the engine cannot load it: {self._library.error()}")
            self._key = key
        return self._model

    def _with_context(self, model: int, settings: EngineSettings) -> Sizing:
        api = self._library.api
        context = api.llama_init_from_model(model, context_params(self._library, settings).struct)
        if not context:
            raise EngineRefusedError(
                f"the engine cannot open n_ctx {settings.n_ctx}: {self._library.error()}"
            )
        try:
            buffers = self._library.dry_run_buffers(context, settings.n_outputs_max)
            return Sizing(buffers=buffers, n_ctx=api.llama_n_ctx(context))
        finally:
            api.llama_free(context)

    def forget(self) -> None:
        """Free the kept model."""
        if self._model:
            self._library.api.llama_model_free(self._model)
        self._model, self._key = 0, None
