"""Which classes a user means: one rule for every setting, and stores whose classes are matched by name."""

import pytest
import torch
from jsonargparse import ArgumentParser

from ditlit.__main__ import command_parser
from ditlit.callbacks import SampleGrid
from ditlit.data import LatentDataModule, write_store
from ditlit.data.classes import ClassSet, match_classes, parse_classes, say_once
from ditlit.errors import InputError, counted

DIGITS = ["0", "1", "10", "2"]  # as folders of these names are sorted
NAMES = ["tench, Tinca tinca", "crane", "White shark", "white shark", "crane"]


@pytest.fixture(autouse=True)
def nothing_said_before():
    say_once.cache_clear()


@pytest.mark.parametrize("spelt", ["10,2", "[10, 2]", "['10', '2']", '["2","10"]'])
def test_every_setting_reads_classes_by_one_rule(spelt, tmp_path, capsys):
    expected = [3, 2] if spelt.startswith('["2') else [2, 3]
    sample = command_parser("sample").parse_args(["--ckpt=a", "--out=b", f"--classes={spelt}"])
    assert parse_classes(sample.classes, 4, DIGITS) == expected
    config = tmp_path / "sample.yaml"
    config.write_text(f"ckpt: a\nout: b\nclasses: {spelt}\n")
    from_yaml = command_parser("sample").parse_args(["--config", str(config)])
    assert parse_classes(from_yaml.classes, 4, DIGITS) == expected

    parser = ArgumentParser()
    parser.add_class_arguments(LatentDataModule, "data")
    parser.add_class_arguments(SampleGrid, "grid")
    store = write_store(tmp_path / "store", torch.zeros(8, 1, 2, 2), torch.arange(8) % 4, 4, class_names=DIGITS)
    words = [f"--data.store={store.location}", f"--data.classes={spelt}", f"--grid.classes={spelt}"]
    settings = parser.parse_args(words)
    data = LatentDataModule(**settings.data)
    data.setup()
    assert data.manifest.class_names == [DIGITS[k] for k in expected]
    assert parse_classes(SampleGrid(**settings.grid).classes, 4, DIGITS) == expected
    said = capsys.readouterr().out  # the rule, once for all of them; 10 is no number of a class here
    assert said == (
        "Class 2 is the one that is called 2 (number 3), not number 2 ('10'): what is the name of a class is taken for "
        "the name.\n"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("tench, Tinca tinca", [0]),  # one name with a comma
        ("tench,Tinca tinca", [0, 0]),
        (["tench, Tinca tinca", 2], [0, 2]),
        ("white shark, White shark,TENCH", [3, 2, 0]),
        ([3, "0"], [3, 0]),
        (4, [4]),
        ("007", None),
    ],
)
def test_names_go_before_numbers_and_whole_names_before_parts(given, expected):
    if expected is None:
        assert parse_classes(given, 10, None) == [7]
        assert parse_classes(given, 10, ["7", "007"]) == [1]
    else:
        assert parse_classes(given, 5, NAMES) == expected


def test_the_rule_is_said_once_however_many_classes_it_concerns(capsys):
    names = sorted(map(str, range(20)))
    assert parse_classes(",".join(map(str, range(20))), 20, names) == [names.index(str(k)) for k in range(20)]
    assert parse_classes(list(range(20)), 20, names) == [names.index(str(k)) for k in range(20)]
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("written", ["4", "'4'", "[4]"])
def test_one_class_needs_no_list_in_a_config(written, tmp_path):
    (tmp_path / "sample.yaml").write_text(f"ckpt: a\nout: b\nclasses: {written}\n")
    settings = command_parser("sample").parse_args(["--config", str(tmp_path / "sample.yaml")])
    assert parse_classes(settings.classes, 5, NAMES) == [4]


def test_a_word_that_could_be_several_classes_is_told(capsys):
    assert parse_classes("crane", 5, NAMES) == [1]
    assert "'crane' could be any of the classes 1, 4; number 1 is taken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("²", "there is no class '²'; give its number"),  # isdigit() says that it is one
        ("٣", "there is no class '٣'"),
        ("-1", "there is no class -1: this model knows classes 0 to 4"),
        ("9" * 5000, "there is no class '999"),  # longer than int() takes
        ([5], "there is no class 5: this model knows classes 0 to 4"),
        ([], r"no class is named in \[\]"),
        (" , ", "no class is named"),
        ([True], "there is no class 'True'"),
    ],
)
def test_what_is_no_class_is_refused_in_one_line(given, message):
    with pytest.raises(InputError, match=message) as raised:
        parse_classes(given, 5, NAMES)
    assert "\n" not in str(raised.value)


def test_classes_are_matched_by_name_or_as_the_user_says(capsys):
    ours = ClassSet(3, ["cat", "dog", "eel"], "train")
    assert match_classes(ClassSet(2, ["eel", "cat"], "val"), ours, "x") == [2, 0]
    assert match_classes(ClassSet(3, None, "val"), ours, "x") == [0, 1, 2]  # equally many: by number
    assert match_classes(ClassSet(2, None, "val"), ours, "x", "eel,0") == [2, 0]
    assert capsys.readouterr().out == ""
    assert match_classes(ClassSet(2, ["dog", "owl"], "val"), ours, "x") == [1, -1]
    assert capsys.readouterr().out == "val: leaving out 1 class that train lacks: owl\n"


@pytest.mark.parametrize(
    ("theirs", "given", "message"),
    [
        (ClassSet(2, None, "val"), None, "val has 2 classes, train has 3, .* set --c to the class of train"),
        (ClassSet(2, ["a", "b"], "val"), None, r"no class of val \(a, b, ...\) has the name of one of train \(cat"),
        (ClassSet(2, ["cat", "cat"], "val"), None, "two classes of val or train have one name; set --c"),
        (ClassSet(2, None, "val"), "cat", "--c needs one class, and none twice, for each of the 2 of val"),
        (ClassSet(2, None, "val"), [0, 0], "--c needs one class, and none twice"),
        (ClassSet(1, None, "val"), "ape", "there is no class 'ape'"),
    ],
)
def test_classes_that_cannot_be_matched_are_refused(theirs, given, message):
    with pytest.raises(InputError, match=message):
        match_classes(theirs, ClassSet(3, ["cat", "dog", "eel"], "train"), "--c", given)


def test_numbers_and_what_they_count():
    said = [counted(n, noun) for n, noun in ((1, "class"), (2, "class"), (1437, "image"), (0, "batch"))]
    assert said == ["1 class", "2 classes", "1,437 images", "0 batches"]
