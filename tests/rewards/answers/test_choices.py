import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1v2.rewards.answers.choices import is_label, read_choice
from megatron_r1v2.rewards.answers.normalisation import normalise

# The answer, the reference, and whether they choose the same (rules 16 and 17).
CASES = [
    ("\uff08B\uff09", "B", True),
    ("B\uff0e", "B", True),
    ("B\uff1a12", "B", True),
    ("\u7b54\u6848\uff1aB", "B", True),
    ("\u7b54\u6848\u662fB", "B", True),
    ("\u6545\u9009B", "B", True),
    ("\u9009\u9879B", "B", True),
    ("\u6b63\u786e\u7b54\u6848\u4e3aB", "B", True),
    ("The correct answer is B", "B", True),
    ("The answer is (B)", "B", True),
    ("answer: B", "B", True),
    ("Choice B", "B", True),
    ("option (B)", "B", True),
    (r"\mathbf{B}", "B", True),
    (r"\text{(B)}", "B", True),
    (r"\textrm{(B) } 12", "B", True),
    ("$B$", "B", True),
    ("*B*", "B", True),
    ("`B`", "B", True),
    ("[B]", "B", True),
    ("<B>", "B", False),
    ("B) 12 cm", "B", True),
    ("b", "B", True),
    ("B or C", "B", False),
    ("B/C", "B", False),
    ("B and C", "B", False),
    ("not B", "B", False),
    ("A, B, C, D", "B", False),
    ("ABCD", "B", False),
    ("Either B or C", "B", False),
    ("B, maybe C", "B", False),
    ("B (or C)", "B", False),
    ("B but possibly C", "B", False),
    ("neither", "B", False),
    ("", "B", False),
    ("Both A and B", "B", False),
    ("Blue", "B", False),
    ("B is correct", "B", True),
    ("B is right", "B", True),
    ("AB", "A,B", True),
    ("A and B", "AB", True),
    ("A\u3001B", "AB", True),
    ("A; B", "A,B", True),
    ("(A), (B)", "AB", True),
    ("A B", "AB", True),
    ("B, A", "A and B", True),
    ("A", "A, B", False),
    ("A, B, C", "A, B", False),
    ("2", "2", True),
    ("(2)", "2", True),
    ("\u2461", "2", True),
    ("2", "1", False),
    ("12", "1", False),
    ("1.5", "1", False),
    ("(ii)", "ii", True),
    ("D. None of the above", "D", True),
    ("C. Both A and B", "C", True),
    ("A. True", "A", True),
    ("A cat", "A", False),
    ("I", "I", True),
    ("E", "E", True),
    ("J", "J", True),
    (r"\boxed{B}", "B", True),
    (r"\color{red}{B}", "B", True),
    ("Answer", "A", False),
    ("All of the above", "D", False),
    ("B.C", "B", False),
    ("B,C", "B", False),
    ("Option B or Option C", "B", False),
    ("the answer is B.", "B", True),
    ("B:", "B", True),
    ("B\\\\", "B", True),
    ("(B", "B", True),
    ("B)", "B", True),
    ("B. because A is wrong", "B", True),
    ("a) b)", "a", False),
    ("A) 1, B) 2", "A", False),
]


@pytest.mark.parametrize(("answer", "reference", "same"), CASES)
def test_choices(answer, reference, same):
    letters = read_choice(normalise(reference))
    assert letters is not None
    assert (read_choice(normalise(answer)) == letters) is same


@given(st.lists(st.sampled_from("ABCDEFGHIJ"), min_size=1, max_size=5, unique=True), st.data())
def test_letters_in_any_order_and_with_anything_between_them_are_one_set(letters, data):
    shuffled = data.draw(st.permutations(letters))
    for joined in (
        ", ".join(shuffled),
        " and ".join(shuffled),
        "".join(f"({letter})" for letter in shuffled),
        "".join(shuffled),
    ):
        assert read_choice(normalise(joined)) == frozenset(letters)


@given(st.lists(st.sampled_from("ABCDEFGHIJ"), min_size=2, max_size=5, unique=True))
def test_hedges_choose_nothing(letters):
    for joined in (" or ".join(letters), "(" + ") or (".join(letters) + ")", f"either {letters[0]} or {letters[1]}"):
        assert read_choice(normalise(joined)) is None


@pytest.mark.parametrize(
    ("text", "label"), [("C", True), ("(C)", True), ("C.", True), ("CD", False), ("8", False), ("", False)]
)
def test_labels(text, label):
    assert is_label(text) is label
