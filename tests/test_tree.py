"""Trees: the shapes of the paper's figure 1, and every fault of a plan's file with its place."""

from __future__ import annotations

import re
import time
from pathlib import Path

import networkx
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file
from trainers import network

import modelsoup
from modelsoup import FineTune, Load, Merge, PlanError, Train, Training, binary_tree, parse_tree
from modelsoup.files.yaml_text import parse_yaml
from modelsoup.terminal.cli import main
from modelsoup.trees.tree_yaml import json_schema

TUNE = FineTune(Training("trainers:Add", {"add": 0.5}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate("abcd"):
        save_file(network(number), tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ("{of: [a, b], finetune: OWN}", True),
        ("{of: [a, b], merge: {estimates: []}, finetune: OWN}", False),
        ("{of: [a, b]}", False),
        ("{of: [a, trained]}", True),
        ("{of: [{of: [a]}, {pair: [b, nested]}]}", True),
        ("{of: [trained, b], finetune: OTHER}", False),
        ("{of: [a, b], finetune: false}\ndefaults: {finetune: OWN}", True),
        ("{of: [{of: [a, b], finetune: OWN}, b]}", True),
    ],
)
def test_a_plans_trainers_tell_which_tensors_are_found_anew(plan: str, told: bool) -> None:
    own, other = (f"{{trainer: 'trainers:{name}', add: 1}}" for name in ("Estimating", "Add"))
    models = "{a: a.safetensors, b: b.safetensors, trained: {train: OWN}, nested: {of: [trained]}}"
    text = f"soup: 1\nmodels: {models}\ntree: {plan}\n"
    tree, _ = parse_tree(text.replace("OWN", own).replace("OTHER", other))
    operation = tree.operation(tree.root)
    merge = operation if isinstance(operation, Merge) else tree.operation(tree.inputs(tree.root)[0])
    assert isinstance(merge, Merge)
    assert merge.recipe.estimates == (("*.high.w", "*.nowhere") if told else ())


def test_a_plan_says_what_a_merge_leaves_out_for_its_trainer_to_find(folder: Path) -> None:
    own = "{trainer: 'trainers:Estimating', add: 1}"
    models = "{a: a.safetensors, b: b.safetensors}"
    tree = folder / "tree.yaml"
    tree.write_text(
        f"soup: 1\nmodels: {models}\n"
        f"tree: {{of: [a, b], merge: {{layers: ['D.low.*=drop', '*']}}, finetune: {own}}}\n"
    )
    told = CliRunner().invoke(main, ["plan", str(tree)])
    assert told.exit_code == 0, told.output
    assert "dropped 3 (19), 2 of them to be found anew" in " ".join(told.output.split())
    node = modelsoup.check(modelsoup.read_tree(tree)[0]).nodes["root.merge"]
    assert node.estimates == ("D.high.w", "G.high.w")
    assert node.notices == ()  # nothing to be warned of


def kinds(tree: modelsoup.Tree) -> list[str]:
    return [type(operation).__name__ for _, operation in tree.operations()]


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 7])
def test_a_symmetric_tree_has_the_papers_numbers(levels: int) -> None:
    leaves = {f"m{n}": f"{n}.safetensors" for n in range(2 ** (levels - 1))}
    tree = binary_tree(leaves, finetune=TUNE, shuffle=3)
    assert len(tree.models()) == 2**levels - 1
    assert tree.levels == levels
    assert kinds(tree).count("FineTune") == kinds(tree).count("Merge") == 2 ** (levels - 1) - 1
    assert networkx.is_arborescence(tree.graph.reverse())


def test_figure_1_a_two_pairs_and_their_pair() -> None:
    tree = binary_tree({n: n for n in "abcd"}, finetune=TUNE)
    assert tree.root == "root"
    assert tree.inputs("root.merge") == ["root.2-1", "root.2-2"]
    assert tree.inputs("root.2-1.merge") == ["a", "b"]
    assert tree.inputs("root.2-2.merge") == ["c", "d"]
    assert kinds(tree) == ["Load"] * 4 + ["Merge"] * 2 + ["FineTune"] * 2 + ["Merge", "FineTune"]


