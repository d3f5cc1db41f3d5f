"""The instructions of the report, and images and options in their places."""

from megatron_r1v2.evaluation.benchmarks.prompts import (
    CHOICE_INSTRUCTION,
    OPEN_INSTRUCTION,
    options_text,
    place_images,
)


def test_marks_and_images_that_do_not_fit():
    assert place_images("<image 1> and <image 1>", [1]) == ("<image> and (image 1)", [1])
    assert place_images("no mark", [1, 2]) == ("<image>\n<image>\nno mark", [1, 2])
    assert place_images("<image 3> only", [1, 3]) == ("<image>\n<image> only", [1, 3])
    assert place_images("<image> and <image>", [1]) == ("<image> and (image)", [1])
    assert place_images("<image 5>", []) == ("(image 5)", [])


def test_the_instructions_are_those_of_the_report():
    assert CHOICE_INSTRUCTION.startswith(
        "Answer the multiple choice preceding question. The last line of your response"
    )
    assert (
        r"'Answer: \boxed{$LETTER}' (without quotes), where LETTER is one of the options. If you" in CHOICE_INSTRUCTION
    )
    assert r"'Answer: \boxed{$FINAL_ANSWER}' (without quotes)" in OPEN_INSTRUCTION
    for instruction in (CHOICE_INSTRUCTION, OPEN_INSTRUCTION):
        assert instruction.endswith("considering all relevant information before answering.")


def test_options_stand_behind_their_letters():
    assert options_text(["red", "blue"]) == "A. red\nB. blue"
    assert options_text(["A", " B", "C "]) == "Options: A,  B, C ", "drawn in the image: the letters alone"
    assert options_text(["A", "C"]) == "A. A\nB. C"
