"""Promises of the loader: each sample once an epoch, order free of ranks, masks only where they are allowed."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bushpc.config import CellConfig
from bushpc.data.loader import FoldData, StepSampler, open_cache, resize, training_batches, validation_batches
from bushpc.dist import World
from bushpc.errors import DataError
from bushpc.shards.manifest import read_image, read_mask


@given(samples=st.integers(1, 40), batch=st.integers(1, 12), epochs=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_sample_is_seen_exactly_once_an_epoch(samples, batch, epochs, seed):
    steps = -(-samples * epochs // batch)
    sampler = StepSampler(samples, batch, seed, World(), 0, steps)
    seen = [pair for step in range(steps) for pair in sampler.global_batch(step)]
    assert all(len(sampler.global_batch(step)) == batch for step in range(steps))
    for epoch in range(epochs):
        assert Counter(index for e, index in seen if e == epoch) == Counter(range(samples))


@given(ranks=st.sampled_from([1, 2, 3, 4, 6]), start=st.integers(0, 9), seed=st.integers(0, 99))
def test_the_global_batch_does_not_depend_on_ranks_or_on_where_a_run_resumed(ranks, start, seed):
    whole = list(StepSampler(17, 12, seed, World(), 0, 10))
    parts = [list(StepSampler(17, 12, seed, World(rank=r, size=ranks), start, 10)) for r in range(ranks)]
    for step in range(start, 10):
        together = [None] * 12
        for rank in range(ranks):
            together[rank::ranks] = parts[rank][step - start]
        assert together == whole[step]


@pytest.fixture
def opened(make_cell):
    cell_dir = make_cell("loader", "augment.hflip=0.5", "augment.rotate=10")
    cell = CellConfig.load(cell_dir / "config.yaml")
    return cell, FoldData.open(cell, 0, cell_dir.parent.parent / "folds.csv")


def batches_of(cell, data, start=0, workers=0):
    import dataclasses

    cell = dataclasses.replace(cell, loader=dataclasses.replace(cell.loader, workers=workers))
    return list(training_batches(cell, data, World(), start))


def test_pixels_and_prompts_do_not_depend_on_loader_workers(opened):
    cell, data = opened
    for alone, worked in zip(batches_of(cell, data), batches_of(cell, data, workers=2), strict=True):
        assert alone.keys == worked.keys
        assert torch.equal(alone.image_BCHW, worked.image_BCHW)
        assert torch.equal(alone.mask_BKHW, worked.mask_BKHW)
        assert alone.spatial_prompts == worked.spatial_prompts


def test_a_resumed_loader_goes_on_with_the_very_next_batch(opened):
    cell, data = opened
    whole, tail = batches_of(cell, data), batches_of(cell, data, start=4)
    for expected, got in zip(whole[4:], tail, strict=True):
        assert expected.keys == got.keys
        assert torch.equal(expected.image_BCHW, got.image_BCHW)


def test_spatial_text_is_dropped_for_the_configured_share(opened):
    import dataclasses

    cell, data = opened
    cell = dataclasses.replace(cell, train=dataclasses.replace(cell.train, iterations=100))
    prompts = [p for batch in training_batches(cell, data, World(), 0) for p in batch.spatial_prompts]
    share = prompts.count("") / len(prompts)
    assert abs(share - cell.prompting.spatial_dropout) < 4 * (0.3 * 0.7 / len(prompts)) ** 0.5


def test_only_oracle_prompts_come_from_the_mask(opened):
    cell, data = opened
    for source in ("first_pass", "none"):
        for batch in validation_batches(cell, data, source, World()):
            assert set(batch.spatial_prompts) == {""}
            assert (batch.reprompt is not None) == (source == "first_pass")
    oracle = [p for batch in validation_batches(cell, data, "oracle", World()) for p in batch.spatial_prompts]
    assert all(p.startswith("a ") for p in oracle)


def test_ranks_share_the_validation_part_without_overlap(opened):
    cell, data = opened
    keys = [
        key
        for rank in range(3)
        for batch in validation_batches(cell, data, "none", World(rank=rank, size=3))
        for key in batch.keys
    ]
    assert sorted(keys) == sorted(record.key for record in data.validation)


def test_the_cache_holds_the_shards_pixels_resized(opened):
    cell, data = opened
    cache = open_cache(data, 64, cell.loader)
    record = data.train[0]
    image, mask = read_image(data.folder, record), read_mask(data.folder, record)
    expected = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR), dtype=int)
    row = cache.rows[record.key]
    assert np.abs(cache.images_NHWC[row].astype(int) - expected).max() <= 1
    expected = np.asarray(Image.fromarray(mask).resize((64, 64), Image.Resampling.NEAREST))
    assert (cache.masks_NHW[row] == expected).mean() > 0.995


def test_a_cache_of_a_killed_writer_is_made_anew(opened):
    cell, data = opened
    cache = open_cache(data, 32, cell.loader)
    whole = cache.images_NHWC.copy()
    [folder] = [p for p in cell.loader.cache.iterdir() if p.is_dir() and (p / "images.npy").stat().st_size < 128 * 1024]
    half = folder.with_name(f".{folder.name}")
    folder.rename(half)
    (half / "masks.npy").unlink()
    assert np.array_equal(open_cache(data, 32, cell.loader).images_NHWC, whole)


def test_resizing_to_the_same_size_changes_nothing():
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (24, 24, 3), np.uint8), rng.integers(0, 2, (24, 24), np.uint8)
    same_image, same_mask = resize(image, mask, 24)
    assert np.array_equal(same_image, image)
    assert np.array_equal(same_mask, mask)


def test_batches_end_with_the_last_iteration(opened):
    cell, data = opened
    assert len(list(islice(training_batches(cell, data, World(), 0), 100))) == cell.train.iterations


def test_a_lesion_that_vanishes_at_the_networks_size_is_named_before_training(opened):
    cell, data = opened
    with pytest.raises(DataError, match=r"the lesion of phantom\d+ .* vanishes at model.image_size=2"):
        open_cache(data, 2, cell.loader)