def test_figure_1_b_the_odd_model_is_fine_tuned_alone_and_goes_up() -> None:
    tree = binary_tree({"vs": "vs", "fast": "f", "hz": "hz"}, finetune=TUNE, odd="hz", shuffle=1)
    assert tree.operation("fast") == Load(Path("f"))
    assert len(tree.models()) == 6  # 3 + 2 + 1
    assert tree.levels == 3
    assert sorted(tree.inputs("root.merge")) == ["root.2-1", "root.2-2"]
    assert sorted(tree.inputs("root.2-1.merge")) == ["fast", "vs"]
    assert tree.inputs("root.2-2") == ["hz"]  # no merge between
    assert isinstance(tree.operation("root.2-2"), FineTune)


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7, 11])
@pytest.mark.parametrize("odd", ["random", "last"])
def test_every_leaf_gets_into_every_tree_once(count: int, odd: str) -> None:
    leaves = {f"m{n}": f"{n}" for n in range(count)}
    tree = binary_tree(leaves, finetune=TUNE, shuffle=5, odd=odd)
    assert {n for n in tree.graph if tree.graph.in_degree(n) == 0} == set(leaves)
    assert tree.below(tree.root) == set(tree.graph)


@pytest.mark.parametrize("count", range(3, 18))
def test_what_goes_up_alone_is_merged_at_the_next_level(count: int) -> None:
    """Figure 1 (b), at every level and with every choice of the odd one."""
    leaves = {f"m{n}": f"{n}" for n in range(count)}
    for odd in ("random", "last", *leaves):
        for shuffle in (None, 1):
            tree = binary_tree(leaves, finetune=TUNE, shuffle=shuffle, odd=odd)
            alone = [
                node for node, operation in tree.operations()
                if isinstance(operation, FineTune)
                and not isinstance(tree.operation(tree.inputs(node)[0]), Merge)
            ]  # fmt: skip
            for node in alone:
                parent = tree.parent(node)
                assert parent is not None and isinstance(tree.operation(parent), Merge), odd
            first = [tree.inputs(node) for node in alone if tree.inputs(node)[0] in leaves]
            assert len(first) == count % 2
            if count % 2 and odd in leaves:
                assert first == [[odd]]
            assert tree.levels == 1 + (count - 1).bit_length()
            plain = binary_tree(leaves, shuffle=shuffle, odd=odd)
            merges = {leaf: len(networkx.descendants(plain.graph, leaf)) for leaf in leaves}
            # Of n levels of merges, none is left out twice in a row.
            assert min(merges.values()) >= tree.levels // 2
            assert len(networkx.dag_longest_path(plain.graph)) == tree.levels


def test_without_fine_tuning_an_odd_model_goes_up_as_it_is() -> None:
    tree = binary_tree({n: n for n in "abc"}, odd="last")
    assert kinds(tree).count("Merge") == 2
    assert tree.inputs("root") == ["root.2-1", "c"]


def test_the_shuffle_is_seeded() -> None:
    def pairs(seed: int | None) -> list[list[str]]:
        tree = binary_tree({f"m{n}": f"{n}" for n in range(8)}, shuffle=seed)
        return [tree.inputs(n) for n, o in tree.operations() if isinstance(o, Merge)]

    assert pairs(1) == pairs(1)
    assert pairs(1) != pairs(2)
    assert pairs(None)[0] == ["m0", "m1"]


def test_paths_name_themselves_and_may_repeat() -> None:
    tree = binary_tree(["x/a.safetensors", "y/a.safetensors"])
    assert tree.inputs("root") == ["a", "a#2"]


@pytest.mark.parametrize(
    ("leaves", "odd", "said"),
    [
        ({}, "random", "a tree needs at least one leaf"),
        ({"fast": "f", "slow": "s", "odd": "o"}, "fsat", "odd is 'fsat'; did you mean 'fast'"),
    ],
)
def test_a_tree_that_cannot_be_is_said(leaves, odd, said) -> None:
    with pytest.raises(PlanError, match=said):
        binary_tree(leaves, odd=odd)


# --- tree.yaml ---------------------------------------------------------------------------------

BASED = "method: task_arithmetic, base: c.safetensors, weight: 0.5"
HEAD = """soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors, d: d.safetensors}
"""


def test_pairs_and_explicit_nesting_are_the_same_tree(folder: Path) -> None:
    paired, _ = parse_tree(HEAD + "tree: {pair: [a, b, c, d]}\n", folder=folder)
    spelt, _ = parse_tree(
        HEAD + "tree: {of: [{of: [a, b], name: root.2-1}, {of: [c, d], name: root.2-2}]}\n",
        folder=folder,
    )
    assert sorted(paired.graph.edges) == sorted(spelt.graph.edges)
    assert paired.operation("a") == Load(folder / "a.safetensors")


