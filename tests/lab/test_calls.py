"""Names with options, as they are typed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archopt.lab.calls import Call, folder_name, parse_call, split_list
from archopt.lab.errors import LabError
from archopt.lab.user_files import load_file

LITERALS = st.one_of(
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    st.text(max_size=5),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
NAMES = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True).filter(
    lambda s: s not in ("is", "in", "if", "or", "as")
)


def names_that_python_takes(name: str) -> bool:
    return name.isidentifier() and not __import__("keyword").iskeyword(name)


@given(
    st.from_regex(r"[a-z][a-z-]{0,8}", fullmatch=True),
    st.dictionaries(NAMES.filter(names_that_python_takes), LITERALS, max_size=3),
)
def test_canonical_text_reads_back_as_the_same_call(name, options):
    call = Call(name, options)
    assert parse_call(str(call)) == call
    assert split_list(f"{call},{call}") == [str(call).strip()] * 2


def test_order_and_spacing_of_options_do_not_change_the_canonical_text():
    assert (
        str(parse_call("adamw( weight_decay = 0.1 , betas=(0.9,0.95))"))
        == "adamw(betas=(0.9, 0.95),weight_decay=0.1)"
    )
    assert str(parse_call("adamw()")) == "adamw"


@pytest.mark.parametrize(
    "text", ["", "(lr=1)", "a(1)", "a(lr=x)", "a(lr=1", "a(lr=1))", "a(lr=1)b", "a(**{})", "a(lr=f())"]
)
def test_what_is_not_a_call_is_refused_in_one_line(text):
    with pytest.raises(LabError) as refused:
        parse_call(text)
    assert "\n" not in str(refused.value)


def test_lists_divide_at_commas_outside_brackets_and_quotes():
    assert split_list("nero, sgd(momentum=0.9,lr=(1,2)),a(b='x,y')") == [
        "nero",
        "sgd(momentum=0.9,lr=(1,2))",
        "a(b='x,y')",
    ]


@pytest.mark.parametrize("text", ["a,,b", "a,", "a(b", "a)b", "a(b='x)"])
def test_lists_that_do_not_close_or_have_gaps_are_refused(text):
    with pytest.raises(LabError):
        split_list(text)


def test_folder_names_keep_labels_apart_on_every_file_system():
    labels = [
        "nero",
        "adamw(lr=0.003)",
        "torch.optim:SGD",
        "torch.optim/SGD",
        "a" * 200,
        "a" * 201,
        "a(b='c')",
    ]
    names = [folder_name(label) for label in labels]
    assert names[:2] == labels[:2]
    assert len(set(names)) == len(labels)
    assert all(len(name) < 128 and not set(name) & set("/\\:*?\"<>|' ") for name in names)


def test_a_failing_user_file_is_reported_with_its_line(tmp_path: Path):
    (tmp_path / "bad.py").write_text("x = 1\ny = undefined_name\n")
    with pytest.raises(LabError, match=r"NameError.*undefined_name.*line 2"):
        load_file(tmp_path / "bad.py")
    (tmp_path / "worse.py").write_text("def f(:\n")
    with pytest.raises(LabError, match="SyntaxError"):
        load_file(tmp_path / "worse.py")
