"""Recipes by name and from files."""

from dataclasses import replace

import pytest

from lwquant.corrections import error_propagation
from lwquant.errors import LwquantError
from lwquant.importance import positions
from lwquant.quantizers import gptq, quantease, rtn
from lwquant.recipe import Recipe, load_recipe, metric_of
from lwquant.rounding import rounding_of
from lwquant.scheme import QuantScheme
from lwquant.stages import EFFORTS, merged


def test_the_default_recipe_is_the_recipe_class_with_its_defaults():
    assert load_recipe("default") == Recipe()


def test_a_file_sets_what_it_names_and_keeps_the_rest(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('bits = [3, 4]\nmetric = {name = "embedding_delta", flatten = true}\n')
    recipe = load_recipe(path)
    assert recipe.bits == (3, 4) and recipe.n_samples == Recipe().n_samples
    assert metric_of(recipe.metric).keywords == {"flatten": True}
    assert [s.label for s in recipe.schemes()] == ["3b-g64-s8", "4b-g64-s8"]
    assert [s.label for s in recipe.changed(scale_bits=16).schemes()] == ["3b-g64", "4b-g64"]


def test_fine_zeros_reach_the_menu_and_the_pins_where_there_are_zeros():
    recipe = Recipe(bits=(2, 3, 16), group_size=32, fine_zeros=(2,))
    two, three = QuantScheme(2, 32, scale_bits=8, fine_zeros=True), QuantScheme(3, 32, scale_bits=8)
    assert recipe.schemes() == (two, three, QuantScheme(16))
    assert recipe.scheme(2) == two and recipe.scheme(3) == three
    recipe = Recipe(bits=(4,), symmetric=True, fine_zeros=(4,))
    assert recipe.schemes() == (QuantScheme(4, symmetric=True, scale_bits=8),)
    recipe = Recipe(bits=(4,), quantizer="gptq", codebook="nf4", fine_zeros=(4,))
    assert not recipe.scheme(4).fine_zeros
    with pytest.raises(LwquantError, match=r"fine_zeros=\(2, 9\) are not all widths"):
        Recipe(fine_zeros=(2, 9))


def test_outliers_need_the_quantizer_that_looks_for_them():
    recipe = Recipe(bits=(2, 16), quantizer="quantease", outliers=5)
    assert [s.label for s in recipe.schemes()] == ["2b-g64-s8-z8-o5", "16b"]
    assert recipe.scheme(3).label == "3b-g64-s8-o5"
    Recipe(quantizer={"name": "quantease", "sweeps": 8}, outliers=5)
    Recipe(quantizer=lambda weight, stats, scheme: None, outliers=5)  # it may know how
    for other in ("gptq", {"name": "hqq", "rounds": 3}, rtn):
        with pytest.raises(LwquantError, match="has outliers, which only the quantizer quantease"):
            Recipe(quantizer=other, outliers=5)
    with pytest.raises(LwquantError, match="outliers=101 per thousand"):
        Recipe(quantizer="quantease", outliers=101)


def test_more_group_sizes_make_a_finer_menu_whose_steps_only_grow(tmp_path):
    path = tmp_path / "fine.toml"
    path.write_text("bits = [3, 2, 16]\nmore_group_sizes = [128, 32]\n")
    recipe = load_recipe(path)
    labels = [scheme.label for scheme in recipe.schemes()]
    widths = ["2b-g128", "2b-g64", "2b-g32", "3b-g128", "3b-g64", "3b-g32"]
    fine = {"2": "-z8", "3": ""}
    assert labels == [*(f"{label}-s8{fine[label[0]]}" for label in widths), "16b"]
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
        ("expand = 0", "expand=0"),
        ("expand = 512", "expand=512 must be below seq_len=512"),
        ("expand = 2\nn_samples = 1", "expand needs n_samples of at least 2"),
        ("expand = 1.5", "expand"),
        ("guided = -1", "guided=-1 must be at least 0"),
        ("guided = 0.5", "guided must be a whole number"),
        ("polish = -1", "polish=-1 must be at least 0"),
        ("polish = 1.5", "polish must be a whole number"),
        ("polish = 9\nn_samples = 1", "polish needs n_samples of at least 2, not 1"),
        ('codebook = "nf5"', "codebook='nf5' is not one of"),
        ('codebook = "nf4"\nbits = [3, 16]', "codebook='nf4' is for 4 bits, bits="),
        ('codebook = "nf4"\npolish = 9', "polish=9 learns codes of even steps.*nf4-g64-s8"),
        ('codebook = "nf4"\nquantizer = "hqq"', "nf4-g64-s8 has no even steps.*'bnb'"),
        ('codebook = "nf4"\nquantizer = "quantease"', "nf4-g64-s8 has no even steps"),
        ('quantizer = "bnb"', "no scheme 2b-g64-s8.*recipe 'bnb'"),
        ('quantizer = {name = "magic"}', "unknown quantizer 'magic'"),
        ("row_bits = [7]", r"row_bits=\(7,\) are not all"),
        ("row_bits = [16]", r"row_bits=\(16,\) are not all"),
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


def test_a_recipe_says_how_tokens_are_weighted():
    assert Recipe().rounding().weighting is None
    assert Recipe(token_importance={"name": "none"}).rounding().weighting is None
    named = {"name": "positions", "last": 0.25, "floor": 0.02}
    recipe = Recipe(token_importance=named, correction="none")
    rounding = recipe.rounding()
    assert rounding.correction is None and rounding.quantizer is quantease
    assert rounding.weighting.floor == 0.02
    assert rounding.weighting.score.func is positions
    assert rounding.weighting.score.keywords == {"last": 0.25}
    with pytest.raises(LwquantError, match="unknown token_importance 'magic'; there are .*none"):
        Recipe(token_importance="magic").rounding()
    for floor in (2, "low"):
        with pytest.raises(LwquantError, match="floor"):
            Recipe(token_importance={"name": "positions", "floor": floor}).rounding()


def test_tokens_are_weighted_by_gradients_or_by_an_importance_not_both():
    assert Recipe().rounding().guided == 0 and Recipe(guided=4).rounding().guided == 4
    with pytest.raises(LwquantError, match="guided=4 and a token_importance both"):
        Recipe(guided=4, token_importance="positions").rounding()


def test_corrections_fit_the_quantizer():
    plain = rounding_of("rtn", "none")
    assert plain.quantizer is rtn and plain.correction is None and plain.records == "inputs"
    qep = rounding_of("rtn", {"name": "qep", "strength": 0.7})
    assert qep.correction.func is error_propagation and qep.records == "owed"
    gptaq = rounding_of("gptq", "gptaq")
    assert gptaq.quantizer.func is gptq and gptaq.quantizer.keywords == {"asymmetry": 0.25}
    assert gptaq.correction is None and gptaq.records == "all"
    assert Recipe(polish=30).rounding().polish == 30 and Recipe().rounding().polish == 0
    with pytest.raises(LwquantError, match="use quantizer 'gptq'"):
        rounding_of("rtn", "gptaq")


def test_an_effort_is_a_shipped_recipe_by_its_name():
    for effort in EFFORTS:
        assert merged("default", None, {"effort": effort, "seed": 3})[0] == replace(
            load_recipe(effort), seed=3
        )
    assert merged("default", None, {"effort": None})[0] == Recipe()
    with pytest.raises(LwquantError, match="'fastest' is not one of fast, default, best"):
        merged("default", None, {"effort": "fastest"})
    with pytest.raises(LwquantError, match="not both"):
        merged("fused", None, {"effort": "best"})
