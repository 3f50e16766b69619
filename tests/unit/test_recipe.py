"""Recipes by name and from files."""

import pytest

from lwquant.corrections import error_propagation
from lwquant.errors import LwquantError
from lwquant.quantizers import gptq, rtn
from lwquant.recipe import Recipe, load_recipe, metric_of, rounding_of


def test_the_default_recipe_is_the_recipe_class_with_its_defaults():
    assert load_recipe("default") == Recipe()


def test_a_file_sets_what_it_names_and_keeps_the_rest(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('bits = [3, 4]\nmetric = {name = "embedding_delta", flatten = true}\n')
    recipe = load_recipe(path)
    assert recipe.bits == (3, 4) and recipe.n_samples == Recipe().n_samples
    assert metric_of(recipe.metric).keywords == {"flatten": True}
    assert [s.label for s in recipe.schemes()] == ["3b-g64", "4b-g64"]


def test_more_group_sizes_make_a_finer_menu_whose_steps_only_grow(tmp_path):
    path = tmp_path / "fine.toml"
    path.write_text("bits = [3, 2, 16]\nmore_group_sizes = [128, 32]\n")
    recipe = load_recipe(path)
    labels = [scheme.label for scheme in recipe.schemes()]
    assert labels == ["2b-g128", "2b-g64", "2b-g32", "3b-g128", "3b-g64", "3b-g32", "16b"]
    sizes = [scheme.stored_bits(256, 256) for scheme in recipe.schemes()]
    assert sizes == sorted(sizes)
    assert recipe.scheme(3).group_size == 64  # what a pin to 3 bits means


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_sample = 3", "unknown setting 'n_sample'"),
        ("bits = [3, 9]", "bits=9"),
        ("bits = [3, 3]", "different widths"),
        ("more_group_sizes = [0]", "group_size=0"),
        ("n_samples = 0", "n_samples=0"),
        ("seq_len = 2.5", "seq_len"),
        ("polish = -1", "polish=-1 must be at least 0"),
        ("polish = 1.5", "polish must be a whole number"),
        ("polish = 9\nn_samples = 1", "polish needs n_samples of at least 2, not 1"),
        ("= 3", "recipe"),
        ('group_size = "64"', "group_size|'<'"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(LwquantError, match=message):
        load_recipe(path)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(LwquantError, match="default"):
        load_recipe("fastest")
    with pytest.raises(LwquantError, match="unknown metric 'magic'; there are .*fisher"):
        metric_of("magic")


def test_corrections_fit_the_quantizer():
    plain = rounding_of("rtn", "none")
    assert plain.quantizer is rtn and plain.correction is None and not plain.needs_drift
    qep = rounding_of("rtn", {"name": "qep", "strength": 0.7})
    assert qep.correction.func is error_propagation and qep.needs_drift
    gptaq = rounding_of("gptq", "gptaq")
    assert gptaq.quantizer.func is gptq and gptaq.quantizer.keywords == {"asymmetry": 0.25}
    assert gptaq.correction is None and gptaq.needs_drift
    for quantizer, correction in (("rtn", "none"), ("gptq", "gptaq"), ("gptq", "qep")):
        assert rounding_of(quantizer, correction).polish == 0
        assert rounding_of(quantizer, correction, 30).polish == 30
    with pytest.raises(LwquantError, match="use quantizer 'gptq'"):
        rounding_of("rtn", "gptaq")
