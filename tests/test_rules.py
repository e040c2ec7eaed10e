"""Layer rules: which rule takes which tensor, how a rule is written, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelsoup import Rule, RuleError, parse_rule
from modelsoup.files.names import natural_key
from modelsoup.merging.rules import (
    BASE,
    Assignment,
    assign,
    low_level,
    parse_fractions,
    parse_layers,
    parse_value,
)

# pytorch-CycleGAN-and-pix2pix's own names: a PatchGAN discriminator, and the first layers of a
# ResNet generator with its residual blocks.
D_A = [
    "D_A.model.0.weight", "D_A.model.0.bias",
    "D_A.model.2.weight", "D_A.model.2.bias",
    "D_A.model.5.weight", "D_A.model.5.bias",
    "D_A.model.8.weight", "D_A.model.8.bias",
    "D_A.model.11.weight", "D_A.model.11.bias",
]  # fmt: skip
G_A = [
    "G_A.model.1.weight", "G_A.model.1.bias",
    "G_A.model.4.weight", "G_A.model.4.bias",
    "G_A.model.7.weight", "G_A.model.7.bias",
    "G_A.model.10.conv_block.1.weight", "G_A.model.10.conv_block.1.bias",
    "G_A.model.10.conv_block.5.weight", "G_A.model.10.conv_block.5.bias",
]  # fmt: skip
G_B = [name.replace("G_A", "G_B") for name in G_A]
D_B = [name.replace("D_A", "D_B") for name in D_A]
CYCLEGAN = [*G_A, *G_B, *D_A, *D_B]
D_LOW = {"D_A.model.0", "D_A.model.2", "D_A.model.5"}


def taken(names: list[str], *layers: str | Rule, **options: Any) -> list[list[str]]:
    """The names that each rule took, those of the rest last."""
    assignment = assign(names, parse_layers(list(layers)), **options)
    return [assignment.taken(index) for index in range(len(assignment.rules))]


def refusal(names: list[str], *layers: str | Rule, **options: Any) -> str:
    """The sentence with which rules are refused."""
    with pytest.raises(RuleError) as caught:
        assign(names, parse_layers(list(layers)), **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 400
    return sentence


# Patterns


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("disc.*", ["disc.conv.weight", "disc.bias"]),
        ("*.weight", ["disc.conv.weight", "gen.weight"]),
        ("*", ["disc.conv.weight", "disc.bias", "gen.weight", "discs"]),
        ("disc.????", ["disc.bias"]),
        ("[dg]*.weight", ["disc.conv.weight", "gen.weight"]),
        ("[!d]*", ["gen.weight"]),
        ("disc.bias", ["disc.bias"]),
        ("disc*", ["disc.conv.weight", "disc.bias", "discs"]),
    ],
)
def test_a_glob_is_matched_against_the_whole_name_and_crosses_dots(
    pattern: str, expected: list[str]
) -> None:
    names = ["disc.conv.weight", "disc.bias", "gen.weight", "discs"]
    assert taken(names, pattern)[0] == expected


def test_a_dot_in_a_glob_is_a_dot() -> None:
    assert taken(["a.b", "axb"], "a.b")[0] == ["a.b"]


def test_case_matters() -> None:
    assert "matches no tensor" in refusal(["Disc.weight"], "disc.*")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"re:disc\..*", ["disc.conv.weight", "disc.bias"]),
        (r"re:.*weight", ["disc.conv.weight", "gen.weight"]),
        (r"re:(gen|disc)\.(weight|bias)", ["disc.bias", "gen.weight"]),
        (r"re:disc\.(?!conv).*", ["disc.bias"]),
    ],
)
def test_a_regular_expression_must_match_the_whole_name(pattern: str, expected: list[str]) -> None:
    names = ["disc.conv.weight", "disc.bias", "gen.weight"]
    assert taken(names, pattern)[0] == expected


def test_a_regular_expression_that_matches_only_a_part_matches_nothing() -> None:
    assert "matches no tensor (of 1)" in refusal(["disc.weight"], "re:disc")


def test_what_is_no_regular_expression_is_told() -> None:
    assert "'re:a(' is not a regular expression that can be used" in refusal(["a"], "re:a(")


def test_a_group_is_the_union_of_its_patterns_and_may_name_others() -> None:
    groups = {
        "ends": ["*.first.*", "re:.*\\.last\\..*"],
        "most": ["group:ends", "g.head"],
    }
    names = ["g.first.w", "g.middle.w", "g.last.w", "g.head"]
    assert taken(names, "group:ends", groups=groups)[0] == ["g.first.w", "g.last.w"]
    assert taken(names, "group:most", groups=groups)[0] == ["g.first.w", "g.last.w", "g.head"]


def test_a_group_may_be_one_pattern_instead_of_a_list() -> None:
    # Taken letter by letter, the '*' in it would match every name.
    assert taken(["a.w", "b.w"], "group:low", groups={"low": "a.*"})[0] == ["a.w"]


def test_a_group_that_contains_itself_is_told() -> None:
    for groups in ({"g": ["group:g"]}, {"g": ["group:h"], "h": ["a", "group:g"]}):
        assert "'g'" in refusal(["a"], "group:g", groups=groups)


def test_a_group_that_nobody_defined_is_told_with_the_nearest() -> None:
    sentence = refusal(["a"], "group:lowlevel", groups={"low-level": ["a"], "head": ["a"]})
    assert "no group is called 'lowlevel'" in sentence
    assert "did you mean 'low-level'" in sentence
    assert "(defined: head, low-level)" in sentence


@pytest.mark.parametrize(
    ("pattern", "near"), [("low-levl", "low-level"), ("gruop:head", "group:head")]
)
def test_a_preset_or_group_that_is_misspelt_is_a_pattern_with_a_hint(
    pattern: str, near: str
) -> None:
    sentence = refusal(["a.b"], pattern, groups={"low-level": ["a"], "head": ["a"]})
    assert f"the pattern {pattern!r} matches no tensor" in sentence and f"'{near}'" in sentence
    assert "no group is called 'x'" in refusal(["a"], "group:x")


# The first match decides


def test_the_first_rule_that_matches_decides() -> None:
    names = ["disc.head.w", "disc.conv.w", "gen.w"]
    assert taken(names, "*.head.*=drop", "disc.*=0.3", "*=second") == [
        ["disc.head.w"], ["disc.conv.w"], ["gen.w"], [],
    ]  # fmt: skip


def test_the_order_of_rules_is_the_order_of_decisions() -> None:
    names = ["disc.head.w", "gen.w"]
    assert taken(names, "disc.*=0.3", "*=drop") == [["disc.head.w"], ["gen.w"], []]
    assert "never applies" in refusal(names, "*=drop", "disc.*=0.3")


def test_a_rule_that_earlier_rules_leave_nothing_is_told() -> None:
    sentence = refusal(["disc.a", "disc.b", "gen.a"], "disc.*", "disc.a=drop", "gen.*")
    assert sentence == (
        "the rule 'disc.a → drop' never applies: earlier rules take all of the 1 tensor that it "
        "matches"
    )


def test_no_rule_at_all_merges_everything() -> None:
    assignment = assign(["a", "b"], [])
    assert assignment.taken(0) == ["a", "b"]
    assert assignment.rules[0] == Rule("*")


def test_every_name_falls_under_exactly_one_rule_in_the_names_order() -> None:
    assignment = assign(CYCLEGAN, parse_layers(["D_*=0.3", "*.bias=drop"]))
    assert list(assignment.chosen) == CYCLEGAN
    assert sum(len(assignment.taken(i)) for i in range(3)) == len(CYCLEGAN)


@given(
    names=st.lists(st.text("ab.1", min_size=1, max_size=5), unique=True, min_size=1),
    patterns=st.lists(st.text("ab.1*?", min_size=1, max_size=4), max_size=4),
)
def test_assigning_agrees_with_trying_every_rule_on_every_name(
    names: list[str], patterns: list[str]
) -> None:
    def matches(pattern: str, name: str) -> bool:
        """A glob by its definition: no character class can come up here."""
        if not pattern:
            return not name
        if pattern[0] == "*":
            return any(matches(pattern[1:], name[i:]) for i in range(len(name) + 1))
        return bool(name) and pattern[0] in ("?", name[0]) and matches(pattern[1:], name[1:])

    expected = {
        name: next((i for i, p in enumerate(patterns) if matches(p, name)), len(patterns))
        for name in names
    }
    try:
        found: Assignment = assign(names, [Rule(pattern) for pattern in patterns])
    except RuleError:
        assert set(range(len(patterns))) - set(expected.values())  # one took nothing
        return
    if patterns:
        assert found.chosen == expected


# The rest


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("first", Rule("(rest)", "keep", 0)),
        ("second", Rule("(rest)", "keep", 1)),
        ("base", Rule("(rest)", "keep", BASE)),
        ("drop", Rule("(rest)", "drop")),
    ],
)
def test_what_no_rule_matches_is_kept_or_dropped_as_asked(rest: Any, expected: Rule) -> None:
    assignment = assign(["disc.w", "gen.w"], [Rule("disc.*")], rest=rest)
    assert assignment.rules[assignment.chosen["gen.w"]] == expected


def test_what_no_rule_matches_is_an_error_where_asked_with_the_first_five_names() -> None:
    names = ["disc.w", *(f"gen.{i}" for i in range(8))]
    assert refusal(names, "disc.*", rest="error") == (
        "no rule matches 8 tensors: gen.0, gen.1, gen.2, gen.3, gen.4 and 3 more"
    )
    assert taken(["disc.w"], "disc.*", rest="error")[0] == ["disc.w"]


# Patterns that match nothing


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("dics.*", "disc"),
        ("disc.cnov", "disc.conv"),
        ("disc.conv.wieght", "disc.conv.weight"),
        ("re:gn.*", "gen"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_with_the_nearest_names(
    pattern: str, near: str
) -> None:
    sentence = refusal(["disc.conv.weight", "gen.weight"], pattern)
    assert f"the pattern {pattern!r} matches no tensor (of 2)" in sentence
    assert f"'{near}'" in sentence


def test_where_no_name_is_near_the_first_ones_are_shown() -> None:
    sentence = refusal(["disc.conv.weight", "gen.weight"], "zzz=drop")
    assert "(the first are disc.conv.weight, gen.weight)" in sentence


def test_an_empty_group_is_told() -> None:
    assert "matches no tensor" in refusal(["a"], "group:g", groups={"g": []})


# How a rule is written


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("disc.*", Rule("disc.*")),
        ("G_*=0.3", Rule("G_*", parameters={"beta": 0.3})),
        ("G_*=0", Rule("G_*", parameters={"beta": 0.0})),
        ("G_*=1e-1", Rule("G_*", parameters={"beta": 0.1})),
        ("G_[AB]*=0.3", Rule("G_[AB]*", parameters={"beta": 0.3})),
        ("head.*=drop", Rule("head.*", "drop")),
        ("head.*=scratch", Rule("head.*", "drop")),
        ("bn.*=first", Rule("bn.*", "keep", 0)),
        ("bn.*=keep", Rule("bn.*", "keep", 0)),
        ("bn.*=second", Rule("bn.*", "keep", 1)),
        ("bn.*=base", Rule("bn.*", "keep", BASE)),
        ("x=merge", Rule("x")),
        ("x=freeze", Rule("x", frozen=True)),
        ("x=0.2;freeze", Rule("x", frozen=True, parameters={"beta": 0.2})),
        ("x = 0.2 ; freeze", Rule("x", frozen=True, parameters={"beta": 0.2})),
        ("a.*=ties", Rule("a.*", method="ties")),
        (
            "a.*=ties;density:0.5;weight:0.2,0.8",
            Rule("a.*", method="ties", parameters={"density": 0.5, "weight": (0.2, 0.8)}),
        ),
        ("a.*=normalize:false", Rule("a.*", parameters={"normalize": False})),
        ("re:a(?=b).*", Rule("re:a(?=b).*")),
        ("re:a(?=b).*=0.3", Rule("re:a(?=b).*", parameters={"beta": 0.3})),
        ("re:(?P<n>a)=drop", Rule("re:(?P<n>a)", "drop")),
        ("group:ends=0.3", Rule("group:ends", parameters={"beta": 0.3})),
        ("D_*=all", Rule("D_*")),
        ("G_*=low-level", Rule("G_*", low_level=True)),
        ("G_*=low-level;0.3", Rule("G_*", low_level=True, parameters={"beta": 0.3})),
        ("G_*=frozen", Rule("G_*", low_level=True, frozen=True)),
        ("all", Rule("*")),
        ("all=0.3", Rule("*", parameters={"beta": 0.3})),
        ("low-level", Rule("*", low_level=True)),
        ("frozen", Rule("*", low_level=True, frozen=True)),
    ],
)
def test_a_rule_is_read_as_it_is_written(text: str, rule: Rule) -> None:
    assert parse_rule(text) == rule


@pytest.mark.parametrize("text", ["", "=0.3", "  "])
def test_a_rule_without_a_pattern_is_told(text: str) -> None:
    with pytest.raises(RuleError, match="empty pattern"):
        parse_rule(text)


def test_a_word_that_is_no_word_is_told_with_the_nearest() -> None:
    with pytest.raises(RuleError, match="'Drop'; did you mean 'drop'"):
        parse_rule("x=Drop")
    with pytest.raises(RuleError, match="'freeze!'; did you mean 'freeze'"):
        parse_rule("x=freeze!")


@pytest.mark.parametrize("value", ["½", "0.2,", "1;;2"])
def test_a_parameter_that_is_no_number_is_told(value: str) -> None:
    with pytest.raises(RuleError, match=r"parameter 'density'|has ''"):
        parse_rule(f"x=density:{value}")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0.5", 0.5), (2, 2.0), (True, True), ("yes", True), ("off", False),
        ("0.2, 0.8", (0.2, 0.8)), ([1, 2], (1.0, 2.0)), (" 3 ", 3.0), ("mean", "mean"),
    ],
)  # fmt: skip
def test_a_parameter_is_a_number_a_truth_value_a_word_or_a_list(
    value: object, expected: object
) -> None:
    found = parse_value("p", value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("value", [None, "", "1,", "a b", [[1]]])
def test_anything_else_is_no_parameter(value: object) -> None:
    with pytest.raises(RuleError, match="parameter 'p' has the value"):
        parse_value("p", value)


def test_a_rule_says_what_it_does() -> None:
    assert str(parse_rule("G_*=low-level;freeze;0.3")) == "G_* → merge; low-level; freeze; beta:0.3"
    assert str(parse_rule("a=ties;weight:1,2")) == "a → ties; weight:1.0,2.0"
    assert str(parse_rule("a=second")) == "a → second"
    assert str(parse_rule("a=drop")) == "a → drop"


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("disc.*", [Rule("disc.*")]),
        (["disc.*", Rule("x", "drop")], [Rule("disc.*"), Rule("x", "drop")]),
        (
            {"disc.*": 0.3, "gen.*": "drop"},
            [Rule("disc.*", parameters={"beta": 0.3}), Rule("gen.*", "drop")],
        ),
        ({"a": ["freeze", 0.3]}, [Rule("a", frozen=True, parameters={"beta": 0.3})]),
        (
            {"a": {"method": "ties", "weight": [0.2, 0.8], "freeze": True}},
            [Rule("a", frozen=True, method="ties", parameters={"weight": (0.2, 0.8)})],
        ),
        ({"a": {"action": "second"}}, [Rule("a", "keep", 1)]),
        (
            {"subnetwork": {"D_*": "all", "G_*": "low-level"}},
            [Rule("D_*"), Rule("G_*", low_level=True)],
        ),
        ({"low-level": "merge", "*": "drop"}, [Rule("*", low_level=True), Rule("*", "drop")]),
        ((), []),
    ],
)  # fmt: skip
def test_layers_are_a_text_a_list_or_a_mapping(layers: object, expected: list[Rule]) -> None:
    assert parse_layers(layers) == expected


def test_anything_else_is_no_layers() -> None:
    with pytest.raises(RuleError, match="layers is 5"):
        parse_layers(5)


def test_the_preset_subnetwork_alone_asks_for_a_strategy_each() -> None:
    with pytest.raises(RuleError, match="a strategy for each subnetwork"):
        parse_rule("subnetwork")


# Presets


def layers_of(names: list[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def test_all_takes_every_tensor() -> None:
    assert taken(CYCLEGAN, "all")[0] == CYCLEGAN


def test_low_level_takes_the_first_part_of_the_layers_of_each_subnetwork() -> None:
    found = taken(CYCLEGAN, "low-level", fractions={"*": 0.6})[0]
    assert layers_of([n for n in found if n.startswith("D_A")]) == D_LOW  # 3 of 5 layers
    assert layers_of([n for n in found if n.startswith("D_B")]) == {
        layer.replace("D_A", "D_B") for layer in D_LOW
    }
    assert layers_of([n for n in found if n.startswith("G_A")]) == {
        "G_A.model.1", "G_A.model.4", "G_A.model.7",
    }  # fmt: skip
    assert {n for n in found if n.startswith("D_A")} == {
        f"{layer}.{kind}" for layer in D_LOW for kind in ("weight", "bias")
    }


def test_low_level_counts_in_the_names_natural_order_whatever_the_files() -> None:
    names = ["d.blocks.10.w", "d.blocks.2.w", "d.blocks.1.w", "d.blocks.21.w"]
    assert low_level(names, 0.5) == {"d.blocks.1.w", "d.blocks.2.w"}
    # As text, 11 and 0 would come before 2 and 5.
    assert layers_of(sorted(low_level(sorted(D_A), 0.6))) == D_LOW


@pytest.mark.parametrize(
    ("fraction", "layers"), [(0.01, 1), (0.2, 1), (0.21, 2), (0.4, 2), (0.6, 3), (1, 5)]
)
def test_a_fraction_is_rounded_up_to_whole_layers(fraction: float, layers: int) -> None:
    assert len(layers_of(sorted(low_level(D_A, fraction)))) == layers


def test_what_floating_point_adds_to_a_whole_number_takes_no_layer_more() -> None:
    assert 0.28 * 25 > 7
    assert len(low_level([f"net.{i}.w" for i in range(25)], 0.28)) == 7


def test_names_without_dots_are_one_subnetwork() -> None:
    assert low_level(["b", "a", "net.w"], 0.5) == {"a", "b", "net.w"}  # one layer of each


def test_low_level_may_differ_by_subnetwork() -> None:
    fractions = {"D_*": 0.6, "G_*": 0.2}
    found = taken(CYCLEGAN, "low-level", fractions=fractions)[0]
    assert layers_of([n for n in found if n.startswith("D_A")]) == D_LOW
    assert layers_of([n for n in found if n.startswith("G_B")]) == {"G_B.model.1"}


def test_low_level_counts_among_the_layers_that_the_pattern_takes() -> None:
    found = taken(CYCLEGAN, "D_*=low-level", fractions={"*": 0.6})[0]
    assert layers_of(found) == D_LOW | {layer.replace("D_A", "D_B") for layer in D_LOW}


def test_a_group_called_low_level_says_what_is_low_level() -> None:
    groups = {"low-level": ["D_A.model.0.*", "G_*.model.1.*"]}
    assert layers_of(taken(CYCLEGAN, "low-level", groups=groups)[0]) == {
        "D_A.model.0", "G_A.model.1", "G_B.model.1",
    }  # fmt: skip
    assert layers_of(taken(CYCLEGAN, "D_*=low-level", groups=groups)[0]) == {"D_A.model.0"}


def test_a_fraction_wins_over_the_group() -> None:
    groups = {"low-level": ["D_A.model.11.*"]}
    found = taken(D_A, "low-level", groups=groups, fractions={"*": 0.6})[0]
    assert layers_of(found) == D_LOW


def test_low_level_without_a_group_or_a_fraction_is_told() -> None:
    assert "needs a group of that name or a fraction of the depth" in refusal(D_A, "low-level")


def test_a_fraction_for_names_that_are_not_there_is_told() -> None:
    sentence = refusal(CYCLEGAN, "low-level", fractions={"D_*": 0.6, "disc_*": 0.3})
    assert "'disc_*' matches no tensor" in sentence


def test_frozen_merges_the_low_levels_and_freezes_them() -> None:
    assignment = assign(D_A, parse_layers(["frozen"]), fractions={"*": 0.6})
    rule = assignment.rules[assignment.chosen["D_A.model.0.weight"]]
    assert (rule.action, rule.frozen) == ("merge", True)
    assert layers_of(assignment.taken(0)) == D_LOW


def test_each_subnetwork_may_have_a_strategy_of_its_own() -> None:
    strategies: Mapping[str, object] = {"subnetwork": {"D_*": "all", "G_*": "low-level"}}
    assignment = assign(CYCLEGAN, parse_layers(strategies), fractions={"*": 0.2})
    assert assignment.taken(0) == [n for n in CYCLEGAN if n.startswith("D_")]
    assert layers_of(assignment.taken(1)) == {"G_A.model.1", "G_B.model.1"}
    spelt_out = assign(CYCLEGAN, parse_layers(["D_*=all", "G_*=low-level"]), fractions={"*": 0.2})
    assert assignment.chosen == spelt_out.chosen


@pytest.mark.parametrize(
    ("given_as", "expected"),
    [
        (None, {}), (0.3, {"*": 0.3}), ("0.3", {"*": 0.3}), (["D_*=0.6"], {"D_*": 0.6}),
        (("D_*=0.6", "G_*=0.3"), {"D_*": 0.6, "G_*": 0.3}), ({"D_*": 0.6}, {"D_*": 0.6}),
        (["re:a=b=0.5"], {"re:a=b": 0.5}), (1, {"*": 1.0}), ([], {}),
    ],
)  # fmt: skip
def test_fractions_are_one_number_or_one_a_pattern(given_as: object, expected: object) -> None:
    assert parse_fractions(given_as) == expected


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, "half", "nan", "inf", "", "D_*="])
def test_a_fraction_outside_0_to_1_is_told(fraction: object) -> None:
    with pytest.raises(RuleError, match=r"not a fraction in \(0, 1\]"):
        parse_fractions(fraction)


# Natural order


def test_numbers_in_names_are_compared_as_numbers() -> None:
    names = [
        "blocks.10.w",
        "blocks.2.w",
        "blocks.1.w",
        "block",
        "blocks.2.b",
        "a2b10",
        "a2b9",
        "a10",
    ]
    assert sorted(names, key=natural_key) == [
        "a2b9", "a2b10", "a10", "block", "blocks.1.w", "blocks.2.b", "blocks.2.w", "blocks.10.w",
    ]  # fmt: skip


@given(st.lists(st.text(), max_size=5), st.integers(0, 10**30), st.integers(0, 10**30))
def test_any_names_can_be_ordered(names: list[str], first: int, second: int) -> None:
    # '²' is a digit to str.isdigit and not to int(), which refuses 5,000 digits too.
    large = "x." + "1" * 5000
    ordered = sorted([*names, "x.²", large, "x.٣", f"x.{first}"], key=natural_key)
    assert [n for n in ordered if n in (f"x.{first}", large)] == [f"x.{first}", large]
    assert ordered.index(large) < ordered.index("x.²") < ordered.index("x.٣")
    ordered.reverse()
    backwards = sorted(ordered, key=natural_key)
    assert [*map(natural_key, backwards)] == [*map(natural_key, reversed(ordered))]
    assert (natural_key(f"x{first}.a") < natural_key(f"x{second}.b")) == (first <= second)


# Speed


def test_a_hundred_thousand_names_are_assigned_within_three_seconds() -> None:
    layers = [
        f"{net}.blocks.{i}" for net in ("G_A", "G_B", "D_A", "D_B", "E") for i in range(10_000)
    ]
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    rules = parse_layers(
        ["D_*=low-level", "*.7.bias=drop", r"re:G_.*\.\d+\.weight=0.3", "G_*=second"]
    )
    start = time.process_time()
    assignment = assign(names, rules, fractions={"*": 0.3})
    took = time.process_time() - start
    assert len(assignment.chosen) == 100_000
    assert len(assignment.taken(0)) == 12_000
    assert took < 3


def test_a_hundred_thousand_names_do_not_slow_the_nearest_down() -> None:
    names = [f"model.layers.{i}.weight" for i in range(100_000)]
    start = time.process_time()
    assert "did you mean 'model" in refusal(names, "modle.*")
    assert time.process_time() - start < 3


def test_each_part_of_a_pipeline_has_a_depth_of_its_own() -> None:
    names = [f"{part}/{layer}.weight" for part in ("unet", "vae") for layer in ("conv.1", "conv.2")]
    found = taken(names, "low-level", fractions={"*": 0.5})[0]
    assert found == ["unet/conv.1.weight", "vae/conv.1.weight"]


def test_groups_that_name_a_group_twice_are_looked_at_once() -> None:
    names = [f"layer.{number}.w" for number in range(100)]
    groups = {f"g{n}": [f"group:g{n + 1}", f"group:g{n + 1}"] for n in range(60)} | {
        "g60": ["*.7.w"]
    }
    start = time.process_time()
    chosen = assign(names, [Rule("group:g0")], rest="first", groups=groups).chosen
    assert [name for name in names if chosen[name] == 0] == ["layer.7.w"]
    assert time.process_time() - start < 2


def test_groups_in_groups_without_end_are_told() -> None:
    groups = {f"g{n}": [f"group:g{n + 1}"] for n in range(5000)} | {"g5000": ["*"]}
    with pytest.raises(RuleError, match="the group 'g101' is nested more than 100 deep in others"):
        assign(["w"], [Rule("group:g0")], rest="first", groups=groups)
