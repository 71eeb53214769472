"""Promises of the loader: each sample once an epoch, order free of ranks, masks only where they are allowed."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from bushpc.conditions.captions import Caption, caption
from bushpc.conditions.sentences import FROM_MASK, FirstPass, SpatialPrompt, attribute_prompt, spatial_prompt
from bushpc.config import CellConfig
from bushpc.data.augment import Augment
from bushpc.data.batches import training_batches, validation_batches
from bushpc.data.loader import FoldData, StepSampler
from bushpc.data.square import resize
from bushpc.data.workers import in_workers
from bushpc.dist import World, keyed_seed
from bushpc.sample import LABELS
from bushpc.shards.manifest import read_image, read_mask


@given(samples=st.integers(1, 40), batch=st.integers(1, 12), epochs=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_sample_is_seen_exactly_once_an_epoch(samples, batch, epochs, seed):
    steps = -(-samples * epochs // batch)
    sampler = StepSampler([1] * samples, batch, seed, World(), 0, steps)
    seen = [draw[:2] for step in range(steps) for draw in sampler.global_batch(step)]
    assert all(len(sampler.global_batch(step)) == batch for step in range(steps))
    for epoch in range(epochs):
        assert Counter(index for e, index in seen if e == epoch) == Counter(range(samples))


@given(ranks=st.sampled_from([1, 2, 3, 4, 6]), start=st.integers(0, 9), seed=st.integers(0, 99))
def test_the_global_batch_does_not_depend_on_ranks_or_on_where_a_run_resumed(ranks, start, seed):
    whole = list(StepSampler([1] * 17, 12, seed, World(), 0, 10))
    parts = [list(StepSampler([1] * 17, 12, seed, World(rank=r, size=ranks), start, 10)) for r in range(ranks)]
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


def bins_of(data):
    """The size bins that spatial prompts are worded by."""
    (bins,) = (kind.bins for kind in data.conditions if isinstance(kind, SpatialPrompt))
    return bins


def batches_of(cell, data, start=0, workers=0):
    cell = dataclasses.replace(cell, loader=dataclasses.replace(cell.loader, workers=workers))
    return list(training_batches(cell, data, World(), start))


def test_pixels_and_prompts_do_not_depend_on_loader_workers(opened):
    cell, data = opened
    for alone, worked in zip(batches_of(cell, data), batches_of(cell, data, workers=2), strict=True):
        assert alone.keys == worked.keys
        assert torch.equal(alone.image_BCHW, worked.image_BCHW)
        assert torch.equal(alone.mask_BKHW, worked.mask_BKHW)
        assert alone.conditions["spatial_prompts"] == worked.conditions["spatial_prompts"]


def test_a_resumed_loader_goes_on_with_the_very_next_batch(opened):
    cell, data = opened
    whole, tail = batches_of(cell, data), batches_of(cell, data, start=4)
    for expected, got in zip(whole[4:], tail, strict=True):
        assert expected.keys == got.keys
        assert torch.equal(expected.image_BCHW, got.image_BCHW)


def test_spatial_text_is_dropped_for_the_configured_share(opened):
    cell, data = opened
    cell = dataclasses.replace(cell, train=dataclasses.replace(cell.train, iterations=100))
    prompts = [p for batch in training_batches(cell, data, World(), 0) for p in batch.conditions["spatial_prompts"]]
    share = prompts.count("") / len(prompts)
    assert abs(share - cell.prompting.spatial_dropout) < 4 * (0.3 * 0.7 / len(prompts)) ** 0.5


def test_only_the_oracle_and_its_falsifications_take_prompts_from_the_mask(opened):
    cell, data = opened
    for source in ("first_pass", "none", "shuffled_attributes"):
        for batch in validation_batches(cell, data, source, World()):
            waiting = FirstPass(bins=bins_of(data), tau=cell.prompting.tau)
            assert set(batch.conditions["spatial_prompts"]) == {"" if source == "none" else waiting}
    for source in ("oracle", "wrong_size", "wrong_quadrant"):
        for batch in validation_batches(cell, data, source, World()):
            masks = (batch.mask_BKHW[:, 0] > 0).numpy()
            assert batch.conditions["spatial_prompts"] == [FROM_MASK[source](mask, bins_of(data)) for mask in masks]
            assert all(prompt.startswith("a ") for prompt in batch.conditions["spatial_prompts"])


def attributes_by_key(cell, data, source, ranks=1, **loading):
    cell = dataclasses.replace(cell, **loading)
    return {
        key: prompt
        for rank in range(ranks)
        for batch in validation_batches(cell, data, source, World(rank=rank, size=ranks))
        for key, prompt in zip(batch.keys, batch.conditions["attribute_prompts"], strict=True)
    }


def test_shuffled_attributes_are_another_patients_and_wrong_whatever_the_ranks_and_batches(opened):
    cell, data = opened
    own, shuffled = (attributes_by_key(cell, data, source) for source in ("first_pass", "shuffled_attributes"))
    assert all(shuffled[key] and shuffled[key] != own[key] for key in own)
    for key, record in ((record.key, record) for record in data.validation):
        assert shuffled[key] in {own[other.key] for other in data.validation if other.patient != record.patient}
    small = dataclasses.replace(cell.evaluate, batch_size=1)
    assert attributes_by_key(cell, data, "shuffled_attributes", ranks=3, evaluate=small) == shuffled
    many = dataclasses.replace(data, validation=data.train)
    assert len({attributes_by_key(cell, many, "shuffled_attributes", seed=s)[data.train[0].key] for s in range(9)}) > 1


def test_where_no_other_sentence_is_to_be_had_another_patients_own_is_taken_and_of_one_patient_none(opened):
    cell, data = opened
    first, second = (dataclasses.replace(record, attributes={"shape": "oval"}) for record in data.validation[:2])
    assert first.patient != second.patient
    alike = dataclasses.replace(data, validation=[first, second])
    assert set(attributes_by_key(cell, alike, "shuffled_attributes").values()) == {"oval shape"}
    alone = dataclasses.replace(data, validation=[first])
    assert set(attributes_by_key(cell, alone, "shuffled_attributes").values()) == {""}


def test_ranks_share_the_validation_part_without_overlap(opened):
    cell, data = opened
    keys = [
        key
        for rank in range(3)
        for batch in validation_batches(cell, data, "none", World(rank=rank, size=3))
        for key in batch.keys
    ]
    assert sorted(keys) == sorted(record.key for record in data.validation)


def test_batches_end_with_the_last_iteration(opened):
    cell, data = opened
    assert len(list(islice(training_batches(cell, data, World(), 0), 100))) == cell.train.iterations


@pytest.mark.parametrize("augmentation", [(), ("augment.hflip=0.5", "augment.rotate=10", "augment.brightness=0.2")])
def test_a_batch_is_its_samples_decoded_augmented_and_prompted_one_by_one(make_cell, augmentation):
    cell_dir = make_cell("loader", *augmentation)
    cell = CellConfig.load(cell_dir / "config.yaml")
    data = FoldData.open(cell, 0, cell_dir.parent.parent / "folds.csv")
    augment = Augment(cell.augment)
    sampler = StepSampler(data.repeats, cell.train.batch_size, cell.seed, World(), 0, cell.train.iterations)
    for draws, batch in zip(sampler, training_batches(cell, data, World(), 0), strict=True):
        for i, (epoch, place, turn) in enumerate(draws):
            record = data.train[place]
            pixels = read_image(data.folder, record), read_mask(data.folder, record)
            image_SSC, mask_SS = resize(*pixels, cell.model.image_size)
            image_CHW = torch.from_numpy(image_SSC.transpose(2, 0, 1).copy())
            mask_1HW = torch.from_numpy(mask_SS[None].copy())
            image_CHW, mask_1HW = augment(image_CHW, mask_1HW, record, cell.seed, turn)
            draw = np.random.default_rng(keyed_seed(cell.seed, "spatial_dropout", turn, record.key)).random()
            prompt = (
                "" if draw < cell.prompting.spatial_dropout else spatial_prompt(mask_1HW[0].numpy() > 0, bins_of(data))
            )
            given_to_model = batch.to("cpu")
            assert torch.equal(given_to_model.image_BCHW[i], image_CHW.float() / 255)
            assert torch.equal(given_to_model.mask_BKHW[i], mask_1HW.float())
            assert given_to_model.image_BCHW.is_contiguous()
            assert (batch.keys[i], batch.epochs[i]) == (record.key, epoch)
            assert int(batch.label_B[i]) == LABELS.index(record.label)
            assert batch.conditions["spatial_prompts"][i] == prompt
            assert batch.conditions["attribute_prompts"][i] == attribute_prompt(record.attributes)


def test_an_epoch_draws_each_sample_as_often_as_told_and_counts_its_turns():
    repeats = [1, 3, 2]
    sampler = StepSampler(repeats, 4, 0, World(), 0, 6)  # 24 draws, 4 epochs of 6
    draws = [draw for step in range(6) for draw in sampler.global_batch(step)]
    for epoch in range(4):
        assert Counter(draw.place for draw in draws[epoch * 6 : epoch * 6 + 6]) == {0: 1, 1: 3, 2: 2}
    for place, times in enumerate(repeats):
        turns = [draw.turn for draw in draws if draw.place == place]
        assert sorted(turns) == list(range(4 * times))
        assert all(draw.turn // times == draw.epoch for draw in draws if draw.place == place)


def test_a_model_gets_the_conditions_that_it_declares_and_no_others(make_cell):
    cell_dir = make_cell("loader", "model=unet_small")
    cell = CellConfig.load(cell_dir / "config.yaml")
    data = FoldData.open(cell, 0, cell_dir.parent.parent / "folds.csv")
    batches = [*training_batches(cell, data, World(), 0), *validation_batches(cell, data, "none", World())]
    assert [batch.conditions for batch in batches] == [{}] * len(batches)


def test_captions_are_made_for_models_that_read_them_in_training_and_validation(make_cell, monkeypatch):
    cell_dir = make_cell("loader", "model=unet_small")
    cell = CellConfig.load(cell_dir / "config.yaml")
    monkeypatch.setattr(type(cell.model), "conditions", (Caption(),))
    data = FoldData.open(cell, 0, cell_dir.parent.parent / "folds.csv")
    batches = [*training_batches(cell, data, World(), 0), *validation_batches(cell, data, "none", World())]
    for batch in batches:
        captions = [caption(r.label, r.attributes) for r in map(data.manifest.record, batch.keys)]
        assert batch.conditions == {"captions": captions}
        assert batch.split(2)[1].conditions == {"captions": captions[len(captions) // 2 :]}


class Slow(Dataset[int]):
    """Item i takes `seconds(i)` to make."""

    def __init__(self, seconds) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> int:
        time.sleep(self.seconds(i))
        return i


def workers_of_this_process() -> list[int]:
    return [child.pid for child in multiprocessing.active_children()]


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat") as facts:
        return facts.read().rpartition(")")[2].split()[0] != "Z"
    return False


def test_workers_die_with_a_process_that_is_killed(tmp_path):
    def work(note):
        batches = in_workers(Slow(lambda i: 600), workers=2)
        note.send(workers_of_this_process())
        next(batches)

    ours, theirs = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(target=work, args=(theirs,))
    parent.start()
    workers = ours.recv()
    assert len(workers) == 2
    time.sleep(0.3)  # they are in the middle of an item, where no queue tells them that nobody listens
    assert all(map(is_running, workers))
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, workers))


def test_workers_go_on_through_the_stop_signals_that_a_whole_job_gets():
    batches = in_workers(Slow(lambda i: 0.05), workers=2)
    for pid in workers_of_this_process():  # at once: they may not even have begun
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            in_between = multiprocessing.get_context("fork").Process(target=os.kill, args=(pid, number))
            in_between.start()
            in_between.join()
    assert list(batches) == list(range(8))


def test_workers_leave_when_their_process_is_through_with_them():
    batches = in_workers(Slow(lambda i: 0.0), workers=2)
    next(batches)
    workers = workers_of_this_process()
    del batches
    assert len(workers) == 2
    assert not any(map(is_running, workers))
