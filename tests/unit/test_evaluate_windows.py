import pytest
import torch

from lwquant.errors import CalibrationError
from lwquant.evaluation.windows import evenly_spread_windows, strided_windows


def test_windows_start_at_a_rounded_down_linspace_from_the_first_to_the_last_token():
    windows = evenly_spread_windows(torch.arange(1000), 30, 7)
    starts = [int(970 * k / 6) for k in range(7)]
    assert windows.tolist() == [list(range(start, start + 30)) for start in starts]


def test_starts_are_exact_in_texts_of_many_millions_of_tokens():
    tokens = torch.arange(2**25 + 7, dtype=torch.int32)  # a float32 has no 2**25 + 1
    assert evenly_spread_windows(tokens, 4, 12)[-1].tolist() == tokens[-4:].tolist()


def test_one_window_is_the_beginning_and_a_text_of_one_window_serves_all():
    assert evenly_spread_windows(torch.arange(9), 4, 1).tolist() == [[0, 1, 2, 3]]
    assert evenly_spread_windows(torch.arange(4), 4, 3).tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("n_tokens", [8, 9, 15, 16, 17, 100])
@pytest.mark.parametrize("stride", [1, 3, 7])
def test_strided_windows_predict_every_token_but_the_first_once(n_tokens, stride):
    tokens = torch.arange(n_tokens)
    windows, counted = strided_windows(tokens, 8, stride)
    assert sorted(windows[:, 1:][counted].tolist()) == list(range(1, n_tokens))


@pytest.mark.parametrize("n_tokens", [7, 8, 9, 15, 16, 100])
@pytest.mark.parametrize("stride", [1, 3, 6])
def test_after_an_opening_every_token_is_predicted_once(n_tokens, stride):
    windows, counted = strided_windows(torch.arange(n_tokens), 8, stride, torch.tensor([500]))
    assert windows.shape[1] == 8 and (windows[:, 0] == 500).all()
    assert sorted(windows[:, 1:][counted].tolist()) == list(range(n_tokens))


def test_evenly_spread_windows_have_the_opening_within_their_length():
    windows = evenly_spread_windows(torch.arange(9), 4, 3, torch.tensor([500]))
    assert windows.tolist() == [[500, 0, 1, 2], [500, 3, 4, 5], [500, 6, 7, 8]]


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_after_the_first_strided_window_every_prediction_has_the_promised_context(stride):
    windows, counted = strided_windows(torch.arange(100), 8, stride)
    assert torch.equal(windows[:, 1:] - windows[:, :1], torch.arange(1, 8).expand(len(windows), 7))
    context = torch.arange(1, 8).expand(len(windows), 7)  # tokens before the predicted one
    assert context[1:][counted[1:]].min() >= 8 - stride


@pytest.mark.parametrize(
    ("n_tokens", "seq_len", "n_windows", "message"),
    [
        (0, 8, 2, "no tokens"),
        (7, 8, 2, "7 tokens, fewer than the 8 of one window"),
        (9, 1, 2, "seq_len=1"),
        (9, 8, 0, "windows=0"),
    ],
)
def test_impossible_windows_are_refused_with_their_numbers(n_tokens, seq_len, n_windows, message):
    with pytest.raises(CalibrationError, match=message):
        evenly_spread_windows(torch.arange(n_tokens), seq_len, n_windows)


@pytest.mark.parametrize("stride", [0, 8])
def test_a_stride_that_leaves_a_gap_or_stands_still_is_refused(stride):
    with pytest.raises(CalibrationError, match=f"stride={stride}"):
        strided_windows(torch.arange(100), 8, stride)