def test_a_node_overrides_the_defaults(folder: Path) -> None:
    tree, warnings = parse_tree(
        """
soup: 1
seed: 3
models:
  a: a.safetensors
  t: {train: {trainer: "trainers:Add", add: 2e-1}, start: b.safetensors}
  sub: {of: [a, t], merge: {weights: [0.2, 0.8]}, finetune: false}
  lost: c.safetensors
defaults:
  merge: {beta: 0.3, layers: {low-level: merge, rest: drop}}
  finetune: {trainer: "trainers:Add", add: 5, steps: 2}
tree: {of: [sub, {path-like: no}]}
""".replace(", {path-like: no}", ", a"),
        folder=folder,
    )
    train = tree.operation("t")
    assert train == Train(Training("trainers:Add", {"add": 0.2}), folder / "b.safetensors")
    sub, root = tree.operation("sub"), tree.operation("root.merge")
    assert (sub.recipe.beta, sub.recipe.weights) == (None, (0.2, 0.8))
    assert (root.recipe.beta, root.recipe.rest) == (0.3, "drop")
    assert root.recipe.groups == {"low-level": ["*.low.*"]}  # the trainer's
    assert tree.operation("root").training.options == {"add": 5, "steps": 2}
    assert tree.inputs("root.merge") == ["sub", "a#2"]
    assert tree.seed == 3
    assert warnings == ["the plan:8:3: the model 'lost' is not used"]


def test_another_trainer_does_not_get_the_defaults_options(folder: Path) -> None:
    tree, _ = parse_tree(
        HEAD
        + """defaults: {finetune: {trainer: "trainers:Add", add: 5}}
tree: {of: [a, b], finetune: {command: ["true", "{output}"]}}
""",
        folder=folder,
    )
    assert tree.operation("root").training == Training(
        "command", {"command": ["true", "{output}"], "folder": str(folder)}
    )


FAULTS = [
    ("tree: {of: [a, b]}\n", "the plan:1:1: the plan has no 'soup'"),
    ("soup: 2\nmodels: {a: x}\ntree: a\n", "the plan:1:1: soup is 2, but this version reads"),
    (
        HEAD + "tree: {off: [a, b]}\n",
        "the plan:3:8: tree is .*a model's name, or a node with `of` or `pair`; did you mean 'of'",
    ),
    ("soup: 1\nmodels: {a: {pth: x}}\ntree: a\n", "the plan:2:14: .*; did you mean 'path'"),
    (HEAD + "tree: {of: [a, bb]}\n", r"the plan:3:16: no model is called 'bb'.*'b'"),
    (HEAD + "tree: {of: [a, b], bogus: 1}\n", "the plan:3:20: unknown key 'bogus'"),
    (HEAD + "tree: {of: [a, b], mrege: {}}\n", "unknown key 'mrege'; did you mean 'merge'"),
    (HEAD + "defautls: {}\ntree: a\n", "unknown key 'defautls'; did you mean 'defaults'"),
    (
        HEAD + "tree: {of: [a, b], merge: {bta: 0.5}}\n",
        "the plan:3:28: .*unknown key 'bta'.*'beta'",
    ),
    (HEAD + "tree: {of: [a, b], merge: {beta: 2}}\n", "the plan:3:28: beta is 2, but must be"),
    (HEAD + "tree: {of: [a, b], finetune: {}}\n", "the plan:.*there is no 'trainer' and no 'comm"),
    (HEAD + "tree: {of: [a, b], finetune: {trainer: pix2pics}}\n", "did you mean 'pix2pix'"),
    (HEAD + "tree: {of: [a, b], finetune: {trainer: commnd}}\n", "did you mean 'command'"),
    (
        HEAD + 'tree: {of: [a, b], finetune: {trainer: "trainers:Add", adds: 1}}\n',
        "the plan:3:56: the trainer 'add' has no option 'adds'; did you mean 'add'",
    ),
    (
        HEAD + 'tree: {of: [a, b], finetune: {trainer: "trainers:Add", add: much}}\n',
        "the option 'add' of the trainer 'add' is 'much'",
    ),
    (
        HEAD + 'tree: {of: [a, b], finetune: {trainer: "trainers:NoTrainer"}}\n',
        "'trainers:NoTrainer' is no trainer",
    ),
    (
        HEAD + 'tree: {of: [a, b], finetune: {command: ["true"]}}\n',
        "command never names {output}",
    ),
    (
        "soup: 1\nmodels: {x: {of: [y]}, y: {of: [x]}}\ntree: x\n",
        "the model 'x' is made of itself: x → y → x",
    ),
    (
        "soup: 1\nmodels: {a: a, b: b, c: {of: [a, b], name: n}}\n"
        "tree: {of: [c, {of: [a, b], name: n}]}\n",
        "two nodes are called 'n'",
    ),
    (
        "soup: 1\nmodels: {n: a, b: b}\ntree: {of: [n, {of: [b, b], name: n}]}\n",
        "two nodes are called 'n'",
    ),
    (HEAD + "tree: {pair: [a, b, c], odd: z}\n", "the plan:3:1: odd is 'z'"),
    (
        HEAD + "tree: {pair: [a]}\n",
        r"tree.pair is \['a'\], but must be a list of at least 2 items$",
    ),
    (HEAD + "tree: {of: []}\n", r"tree.of is \[\], but must be a list of at least 1 item$"),
    ("soup: 1\nmodels: {}\ntree: a\n", "models is {}, but must be a mapping of at least 1 item$"),
    (
        HEAD + "groups: {" + ", ".join(f"g{n}: [x]" for n in range(1001)) + "}\ntree: a\n",
        "groups is {.*}, but must be a mapping of at most 1,000 items$",
    ),
    ("soup: 1\nsoup: 1\n", "the plan:2:1: the key 'soup' occurs twice"),
    ("soup: !!python/object:os.system 1\n", "the plan:1:7: the tag .* is not allowed"),
    ("a: [1,\n", "the plan:2:1:"),
    ("- 1\n", "a plan is a mapping"),
    ("", "a plan is a mapping"),
]


