"""The windows that sweep() and ratio() measure plans on."""

from dataclasses import replace

from tiny_models import TINY_FOLDER, adding_bos

from lwquant.capture.tokens import tokenize
from lwquant.measured_plans import bench_for
from lwquant.prepare import open_model
from lwquant.progress import silent
from lwquant.recipe import Recipe


def test_windows_of_a_text_begin_with_what_the_tokenizer_puts_before_it(
    tiny_tokenizer, heldout_text, tmp_path
):
    text = TINY_FOLDER / "heldout.txt"
    recipe = Recipe(n_samples=2, seq_len=32, held_out=1, metric="outlier_count")
    opened = replace(open_model(TINY_FOLDER), tokenizer=adding_bos(tiny_tokenizer))
    bench = bench_for(opened, recipe, [heldout_text], tmp_path, silent, text=text, n_windows=3)
    assert bench.tested.shape == (3, 32)
    assert (bench.tested[:, 0] == tiny_tokenizer.bos_token_id).all()
    expected = tokenize(heldout_text, tiny_tokenizer)[:31]
    assert bench.tested[0, 1:].tolist() == expected.tolist()
