"""dSprites: the published factors, outlines held against a drawing pixel by pixel, and places that follow positions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from vae.data.dsprites import (
    FACTOR_NAMES,
    FACTOR_SIZES,
    NUM_IMAGES,
    ORIENTATIONS,
    SCALES,
    SHAPE_NAMES,
    Dsprites,
    draw_sprites,
    factors_of,
    index_of,
    render,
    split_indices,
)

CENTRE = 16  # a position from which no sprite is near the border


def some(count, seed=0):
    return torch.randint(NUM_IMAGES, (count,), generator=torch.Generator().manual_seed(seed))


def image(shape, scale, orientation, x=CENTRE, y=CENTRE, size=64):
    """bool (S, S)."""
    return render(index_of(torch.tensor([[0, shape, scale, orientation, x, y]])), size)[0, 0].numpy() > 0


def centre_of(pixels):
    """Mean place of the lit pixels as (column, row), in parts of the image."""
    rows, columns = np.nonzero(pixels)
    return (columns.mean() + 0.5) / len(pixels), (rows.mean() + 0.5) / len(pixels)


# -- factors -----------------------------------------------------------------------------------------------------------


def test_the_grid_is_the_published_one():
    assert NUM_IMAGES == 737_280
    assert FACTOR_NAMES == ("color", "shape", "scale", "orientation", "position_x", "position_y")
    assert FACTOR_SIZES == (1, 3, 6, 40, 32, 32)
    assert SHAPE_NAMES == ("square", "ellipse", "heart")
    assert SCALES.tolist() == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    # the published file's values: 0, 0.16110732, ..., 6.28318531
    assert ORIENTATIONS[[0, 1, 39]] == pytest.approx([0, 0.16110732, 6.28318531], abs=1e-8)


def test_the_last_factor_changes_fastest():
    numbers = torch.tensor([0, 1, 32, 1024, 40 * 1024, 6 * 40 * 1024, NUM_IMAGES - 1])
    assert factors_of(numbers).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 2, 5, 39, 31, 31],
    ]


def test_every_combination_of_factors_is_there_once():
    factors = factors_of(torch.arange(NUM_IMAGES))
    assert factors.dtype == torch.int64
    assert torch.equal(index_of(factors), torch.arange(NUM_IMAGES))
    for column, size in zip(factors.T, FACTOR_SIZES, strict=True):
        assert torch.equal(column.bincount(), torch.full((size,), NUM_IMAGES // size))


@pytest.mark.parametrize("number", [-1, NUM_IMAGES])
def test_a_number_outside_the_grid_is_refused(number):
    with pytest.raises(ValueError, match="0 to 737279"):
        render(torch.tensor([0, number]))


def test_a_factor_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"orientation from 40 to 40.*0 to 39"):
        index_of(torch.tensor([[0, 0, 0, 40, 0, 0]]))


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="32 or 64"):
        render(torch.tensor([0]), 28)


# -- pixels ------------------------------------------------------------------------------------------------------------


def by_hand(factors, size):
    """One image drawn where it stands, without patches: the outline's definition at every pixel's centre."""
    _, shape, scale, orientation, x, y = factors
    angle = orientation * 2 * math.pi / 39
    pixels = np.zeros((size, size), bool)
    for row, column in itertools.product(range(size), range(size)):
        right = (column + 0.5) * 64 / size - (16.5 + x)
        down = (row + 0.5) * 64 / size - (16.5 + y)
        point = complex(right, down) * complex(math.cos(angle), -math.sin(angle)) / (0.5 + 0.1 * scale)
        u, v = point.real / 12, 0.2935 - point.imag / 12
        pixels[row, column] = (
            max(abs(point.real), abs(point.imag)) < 11.4,
            math.hypot(point.real / 15.6, point.imag / 7.8) < 1,
            (u * u + v * v - 1) ** 3 < u * u * v**3,
        )[shape]
    return pixels


@pytest.mark.parametrize("size", [32, 64])
def test_images_equal_a_drawing_pixel_by_pixel(size):
    numbers = torch.cat([some(30), index_of(torch.tensor([[0, 2, 5, 7, 0, 31], [0, 0, 5, 5, 31, 0]]))])
    images = render(numbers, size)
    for got, factors in zip(images, factors_of(numbers).tolist(), strict=True):
        assert np.array_equal(got[0].numpy() > 0, by_hand(factors, size)), factors


@pytest.mark.parametrize("size", [32, 64])
def test_images_are_binary_and_of_one_channel(size):
    images = render(some(500), size)
    assert images.shape == (500, 1, size, size)
    assert images.dtype == torch.uint8
    assert images.unique().tolist() == [0, 255]
    assert bool((images > 0).flatten(1).any(1).all())


def test_random_access_equals_enumeration():
    start = 5 * 40 * 1024 + 17  # across positions and orientations
    everything = render(torch.arange(start, start + 9000), 32)  # more than one chunk
    chosen = torch.tensor([8999, 0, 8191, 8192, 5, 5])
    assert torch.equal(render(start + chosen, 32), everything[chosen])


def test_no_numbers_give_no_images():
    assert render(torch.empty(0, dtype=torch.int64), 32).shape == (0, 1, 32, 32)


@pytest.mark.parametrize("size", [32, 64])
def test_no_sprite_is_cut_off(size):
    """In the corners a sprite has as many pixels as in the middle, at 32 pixels in the same place within a pixel."""
    for shape in range(3):
        for orientation in range(0, 40, 3):
            sides = [(x, y) for x in (0, 1, 30, 31) for y in (0, 1, 30, 31)]
            for x, y in sides:
                middle = image(shape, 5, orientation, 16 + x % 2, 16 + y % 2, size)
                assert image(shape, 5, orientation, x, y, size).sum() == middle.sum()


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("shape", range(3))
def test_positions_move_the_sprite_right_and_down(shape, size):
    for orientation in (0, 7):
        across = np.array([centre_of(image(shape, 3, orientation, x=x, size=size)) for x in range(32)])
        down = np.array([centre_of(image(shape, 3, orientation, y=y, size=size)) for y in range(32)])
        steps = np.concatenate([np.diff(across[:, 0]), np.diff(down[:, 1])])
        assert (steps >= 0).all()
        # half a pixel may move no edge of an upright square across a pixel's centre
        assert (steps > 0).all() or (size == 32 and shape == 0 and orientation == 0)
        assert down[:, 1] == pytest.approx((16.5 + np.arange(32)) / 64, abs=0.5 / size)
        # the position is the sprite's own centre, the other coordinate stays
        assert across[:, 0] == pytest.approx((16.5 + np.arange(32)) / 64, abs=0.5 / size)
        assert across[:, 1] == pytest.approx(np.full(32, (16.5 + CENTRE) / 64), abs=0.5 / size)


@pytest.mark.parametrize("size", [32, 64])
def test_area_grows_with_scale(size):
    areas = (draw_sprites(size) > 0).sum((-2, -1))  # (3, 6, 40, phases, phases)
    assert (np.diff(areas, axis=1) > 0).all()
    # as the square of the scale, which runs from 1/2 to 1
    assert areas[:, 5].mean((1, 2, 3)) / areas[:, 0].mean((1, 2, 3)) == pytest.approx([4, 4, 4], rel=0.03)


def test_areas_are_those_of_the_outlines():
    areas = (draw_sprites(64)[:, 5] > 0).sum((-2, -1)).mean((1, 2, 3))
    assert areas == pytest.approx([22.8**2, math.pi * 15.6 * 7.8, 3.6597 * 144], rel=0.01)


def test_first_and_last_orientation_are_one_image_and_the_others_are_not():
    """As in the published file; with 39 steps a turn, the square's quarter turn and the ellipse's half are no steps."""
    for size, squares in ((64, 216), (32, 220)):
        sprites = draw_sprites(size)
        assert np.array_equal(sprites[:, :, 0], sprites[:, :, 39])
        for shape, distinct in enumerate((squares, 234, 234)):  # of 6 x 40, of which 6 must repeat
            assert len(np.unique(sprites[shape].reshape(240, -1), axis=0)) == distinct


def test_the_square_nearly_repeats_after_a_quarter_turn_and_the_heart_after_none():
    def difference(shape, steps):
        return (image(shape, 5, 0) ^ image(shape, 5, steps)).sum() / image(shape, 5, 0).sum()

    assert difference(0, 10) < 0.06 and difference(0, 5) > 0.15
    assert difference(1, 20) < 0.08 and difference(1, 10) > 0.3
    assert min(difference(2, steps) for steps in range(8, 32)) > 0.12


def test_orientation_turns_clockwise_and_the_heart_starts_tip_down():
    heart = image(2, 5, 0)
    rows = np.nonzero(heart.any(1))[0]
    assert heart[rows[-1]].sum() <= 3 < heart[rows[4]].sum()
    # a quarter turn is between steps 9 and 10: the tip points to the left
    columns = np.nonzero(image(2, 5, 10).any(0))[0]
    assert image(2, 5, 10)[:, columns[0]].sum() < image(2, 5, 10)[:, columns[-5]].sum()


def test_at_32_pixels_a_position_is_half_a_pixel():
    """Half a pixel further is another drawing, a whole pixel the same one moved."""
    even, odd = image(1, 5, 3, x=16, size=32), image(1, 5, 3, x=17, size=32)
    assert not np.array_equal(even, odd)
    assert np.array_equal(np.roll(even, 1, axis=1), image(1, 5, 3, x=18, size=32))


# -- subsets -----------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_reproducible():
    sizes = {"max_images": 3000, "num_validation": 500, "num_test": 1000}
    parts = {split: split_indices(split, **sizes) for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [3000, 500, 1000]
    assert len(torch.cat(list(parts.values())).unique()) == 4500
    for split, part in parts.items():
        assert torch.equal(part, split_indices(split, **sizes))
        assert not torch.equal(part, split_indices(split, **sizes, seed=1))
    # without a number, training takes what is left
    assert len(split_indices("train", 0, 500)) == NUM_IMAGES - 10_500
    # and other sizes of the other splits move neither a training nor a test image
    assert torch.equal(parts["train"], split_indices("train", 3000, 0, num_test=1000))
    assert torch.equal(parts["test"], split_indices("test", 0, 0, num_test=1000))


def test_a_subset_is_drawn_over_the_whole_grid():
    factors = factors_of(split_indices("train", 20_000, 0))
    for column, size in zip(factors.T, FACTOR_SIZES, strict=True):
        share = column.bincount(minlength=size) / len(column)
        deviation = math.sqrt((1 / size) * (1 - 1 / size) / len(column))
        assert float((share - 1 / size).abs().max()) <= 5 * deviation


def test_a_subset_in_memory_has_its_factors():
    numbers = some(50)
    data = Dsprites(numbers, 32)
    assert torch.equal(data.images, render(numbers, 32)) and data.shape == (1, 32, 32)
    assert torch.equal(data.factors, factors_of(numbers)) and torch.equal(data.indices, numbers)
    assert torch.equal(data.labels, data.factors[:, 1]) and data.class_names == SHAPE_NAMES
    drawn = data.draw(20, seed=3)
    assert torch.equal(drawn.images, render(drawn.indices, 32)) and len(drawn) == 20
    assert torch.equal(drawn.factors, factors_of(drawn.indices))
    assert set(drawn.indices.tolist()) <= set(numbers.tolist())
    pixels, labels = next(data.batches(1, 8, 0, torch.device("cpu")))
    assert pixels.shape == (8, 1, 32, 32) and labels.shape == (8,)