FAULTS += [
    (
        HEAD + "tree: {of: [a, b], finetune: yes}\n",
        "3:20: tree.finetune is 'yes', but must be a map",
    ),
    (HEAD + "tree: {of: [a, b], finetune: true}\n", "is True, but must be a mapping or false$"),
    (HEAD + "tree: {of: [a, b], merge: {base: ''}}\n", "the plan:3:28: base is '', not a path$"),
    (
        "soup: 1\nmodels: {a: {train: {trainer: 'trainers:Add'}, start: ''}}\ntree: a\n",
        "the plan:2:48: start is '', not a path$",
    ),
    (HEAD + "tree: {of: [a, b], finetune: 0}\n", "finetune is 0, but must be a mapping or false$"),
    (HEAD + "tree: {of: [a, b], finetune: 1e-400}\n", "is 0.0, but must be a mapping or false$"),
    (HEAD + "tree: {pair: [a, b], shuffle: 0.0}\n", "is 0.0, but must be an integer or false$"),
    ("soup: true\nmodels: {a: x}\ntree: a\n", "soup is True, but this version reads schema 1"),
    (HEAD + "tree: {pair: [a, b], shuffle: 1.5}\n", "is 1.5, but must be an integer or false$"),
    (HEAD + "tree: {pair: [a, b], shuffle: true}\n", "is True, but must be an integer or false$"),
    (HEAD + "tree: {of: [a, b], merge: 3}\n", "tree.merge is 3, but must be a mapping$"),
    (HEAD + "tree: {of: [a, b], name: [x]}\n", r"tree.name is \['x'\], but must be a text$"),
    (HEAD + "tree: {of: a}\n", "tree.of is 'a', but must be a list$"),
    (HEAD + "groups: {g: x}\ntree: a\n", "the plan:3:10: groups.g is 'x', but must be a list$"),
    (HEAD + "seed: true\ntree: a\n", "seed is True, but must be an integer$"),
    (HEAD + "defaults: {merge: 3}\ntree: a\n", "defaults.merge is 3, but must be a mapping$"),
    ("soup: 1\nmodels: 3\ntree: a\n", "models is 3, but must be a mapping$"),
    (
        "soup: 1\nmodels: {a: {path: [x]}}\ntree: a\n",
        r"models.a.path is \['x'\], but must be a text",
    ),
    ("soup: 1\nmodels: {a: {train: x}}\ntree: a\n", "models.a.train is 'x', but must be a mapping"),
    (
        HEAD + 'tree: {of: [a, b], finetune: {trainer: "trainers:Ad"}}\n',
        "the plan:3:31: .*trainers has no 'Ad'; did you mean 'Add'",
    ),
    (
        HEAD + 'tree: {of: [a, b], finetune: {trainer: "trainers:Add", steps: 1.5}}\n',
        "the plan:3:56: the option 'steps' of the trainer 'add' is 1.5, but must be an integer$",
    ),
]


@pytest.mark.parametrize(("text", "said"), FAULTS)
def test_a_fault_is_said_with_its_place(text: str, said: str, folder: Path) -> None:
    with pytest.raises(PlanError, match=said):
        parse_tree(text, folder=folder)


