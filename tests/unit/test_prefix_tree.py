"""The radix tree of cells: matches inside edges, shared cells counted once, nothing left behind."""

from loadmaster.scheduler.prefix import NO_MATCH, PrefixTree, common_prefix


def tree_with(*sequences: tuple[int, ...], scope: str = "") -> PrefixTree:
    """Sequences 0, 1, … that share whatever they can."""
    tree = PrefixTree()
    for holder, tokens in enumerate(sequences):
        match = tree.match(scope, tokens)
        tree.begin(holder, scope, match)
        if match.n < len(tokens):
            tree.extend(holder, tokens[match.n :])
    return tree


def test_common_prefix() -> None:
    assert common_prefix((1, 2, 3), (1, 2, 4)) == 2
    assert common_prefix((), (1,)) == 0
    assert common_prefix((1, 2), (1, 2, 3)) == 2
    assert common_prefix(tuple(range(100_000)), tuple(range(99_999))) == 99_999


def test_a_match_may_end_inside_an_edge() -> None:
    tree = tree_with((1, 2, 3, 4, 5))
    match = tree.match("", (1, 2, 3, 9))
    assert match.n == 3
    tree.begin(7, "", match)
    tree.extend(7, (9, 9))
    assert tree.tokens(7) == [1, 2, 3, 9, 9]
    assert tree.tokens(0) == [1, 2, 3, 4, 5]
    assert tree.n_cells == 7
    assert tree.match("", (1, 2, 3, 9, 9, 1)).n == 5


def test_shared_cells_go_with_their_last_holder() -> None:
    tree = tree_with((1, 2, 3, 4), (1, 2, 5), (1, 2, 3, 6))
    assert tree.n_cells == 6
    assert [tree.own(holder) for holder in range(3)] == [1, 1, 1]
    tree.drop(0)
    assert tree.n_cells == 5
    assert tree.own(2) == 2
    tree.trim(2, 1)
    assert (tree.tokens(2), tree.n_cells) == ([1], 3)
    tree.drop(2)
    tree.drop(1)
    assert tree.n_cells == tree.n_held_cells == 0
    assert tree.match("", (1,)) == NO_MATCH


def test_equal_tokens_computed_apart_are_cells_of_their_own() -> None:
    tree = tree_with((1,), (1,))
    tree.extend(0, (2, 3))
    tree.extend(1, (2, 3, 4))
    assert tree.n_cells == 6
    assert tree.match("", (1, 2, 3, 4)).n == 4  # the longer of the two


def test_scopes_are_trees_of_their_own() -> None:
    tree = tree_with((1, 2, 3), scope="a")
    assert tree.match("b", (1, 2, 3)) == NO_MATCH
    tree.begin(5, "b")
    assert tree.length(5) == 0
    tree.drop(5)
    assert tree.match("a", (1, 2, 3)).n == 3


def test_cells_of_running_sequences_are_held() -> None:
    tree = tree_with((1, 2, 3), (1, 2, 4))
    assert tree.n_held_cells == 4
    tree.release(1)
    assert tree.n_held_cells == 3
    assert tree.not_held(tree.match("", (1, 2, 4))) == 1
    tree.release(0)
    assert tree.n_held_cells == 0
    assert tree.not_held(tree.match("", (1, 2, 3))) == 3
    tree.take(0)
    assert tree.n_held_cells == 3
    tree.rename(1, 9)
    assert tree.tokens(9) == [1, 2, 4]
    assert 1 not in tree


def test_whole_sequences_and_the_nearest_one() -> None:
    tree = tree_with((1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6))
    assert tree.match_whole("", (1, 2, 3, 4, 9)).n == 4
    assert tree.match_whole("", (1, 2, 3)).n == 2
    assert tree.match_whole("", (1,)).n == 0
    assert tree.nearest(tree.match("", (1, 2, 3))) == 1
    assert tree.nearest(tree.match("", (1, 2, 3, 4, 5))) == 2


def test_a_match_is_cut_shorter() -> None:
    tree = tree_with((1, 2, 3, 4), (1, 2, 5))
    match = tree.match("", (1, 2, 3, 4))
    tree.begin(8, "", match.cut(1))
    assert tree.tokens(8) == [1]
    assert match.cut(0) == NO_MATCH


def test_the_earliest_of_those_who_go_first() -> None:
    tree = tree_with((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 9))
    assert tree.earliest(tree.match("", (1, 2, 3, 4, 5)), before=5) == (0, 4)
    assert tree.earliest(tree.match("", (1, 2, 9, 9)), before=2) == (0, 2)
    assert tree.earliest(tree.match("", (1, 2)), before=0) == (0, 0)
