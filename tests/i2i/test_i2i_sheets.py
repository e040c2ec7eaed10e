"""Pages of pictures: nothing scaled, nothing cropped, everything centred."""

import numpy as np
import pytest
from modelsoup_i2i.pictures.images import read_image
from modelsoup_i2i.pictures.sheets import GAP, grid, save

import modelsoup


def filled(height: int, width: int, shade: int) -> np.ndarray:
    return np.full((height, width, 3), shade, np.uint8)


def test_pictures_of_different_sizes_are_whole_and_centred():
    page = np.asarray(grid([[filled(8, 6, 10), filled(4, 4, 20)], [filled(8, 2, 30)] * 2]))
    assert page.shape == (2 * 8 + 3 * GAP, 6 + 4 + 3 * GAP, 3)
    assert [(page == shade).all(2).sum() for shade in (10, 20, 30)] == [48, 16, 32]
    ys, xs = np.nonzero((page == 20).all(2))
    assert (ys.min(), xs.min()) == (GAP + 2, GAP + 6 + GAP)


def test_texts_are_beside_the_pictures_and_change_none():
    red, green = filled(8, 6, 0), filled(8, 6, 0)  # texts are grey
    red[..., 0], green[..., 1] = 250, 250
    page = np.asarray(grid([[red, green]], ["a long title", "two"], ["a row"]))
    assert [(page == picture[0, 0]).all(2).sum() for picture in (red, green)] == [48, 48]
    assert page.shape[1] > np.asarray(grid([[red, green]])).shape[1]
    _, xs = np.nonzero((page == red[0, 0]).all(2))
    assert (page[:, : xs.min()] < 80).any(), "the label is at the left"


@pytest.mark.parametrize("rows", [[], [[]], [[filled(2, 2, 0)], []]])
def test_rows_of_different_lengths_are_refused(rows):
    with pytest.raises(modelsoup.ParameterError, match="all of one length"):
        grid(rows)


def test_too_few_titles_are_refused():
    with pytest.raises(modelsoup.ParameterError, match="2 has 1 titles"):
        grid([[filled(2, 2, 0)] * 2], ["one"])


def test_a_page_is_saved_as_it_is(tmp_path):
    page = grid([[filled(8, 6, 10)]], ["x"])
    save(page, tmp_path / "page.png")
    assert (read_image(tmp_path / "page.png") == np.asarray(page)).all()
    assert [file.name for file in tmp_path.iterdir()] == ["page.png"]
    with pytest.raises(modelsoup.OutputError):
        save(page, tmp_path / "nowhere" / "page.png")