WRONG = ["yes", "3", "1.5", "true", "null", "[x]", "{x: y}"]


@pytest.mark.parametrize("given", WRONG)
def test_no_fault_is_told_in_the_validators_own_words(given: str, folder: Path) -> None:
    texts = [f"soup: {given}\n", f"seed: {given}\n", f"models: {given}\n", f"groups: {given}\n"]
    texts += [f"defaults: {given}\n", f"tree: {given}\n", f"models: {{a: {given}}}\n"]
    texts += [f"models: {{a: {{path: x, xxh3_128: {given}}}}}\n"]
    texts += [f"models: {{a: {{train: {given}, start: {given}}}}}\n", f"groups: {{a: [{given}]}}\n"]
    for key in ("name", "merge", "finetune"):
        texts.append(HEAD + f"tree: {{of: [a, b], {key}: {given}}}\n")
    for key in ("shuffle", "odd"):
        texts.append(HEAD + f"tree: {{pair: [a, b], {key}: {given}}}\n")
    for key in ("command", "env", "timeout", "files", "folder", "resources", "seed", "trainer"):
        options = {"command": '[x, "{output}"]', key: given}
        told = ", ".join(f"{name}: {value}" for name, value in options.items())
        texts.append(HEAD + f"tree: {{of: [a, b], finetune: {{{told}}}}}\n")
    said = []
    for text in texts:
        try:
            parse_tree(text, folder=folder)
        except PlanError as error:
            said += error.args
    assert len(said) > 15
    for line in said:
        assert re.match(r"the plan:\d+:\d+: ", line), line
        assert not re.search("Input|valid|instance|pydantic|string|dictionary|parse", line), line


def test_what_is_wrong_in_the_defaults_is_told_once_where_it_stands(folder: Path) -> None:
    text = (
        HEAD
        + """defaults:
  merge: {beta: 0.5, dtpye: f16}
  finetune:
    trainer: "trainers:Add"
    stesp: 3
tree:
  of:
    - {of: [a, b], finetune: {add: 2}}
    - {of: [c, d], merge: {seed: 2}, finetune: {ad: 2}}
  merge: {weights: [1, x]}
"""
    )
    with pytest.raises(PlanError) as caught:
        parse_tree(text, folder=folder)
    found = [
        re.match(r"the plan:(\d+:\d+): .*'(\w+)'; did you mean", str(a)) for a in caught.value.args
    ]
    assert [match.groups() for match in found if match] == [
        ("7:5", "stesp"), ("4:22", "dtpye"),
    ]  # fmt: skip


def test_a_hundred_faults_are_told_and_no_more(folder: Path) -> None:
    wrong = ", ".join(f"{{of: [a, x{number}]}}" for number in range(300))
    with pytest.raises(PlanError) as caught:
        parse_tree(HEAD + f"tree: {{of: [{wrong}]}}\n", folder=folder)
    assert len(caught.value.args) == 102
    assert caught.value.args[-1] == "no further faults were looked for"
    unknown = "".join(f"k{number}: 1\n" for number in range(300))
    with pytest.raises(PlanError, match="and 200 faults more") as caught:
        parse_tree(f"{HEAD}tree: a\n{unknown}", folder=folder)
    assert len(caught.value.args) == 101


def test_where_many_options_are_given_a_fault_is_told_of_all_of_them(folder: Path) -> None:
    options = ", ".join(f"x{number}: 1" for number in range(20_000))
    start = time.process_time()
    for kind in ("merge", 'finetune: {trainer: "trainers:Add", ', "merge: {layers: "):
        opened = f"{kind}: {{" if kind == "merge" else kind
        inner = f"{{{options}}}" if kind.endswith("layers: ") else options
        text = HEAD + f"tree: {{of: [a, b], {opened}{inner}}}}}\n"
        try:
            tree, _ = parse_tree(text, folder=folder)
        except PlanError as error:
            assert re.match("the plan:3:20: .*'x0'", str(error))
        else:
            assert len(tree.operation("root").recipe.layers) == 20_000
    assert time.process_time() - start < 20


