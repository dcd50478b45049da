"""Files of a repository: which are models, what they are called, which one is meant."""

import pytest

from loadmaster.errors import NotFoundError, UsageError
from loadmaster.model.reference import HubReference
from loadmaster.model.variants import RepoFile, choose, label_of, variants_of


def files(*paths: str) -> tuple[RepoFile, ...]:
    return tuple(RepoFile(path=path, size_bytes=1, sha256=None) for path in paths)


def reference(quantization: str | None = None, file: str | None = None) -> HubReference:
    return HubReference(owner="o", repo="r", quantization=quantization, file=file)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("Llama-3.1-8B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("model.Q5_K_S.gguf", "Q5_K_S"),
        ("tiny_q8_0.gguf", "Q8_0"),
        ("UD-IQ2_XXS/Q-UD-IQ2_XXS-00001-of-00002.gguf", "UD-IQ2_XXS"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("x-BF16.gguf", "BF16"),
        ("plain.gguf", "plain"),
    ],
)
def test_label(path: str, label: str) -> None:
    assert label_of(path) == label


def test_a_split_is_one_variant_and_an_incomplete_one_is_none() -> None:
    found = variants_of(
        files("a-Q8_0-00002-of-00002.gguf", "a-Q8_0-00001-of-00002.gguf",
              "b-Q4_0-00001-of-00002.gguf", "mmproj-F16.gguf", "README.md", "../e-Q4_0.gguf")
    )  # fmt: skip
    assert [[file.path for file in one.files] for one in found] == [
        ["a-Q8_0-00001-of-00002.gguf", "a-Q8_0-00002-of-00002.gguf"]
    ]


def test_the_usual_quantization_is_taken_unasked() -> None:
    listing = files("m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf")
    assert choose(reference(), listing).label == "Q4_K_M"
    assert choose(reference("q8_0"), listing).label == "Q8_0"
    assert choose(reference(file="m-Q2_K.gguf"), listing).label == "Q2_K"


def test_a_dynamic_quantization_answers_to_its_plain_name_when_alone() -> None:
    assert choose(reference("Q4_K_XL"), files("m-UD-Q4_K_XL.gguf")).label == "UD-Q4_K_XL"
    both = files("m-UD-Q4_K_XL.gguf", "m-Q4_K_XL.gguf")
    assert choose(reference("Q4_K_XL"), both).label == "Q4_K_XL"


def test_a_miss_names_the_nearest() -> None:
    listing = files("m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf")
    with pytest.raises(NotFoundError) as caught:
        choose(reference("Q4_K_L"), listing)
    assert "Q4_K_M" in (caught.value.hint or "").split(";")[0]
    with pytest.raises(NotFoundError) as caught:
        choose(reference(file="m-Q4_K.gguf"), listing)
    assert "m-Q4_K_M.gguf" in (caught.value.hint or "")


def test_several_without_the_usual_one_ask_for_a_choice() -> None:
    with pytest.raises(UsageError) as caught:
        choose(reference(), files("m-Q2_K.gguf", "m-Q8_0.gguf"))
    assert "`hf:o/r:Q2_K`, `hf:o/r:Q8_0`" in (caught.value.hint or "")
    with pytest.raises(UsageError) as caught:
        choose(reference("Q8_0"), files("a-Q8_0.gguf", "b-Q8_0.gguf"))
    assert "`hf:o/r/a-Q8_0.gguf`" in (caught.value.hint or "")


def test_safetensors_alone_are_refused_with_what_works() -> None:
    with pytest.raises(UsageError, match="safetensors") as caught:
        choose(reference(), files("model.safetensors", "config.json"))
    assert "GGUF" in (caught.value.hint or "")
