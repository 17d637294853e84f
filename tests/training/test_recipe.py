"""Recipes are parsed whole, and what is wrong in them is named."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from training.dry_run import dry_run
from training.errors import RecipeError
from training.recipe import Recipe, Term, load_recipe, parse_recipe

GOOD = {
    "name": "quarter-dcd-logits",
    "student": {"width": "1/4", "round_to": 8},
    "training": {"epochs": 10, "learning_rate": 0.01, "precision": "bfloat16", "early_stop_epochs": None},
    "distillation": [
        {"method": "dcd", "weight": 0.05, "start_epoch": 2, "ramp_epochs": 4, "options": {"levels": 2}},
        {"method": "logits", "weight": 1},
    ],
}


def test_a_recipe_is_parsed_into_frozen_values() -> None:
    recipe = parse_recipe(GOOD)
    assert recipe.student.width == Fraction(1, 4)
    assert recipe.training.epochs == 10
    assert recipe.distillation[0].options.levels == 2
    assert recipe.distillation[1].weight == 1.0
    assert recipe.method == "dcd + logits"
    assert Recipe("none").method == "none"


def test_the_digest_depends_on_everything_that_defines_the_run() -> None:
    digests = {parse_recipe(GOOD).digest, parse_recipe({**GOOD, "name": "other"}).digest}
    digests.add(parse_recipe({**GOOD, "training": {"epochs": 11}}).digest)
    digests.add(parse_recipe({**GOOD, "distillation": GOOD["distillation"][:1]}).digest)
    assert len(digests) == 4
    assert parse_recipe(GOOD).digest == parse_recipe(GOOD).digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": {"widht": "1/4"}}, "student has no key 'widht'"),
        ({"student": {"width": "none"}}, "student: .*none"),
        ({"student": {"width": "5/4"}}, "width must be over 0"),
        ({"training": {"epochs": "ten"}}, "'ten' is not of type int"),
        ({"training": {"epochs": True}}, "True is not of type int"),
        ({"training": {"learning_rate": "fast"}}, "'fast' is not a number"),
        ({"training": {"precision": "float8"}}, "'float8' is none of auto"),
        ({"training": {"deterministic": True, "loader_processes": 2}}, "one loader"),
        ({"training": 3}, "training must be a mapping"),
        ({"distillation": {"method": "dcd"}}, "must be a list"),
        ({"distillation": [{"weight": 1.0}]}, r"distillation\[0\] names no method"),
        ({"distillation": [{"method": "dcd"}]}, "weight"),
        ({"distillation": [{"method": "dcd", "weight": 1, "option": {}}]}, "has no key 'option'"),
        ({"distillation": [{"method": "dcd", "weight": 1, "options": {"level": 1}}]}, "no option 'level'"),
        ({"distillation": [{"method": "magic", "weight": 1}]}, "no distillation method 'magic'"),
        ({"epochs": 3}, "the recipe has no key 'epochs'"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**GOOD, **change})


def test_a_file_that_is_missing_or_no_yaml_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(tmp_path / "bad.yaml")


def test_the_schedule_is_the_papers() -> None:
    term = Term("dcd", weight=0.01, start_epoch=150, ramp_epochs=800)
    assert [term.weight_at(e) for e in (0, 149, 150)] == [0.0, 0.0, 0.0]
    assert term.weight_at(550) == pytest.approx(0.005)
    assert term.weight_at(950) == term.weight_at(2000) == pytest.approx(0.01)
    assert Term("logits", weight=2.0).weight_at(0) == 2.0
    assert Term("logits", weight=2.0, start_epoch=1).weight_at(0) == 0.0


def test_every_recipe_that_ships_can_be_parsed() -> None:
    folder = Path(__file__).resolve().parents[2] / "training" / "recipes"
    recipes = {path.stem: load_recipe(path) for path in folder.glob("*.yaml")}
    assert recipes
    assert all(recipe.name == stem for stem, recipe in recipes.items())


def test_the_networks_of_published_recipes_have_the_published_parameters() -> None:
    folder = Path(__file__).resolve().parents[2] / "training" / "recipes"
    checked = {}
    for path in folder.glob("*.yaml"):
        recipe = load_recipe(path)
        if recipe.published is not None:
            checked[recipe.name] = dry_run(recipe).student_millions
    assert checked == {
        "isles2022-dcd": "6.406",
        "brats2024-dcd": "6.381",
        "mindboggle101-logits-1of2": "25.64",
        "mindboggle101-logits-1of4": "6.43",
    }


def test_a_recipe_whose_network_is_not_the_papers_is_refused() -> None:
    folder = Path(__file__).resolve().parents[2] / "training" / "recipes"
    recipe = load_recipe(folder / "isles2022-dcd.yaml")
    assert recipe.published is not None
    wrong = replace(recipe, published=replace(recipe.published, inputs=4))
    with pytest.raises(RecipeError, match=r"the paper prints 102.351 M"):
        dry_run(wrong)
    with pytest.raises(RecipeError, match="nothing of published networks"):
        dry_run(replace(recipe, published=None))


def test_a_student_has_a_width_or_channels() -> None:
    recipe = parse_recipe({"name": "x", "student": {"channels": [16, 32]}})
    assert (recipe.student.channels, str(recipe.student)) == ((16, 32), "16, 32")
    assert recipe.digest != parse_recipe({"name": "x"}).digest
    for more in ({"width": "1/2"}, {"round_to": 8}):
        with pytest.raises(RecipeError, match="not both"):
            parse_recipe({"name": "x", "student": {"channels": [16, 32], **more}})