def test_defaults_that_swell_with_the_nodes_are_refused(folder: Path) -> None:
    nodes = ", ".join("{of: [a, b]}" for _ in range(2000))
    tree = f"tree: {{of: [{nodes}]}}\n"
    groups = ", ".join(f"g{number}: [x]" for number in range(900))
    long = "x" * 20_000
    for text in (
        f"groups: {{{groups}}}\ndefaults: {{merge: {{layers: ['group:g1']}}}}\n",
        f"defaults: {{merge: {{layers: ['{long}']}}}}\n",
        f"defaults: {{finetune: {{trainer: 'trainers:Add', note: '{long}'}}}}\n",
    ):
        start = time.process_time()
        with pytest.raises(
            PlanError, match="spelt out with their defaults, have more than 500,000"
        ):
            parse_tree(HEAD + text + tree, folder=folder)
        assert time.process_time() - start < 20


def test_a_nodes_own_rest_goes_over_that_of_the_defaults(folder: Path) -> None:
    text = HEAD + 'defaults: {merge: {layers: {"D.*": 0.5, rest: first}}}\n'
    tree, _ = parse_tree(text + "tree: {of: [a, b], merge: {rest: drop}}\n", folder=folder)
    recipe = tree.operation("root").recipe
    assert (recipe.rest, [str(rule) for rule in recipe.layers]) == (
        "drop",
        ["D.* → merge; beta:0.5"],
    )
    tree, _ = parse_tree(text + "tree: {pair: [a, b]}\n", folder=folder)
    assert tree.operation("root").recipe.rest == "first"


def test_defaults_are_the_same_in_either_spelling(folder: Path) -> None:
    text = HEAD + "defaults: {merge: {on-integer: max, low-level: 0.5, layers: low-level}}\n"
    tree, _ = parse_tree(
        text + "tree: {of: [a, b], merge: {method: slerp, t: 0.5}}\n", folder=folder
    )
    recipe = tree.operation("root").recipe
    assert (recipe.on_integer, recipe.low_level) == ("max", {"*": 0.5})
    wrong = text.replace("max", "mx") + "tree: {of: [a, b], merge: {seed: 3}}\n"
    with pytest.raises(PlanError, match="the plan:3:20: on_integer is 'mx'; did you mean 'max'"):
        parse_tree(wrong, folder=folder)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/dev", "/dev holds no "),
        ("/dev/zero", "/dev/zero is not a regular file|cannot read /dev/zero: it is not a regular"),
        ("x" * 300, "cannot read .*x{300}: File name too long"),
        ("y/" * 3000, "cannot read .*: File name too long"),
        ("a.safetensors/x", "cannot read .*a.safetensors/x: Not a directory"),
        ("nowhere/x", "does not exist"),
    ],
)
@pytest.mark.parametrize("where", ["leaf", "base", "start", "script"])
def test_a_path_that_leads_to_no_model_is_told_with_its_place(
    where: str, path: str, said: str, folder: Path
) -> None:
    start = time.process_time()
    train = f'{{train: {{trainer: "trainers:Add"}}, start: "{path}"}}'
    leaf = {"leaf": f'"{path}"', "start": train}.get(where, "a.safetensors")
    merge = f"{{{BASED.replace('c.safetensors', path)}}}" if where == "base" else "{}"
    command = f'{{command: [x, "{{output}}"], files: ["{path}"]}}'
    tune = command if where == "script" else "false"
    tree, _ = parse_tree(
        f"soup: 1\nmodels: {{a: {leaf}}}\ntree: {{of: [a, a], merge: {merge}, finetune: {tune}}}\n",
        folder=folder,
    )
    (problem,) = modelsoup.check(tree).problems
    assert time.process_time() - start < 5  # it is not searched for its companions
    if where == "script":
        said = "the command's file .* (does not exist|is no file)|cannot read .*File name too long"
    assert re.search(f"^the plan:[23]:.*: (?:.*{said})", problem)


# A node with one model


def test_a_node_with_one_model_and_a_merge_of_its_own_merges(folder: Path) -> None:
    defaults = "defaults: {merge: {beta: 0.3, dtype: f32}}\n"
    tree, _ = parse_tree(
        HEAD + defaults + f"tree: {{of: [a], merge: {{{BASED}}}}}\n", folder=folder
    )
    assert isinstance(tree.operation("root"), Merge)
    report = modelsoup.run(tree, folder / "out.safetensors", store=folder / "store")
    made = modelsoup.open_checkpoint(report.output)
    for name, values in network(0).items():
        base = network(2)[name]
        np.testing.assert_allclose(made[name], base + np.float32(0.5) * (values - base), rtol=1e-5)


@pytest.mark.parametrize("more", ["", ", merge: {}", ", merge: null"])
def test_a_node_with_one_model_and_no_merge_of_its_own_takes_it_as_it_is(
    more: str, folder: Path
) -> None:
    text = HEAD + "defaults: {merge: {dtype: f16}}\n"
    tree, _ = parse_tree(text + f"tree: {{of: [{{of: [a]{more}}}, b]}}\n", folder=folder)
    assert tree.inputs("root") == ["a", "b"]


