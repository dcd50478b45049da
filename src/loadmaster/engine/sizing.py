"""Sizes from the engine itself, for a machine that need not be this one.

A child process loads the build with virtual devices made by the target's rules, and sizes without
allocating. It is a child because enumerating CUDA devices would make a context on each card.
"""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from loadmaster.engine.process import Engine
from loadmaster.engine.skeleton import write_skeleton
from loadmaster.engine.types import EngineBuild, VirtualDevice
from loadmaster.machine.types import Gpu
from loadmaster.model.types import ModelSpec
from loadmaster.plan.types import EngineSettings, Sizing, SizingFailure
from loadmaster.units import GIB, Bytes, format_size

# A dry run really allocates recurrent state, in the sizing child.
RECURRENT_LIMIT_BYTES = Bytes(1 * GIB)
_F32_BYTES = 4


class Sizer:
    """A sizing child; its devices have the ids `gpu:0`, `gpu:1` … that the settings name."""

    def __init__(
        self,
        build: EngineBuild,
        devices: Sequence[Gpu | VirtualDevice],
        *,
        backend: str = "llamacpp",
    ) -> None:
        self._build = build
        self._devices = tuple(
            VirtualDevice(id=device.id, total_bytes=device.total_bytes, rules=device.rules)
            for device in devices
        )
        self._backend = backend
        self._engine: Engine | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="loadmaster-")
        self._skeletons: dict[tuple[object, ...], Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sizes(
        self, model: ModelSpec, settings: Iterable[EngineSettings]
    ) -> dict[EngineSettings, Sizing | SizingFailure]:
        """Size each of the settings; model bytes on the host are those of `load_mode` none.

        Raises:
            EngineError: the sizing child died; there are no sizes.
        """
        return {item: self._size(model, item) for item in settings}

    def _size(self, model: ModelSpec, settings: EngineSettings) -> Sizing | SizingFailure:
        state = recurrent_bytes(model, settings.n_seq_max)
        if state > RECURRENT_LIMIT_BYTES:
            return SizingFailure(
                reason=f"a dry run would allocate {format_size(state)} of recurrent state, "
                f"the limit is {format_size(RECURRENT_LIMIT_BYTES)}"
            )
        sizing = self._child().size(self._skeleton(model), settings)
        if isinstance(sizing, SizingFailure):
            # The vocabulary may matter to an architecture: the whole header decides.
            return self._child().size(self._skeleton(model, keep_tokenizer=True), settings)
        return sizing

    def _child(self) -> Engine:
        if self._engine is None:
            self._engine = Engine.start(self._build, devices=self._devices, backend=self._backend)
        return self._engine

    def _skeleton(self, model: ModelSpec, *, keep_tokenizer: bool = False) -> Path:
        if self._backend == "fake":
            return model.path  # its sizes are made from the size of the file
        key = (*model.files, keep_tokenizer)
        if key not in self._skeletons:
            path = Path(self._folder.name) / f"{len(self._skeletons)}.gguf"
            write_skeleton(model, path, keep_tokenizer=keep_tokenizer)
            self._skeletons[key] = path
        return self._skeletons[key]

    def close(self) -> None:
        """End the child and remove the skeletons. Idempotent."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._folder.cleanup()


def recurrent_bytes(model: ModelSpec, n_seq_max: int) -> Bytes:
    """State of recurrent layers: a row of F32 for each sequence (llama-memory-recurrent)."""
    width = sum(layer.recurrent_r_width + layer.recurrent_s_width for layer in model.layers)
    return Bytes(width * _F32_BYTES * max(1, n_seq_max))
