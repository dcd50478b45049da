"""Which file of a repository is meant: by path, by quantization, or the usual one. Pure."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.model.reference import HubReference, is_safe_file_path

USUAL = "Q4_K_M"  # what llama.cpp and Ollama take when nothing is asked for

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_LABEL = re.compile(
    r"(?:^|[-._ ])((?:UD-)?(?:I?Q[1-8](?:_[A-Z0-9]+)*|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16"
    r"|FP?16|FP?32))(?=$|[-. ])",
    re.IGNORECASE,
)
_MAX_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoFile:
    """A file of a repository as its listing has it."""

    path: str
    size_bytes: int
    sha256: str | None  # of large files; the listing's own word


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One model of a repository: a GGUF file, or all of its shards in order."""

    label: str  # the quantization by the file's name; the name where it has none
    files: tuple[RepoFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def label_of(path: str) -> str:
    """The quantization in a file's name, `Q4_K_M`; else its stem."""
    name = PurePosixPath(path).name
    split = _SPLIT.fullmatch(name)
    stem = split["stem"] if split else name.removesuffix(".gguf")
    labels = _LABEL.findall(stem)
    return str(labels[-1]).upper() if labels else stem


def variants_of(files: Iterable[RepoFile]) -> tuple[Variant, ...]:
    """The GGUF models of a listing; projectors and incomplete splits are none."""
    groups: dict[str, list[RepoFile]] = {}
    for file in sorted(files, key=lambda one: one.path):
        if not file.path.endswith(".gguf") or not is_safe_file_path(file.path):
            continue
        if PurePosixPath(file.path).name.lower().startswith(("mmproj", "imatrix")):
            continue
        split = _SPLIT.fullmatch(file.path)
        groups.setdefault(split["stem"] if split else file.path, []).append(file)
    found = (_variant(group) for group in groups.values())
    return tuple(one for one in found if one is not None)


def _variant(files: list[RepoFile]) -> Variant | None:
    split = _SPLIT.fullmatch(files[0].path)
    if split is not None:
        count = int(split["count"])
        wanted = [
            f"{split['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)
        ]
        if [file.path for file in files] != wanted:
            return None
    return Variant(label=label_of(files[0].path), files=tuple(files))


def choose(reference: HubReference, files: Sequence[RepoFile]) -> Variant:
    """The variant that a reference means.

    Raises:
        NotFoundError: the repository has no such file; the nearest are named.
        UsageError: several would do, or the repository has no GGUF file at all.
    """
    variants = variants_of(files)
    if not variants:
        raise _no_gguf(reference, files)
    if reference.file is not None:
        return _by_path(reference, reference.file, variants)
    if reference.quantization is not None:
        return _by_label(reference, reference.quantization, variants)
    if len(variants) == 1:
        return variants[0]
    usual = [one for one in variants if one.label == USUAL]
    if len(usual) == 1:
        return usual[0]
    raise UsageError(
        f"`{reference.repo_id}` has {len(variants)} GGUF models",
        hint=f"name one: {_commands(reference, variants)}",
    )


def _by_path(reference: HubReference, path: str, variants: Sequence[Variant]) -> Variant:
    for one in variants:
        if any(file.path == path for file in one.files):
            return one
    names = [one.files[0].path for one in variants]
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.4) or names[:3]
    raise NotFoundError(
        f"`{reference.repo_id}` has no `{path}`", hint=f"nearest: {', '.join(near)}"
    )


def _by_label(reference: HubReference, wanted: str, variants: Sequence[Variant]) -> Variant:
    label = wanted.upper()
    exact = [one for one in variants if one.label == label]
    found = exact or [one for one in variants if one.label.removeprefix("UD-") == label]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"`{reference.repo_id}` has {len(found)} files in {label}",
            hint="name the file: " + ", ".join(f"`{_with_file(reference, one)}`" for one in found),
        )
    labels = sorted({one.label for one in variants})
    near = difflib.get_close_matches(label, labels, n=4, cutoff=0.4)
    others = [one for one in labels if one not in near]
    raise NotFoundError(
        f"`{reference.repo_id}` has no {wanted}",
        hint=(f"nearest: {', '.join(near)}" if near else f"it has {', '.join(labels[:_MAX_SHOWN])}")
        + (f"; also {', '.join(others[:_MAX_SHOWN])}" if near and others else ""),
    )


def _with_file(reference: HubReference, variant: Variant) -> str:
    return f"hf:{reference.repo_id}/{variant.files[0].path}"


def _commands(reference: HubReference, variants: Sequence[Variant]) -> str:
    labels = [one.label for one in variants]
    shown = [
        f"`hf:{reference.repo_id}:{one.label}`"
        if labels.count(one.label) == 1 and one.label in label_of(one.files[0].path)
        else f"`{_with_file(reference, one)}`"
        for one in variants[:_MAX_SHOWN]
    ]
    return ", ".join(shown)


def _no_gguf(reference: HubReference, files: Sequence[RepoFile]) -> UsageError:
    has_safetensors = any(file.path.endswith(".safetensors") for file in files)
    what = "safetensors and no GGUF" if has_safetensors else "no complete GGUF model"
    plans = f"`loadmaster plan hf:{reference.repo_id} --quantize nf4` plans it; or "
    return UsageError(
        f"`{reference.repo_id}` has {what}",
        hint=(plans if has_safetensors else "")
        + "take a repository with GGUF files of the same model; on the Hub they are often named "
        f"`{reference.repo}-GGUF`",
    )