@pytest.mark.parametrize(
    ("defaults", "tree", "said"),
    [
        ("dtype: bf16, beta: 0.5", "{of: [a]}", "the plan:4:1: a: .* says of dtype "),
        ("dtype: bf16", "{of: [{of: [a]}, {of: [b]}]}", r"the plan:4:13: a \(and b\): one model"),
        ("method: task_arithmetic, base: c.safetensors", "{of: [a]}", "says of method "),
        ("layers: {'D.*': freeze}", "{of: [a], finetune: {trainer: 'trainers:Add'}}",
         "4:1: root: .* says of layers "),
        ("layers: {'D.*': merge, rest: drop}", "{of: [a]}", "says of rest "),
        ("layers: {'D.*': drop}", "{of: [a]}", "says of layers "),
    ],
)  # fmt: skip
def test_a_default_that_one_model_is_taken_without_is_a_warning(
    defaults: str, tree: str, said: str, folder: Path
) -> None:
    text = HEAD + f"defaults: {{merge: {{{defaults}}}}}\ntree: {tree}\n"
    (found,) = (w for w in parse_tree(text, folder=folder)[1] if "is not used" not in w)
    assert re.search(said, found)


@pytest.mark.parametrize(
    ("defaults", "tree"),
    [
        ("beta: 0.5, layers: all", "{of: [a]}"),
        ("method: slerp, t: 0.5", "{of: [a]}"),
        ("dtype: bf16", "{of: [a, b]}"),
        ("dtype: bf16", "{of: [a], merge: {dtype: f16}}"),
    ],
)
def test_a_default_that_says_nothing_of_one_model_is_no_warning(
    defaults: str, tree: str, folder: Path
) -> None:
    text = HEAD + f"defaults: {{merge: {{{defaults}}}}}\ntree: {tree}\n"
    assert not [w for w in parse_tree(text, folder=folder)[1] if "is not used" not in w]


def test_one_model_merged_alone_is_converted_and_fine_tuned(folder: Path) -> None:
    text = (
        HEAD
        + 'tree: {of: [a], merge: {dtype: f64}, finetune: {trainer: "trainers:Plain", add: 1}}\n'
    )
    tree, _ = parse_tree(text, folder=folder)
    assert [type(o) for _, o in tree.operations()] == [Load, Merge, FineTune]
    report = modelsoup.run(tree, folder / "out.safetensors", store=folder / "store")
    made = modelsoup.open_checkpoint(report.output)
    for name, values in network(0).items():
        np.testing.assert_array_equal(made[name], values.astype(np.float64) + 1)


def test_a_merge_of_one_model_with_a_method_for_two_is_refused(folder: Path) -> None:
    tree, _ = parse_tree(HEAD + "tree: {of: [a], merge: {method: slerp, t: 0.5}}\n", folder=folder)
    (problem,) = modelsoup.check(tree).problems
    assert re.search("the plan:3:1: root: .*slerp.* 2", problem)


def test_a_merge_of_one_model_comes_back_from_its_lineage(folder: Path) -> None:
    modelsoup.merge(
        [folder / "a.safetensors"], folder / "one.safetensors", base=folder / "c.safetensors",
        method="task_arithmetic", weights=[0.5],
    )  # fmt: skip
    tree, _ = parse_tree(modelsoup.plan_text(folder / "one.safetensors"), folder=folder)
    report = modelsoup.run(tree, folder / "again.safetensors", store=folder / "store")
    expected = modelsoup.open_checkpoint(folder / "one.safetensors")
    for name, values in modelsoup.open_checkpoint(report.output).items():
        np.testing.assert_array_equal(values, expected[name])


def test_an_odd_model_that_goes_up_alone_is_not_merged(folder: Path) -> None:
    text = HEAD + "tree: {pair: [a, b, c], odd: last, merge: {dtype: f16}}\n"
    tree, _ = parse_tree(text, folder=folder)
    assert tree.inputs("root") == ["root.2-1", "c"]


