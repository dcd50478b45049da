"""Laws of the comparison: the front is a front, and what is taken keeps its limits."""

from hypothesis import given
from hypothesis import strategies as st

from loadmaster.plan.compare import Candidate, Limits, choose, dominated
from tests.unit.test_compare import candidate

SPEEDS = st.sampled_from([0.5, 2.0, 5.0, 9.0, 30.0])
RATES = st.one_of(st.none(), SPEEDS)
DIVERGENCES = st.one_of(st.none(), st.sampled_from([0.0, 0.01, 0.1, 0.5]))
SCORES = st.one_of(st.none(), st.sampled_from([50.0, 65.0, 80.0]))


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    return [
        candidate(
            f"c{index}", draw(RATES), draw(DIVERGENCES), model=draw(st.sampled_from("ab")),
            mmlu=draw(SCORES), fits=draw(st.booleans()),
        )
        for index in range(draw(st.integers(1, 8)))
    ]  # fmt: skip


@given(candidates())
def test_nobody_beats_themselves_or_their_beater(pool: list[Candidate]) -> None:
    beaten = dominated(pool)
    for index, by in enumerate(beaten):
        assert by != index
        if by is not None and pool[index].decode_tok_s is not None:
            assert (pool[by].decode_tok_s or 0) >= (pool[index].decode_tok_s or 0)


@given(candidates())
def test_somebody_of_each_model_is_not_beaten_by_it(pool: list[Candidate]) -> None:
    for model in {one.model for one in pool}:
        own = [one for one in pool if one.model == model]
        assert None in dominated(own)


@given(
    candidates(),
    st.sampled_from(["quality", "speed", "context"]),
    st.one_of(st.none(), SPEEDS),
    st.one_of(st.none(), st.sampled_from([0.0, 0.01, 0.1, 0.5])),
)
def test_what_is_taken_keeps_what_was_asked(
    pool: list[Candidate], goal: str, min_speed: float | None, max_kl: float | None
) -> None:
    limits = Limits(goal=goal, min_speed=min_speed, max_kl=max_kl)  # type: ignore[arg-type]
    for one in choose(pool, limits).picked:
        assert one.plan is not None
        assert min_speed is None or (one.decode_tok_s or 0) >= min_speed
        assert max_kl is None or (one.kl is not None and one.kl <= max_kl)
