"""Parameters of pages: typed, documented, and checked with our own errors before anything is computed."""

import ast
import json

import pytest

from stepcal.errors import InputError
from stepcal.locations import book_folder
from stepcal.report.parameters import PARAMETERS, check_parameters, parse_setting

NOTEBOOKS = sorted(book_folder().glob("*.ipynb"))


def cells_of(path):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_page_declares_typed_and_documented_parameters_and_checks_them(path):
    declared = ast.parse(cells_of(path)[0]).body
    assert all(isinstance(node, ast.AnnAssign) for node in declared)
    for node, line in zip(declared, cells_of(path)[0].splitlines(), strict=True):
        assert ast.unparse(node.annotation) == PARAMETERS[node.target.id].type
        assert "#" in line, f"{node.target.id} has no description"
        check_parameters({node.target.id: ast.literal_eval(node.value)}, node.target.id)
    names = tuple(node.target.id for node in declared)
    calls = [
        tuple(ast.literal_eval(a) for a in node.args[1:])
        for source in cells_of(path)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "check_parameters"
    ]
    assert calls == [names]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_knows_the_types(path):
    from papermill.inspection import inspect_notebook

    for name, about in inspect_notebook(str(path)).items():
        assert about["inferred_type_name"] == PARAMETERS[name].type
        assert about["help"]


@pytest.mark.parametrize(
    ("namespace", "names", "message"),
    [
        ({"seed": 0, "sede": 3}, ("seed",), r"no parameter `sede`; did you mean `seed`\?"),
        ({"seed": 0, "n_seeds": 3}, ("seed",), "no parameter `n_seeds`"),
        ({"seed": -1}, ("seed",), r"`seed=-1` lies outside of 0 to"),
        ({"seed": 1.5}, ("seed",), "is not a whole number"),
        ({"seed": True}, ("seed",), "is not a whole number"),
        ({"n_seeds": 0}, ("n_seeds",), "lies outside of 2 to 200"),
        ({"experiment_id": "llama"}, ("experiment_id",), "is unknown"),
        ({"data": "/nowhere"}, ("data",), "not a folder that exists"),
        ({"source": "guessed"}, ("source",), "measured, simulated"),
        ({"train_share": 0.9, "valid_share": 0.2}, ("train_share", "valid_share"), "leaves nothing to test on"),
        ({"only_experiments": "x,y"}, ("only_experiments",), "is unknown"),
        ({"accelerator": "h900"}, ("accelerator",), "is unknown"),
    ],
)
def test_what_cannot_be_is_refused_by_name_value_and_bound(namespace, names, message):
    with pytest.raises(InputError, match=message):
        check_parameters(namespace, *names)


def test_what_a_notebook_holds_besides_is_no_parameter():
    import math

    namespace = {"seed": 1, "math": math, "In": [], "_dh": [], "get_ipython": len, "sqrt": math.sqrt}
    assert check_parameters(namespace, "seed") == {"seed": 1}


def test_settings_of_the_command_line_are_typed():
    assert parse_setting("seed=3") == ("seed", 3)
    assert parse_setting("train_share = 0.5") == ("train_share", 0.5)
    assert parse_setting("kv_blocks=None") == ("kv_blocks", None)
    for text, message in (("seed", "write name=value"), ("sede=1", "did you mean `seed`"), ("seed=x", "not a whole")):
        with pytest.raises(InputError, match=message):
            parse_setting(text)