def test_a_nodes_other_method_keeps_what_holds_for_any_method(folder: Path) -> None:
    tree, _ = parse_tree(
        HEAD
        + """defaults: {merge: {dtype: F16, seed: 010, beta: 0.2}}
tree: {of: [a, b], merge: {method: slerp, t: 0.5}}
""",
        folder=folder,
    )
    recipe = tree.operation("root").recipe
    assert (recipe.dtype, recipe.seed, recipe.beta) == ("F16", 10, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD + "tree: {of: [a, b], merge: {groups: 3}}\n", "groups is 3, not a mapping"),
        (HEAD + "tree: {of: [a, b], merge: {groups: {g: 3}}}\n", "the group 'g' is no list"),
        (
            HEAD + 'tree: {of: [a, b], finetune: {command: [x, "{output}"], folder: 3}}\n',
            "the command's folder 3 is no folder",
        ),
        (HEAD + 'tree: {of: [a, b], name: "x\\0"}\n', "has control characters"),
    ],
)
def test_wrong_types_anywhere_are_said(text: str, said: str, folder: Path) -> None:
    with pytest.raises(PlanError, match=said):
        parse_tree(text, folder=folder)


def test_a_plan_that_swells_by_its_names_is_refused(folder: Path) -> None:
    doubled = "".join(f"  m{n}: {{of: [m{n - 1}, m{n - 1}]}}\n" for n in range(1, 40))
    text = f"soup: 1\nmodels:\n  m0: a.safetensors\n{doubled}tree: m39\n"
    with pytest.raises(PlanError, match="more than 20,000 nodes"):
        parse_tree(text, folder=folder)
    deep = "".join(f"  m{n}: {{of: [m{n - 1}, a]}}\n" for n in range(1, 1100))
    text = f"soup: 1\nmodels:\n  a: a\n  m0: b\n{deep}tree: mLAST\n"
    with pytest.raises(PlanError, match="nested more than 1000 deep"):
        parse_tree(text.replace("LAST", "1099"), folder=folder)
    tree, _ = parse_tree(text.replace("LAST", "900"), folder=folder)  # as a running average is
    assert tree.levels == 901


def test_several_faults_of_form_are_told_at_once(folder: Path) -> None:
    with pytest.raises(PlanError) as caught:
        parse_tree(HEAD + "seed: x\nbogus: 1\ntree: {of: [a], more: 2}\n", folder=folder)
    assert len(str(caught.value).splitlines()) == 3


def test_all_faults_of_content_are_told_at_once_each_with_its_place(folder: Path) -> None:
    text = (
        HEAD.replace("d: d.safetensors", 'd: ""')
        + """tree:
  of:
    - {of: [a, b], finetune: {trainer: "trainers:Add", adds: 1}, merge: {bta: 0.5}}
    - {of: [c, e, d], finetune: {trainer: "trainers:Add", resources: {gpus: -1}}}
"""
    )
    with pytest.raises(PlanError) as caught:
        parse_tree(text, folder=folder)
    wanted = [
        "5:56: the trainer 'add' has no option 'adds'", "5:74: merge has the unknown key 'bta'",
        "6:59: resources is {'gpus': -1}, not a mapping to numbers from 0 on",
        "6:16: no model is called 'e'", "2:64: the path of 'd' is empty",
    ]  # fmt: skip
    said = str(caught.value).splitlines()
    assert len(said) == len(wanted)
    for line, part in zip(said, wanted, strict=True):
        assert line.startswith(f"the plan:{part}")


def test_faults_in_what_swells_end(folder: Path) -> None:
    doubled = "".join(f"  m{n}: {{of: [m{n - 1}, m{n - 1}]}}\n" for n in range(1, 40))
    text = f"soup: 1\nmodels:\n  m0: {{of: [nobody]}}\n{doubled}tree: m39\n"
    with pytest.raises(PlanError, match="more than 20,000 nodes"):
        parse_tree(text, folder=folder)


def test_a_document_that_swells_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(PlanError, match="more than 200,000 values"):
        parse_yaml("\n".join(lines), "bomb")
    with pytest.raises(PlanError, match=r"round:1:8: \*a stands for something that it is part of"):
        parse_yaml("a: &a [*a]", "round")


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("1.5e-3", 1.5e-3), (".5", 0.5), ("7", 7), ("no", "no"), ("true", True),
     ("~", None), ("1_000", "1_000"), ("12:30", "12:30"), ("0x10", 16), ("-.inf", -float("inf"))],
)  # fmt: skip
def test_scalars_are_what_yaml_1_2_says(text: str, value: object) -> None:
    assert parse_yaml(f"k: {text}", "x").content == {"k": value}


def test_the_schema_accepts_the_examples_keys() -> None:
    schema = json_schema()
    assert schema["properties"].keys() == {"soup", "seed", "models", "groups", "defaults", "tree"}
    assert schema["additionalProperties"] is False
