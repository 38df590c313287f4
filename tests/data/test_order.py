"""The order of samples: exact shuffles, the same for any number of ranks, continued where a run stopped."""

from itertools import islice, pairwise

import pytest
import torch

from ditlit.data import LatentDataModule
from ditlit.data.sampler import EvalOrder, ShuffleWindows, TrainOrder
from ditlit.errors import InputError


def order(num_samples=50, batch=12, ranks=1, rank=0, accumulate=1, seed=0, flip=False, step=0):
    return TrainOrder(num_samples, batch, ranks, rank, accumulate, seed, flip, lambda: step)


def batches(sampler, count):
    return list(islice(iter(sampler), count))


def test_an_epoch_visits_every_sample_at_most_once_and_epochs_differ():
    indices = torch.cat([index for index, _ in batches(order(48), 8)])
    first, second = indices.chunk(2)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(48))
    assert first.tolist() != second.tolist()


def test_the_samples_left_over_differ_between_epochs():
    indices = torch.cat([index for index, _ in batches(order(50), 40 * 4)]).reshape(40, 48)
    assert all(len(set(epoch.tolist())) == 48 for epoch in indices)
    assert len(set(indices.flatten().tolist())) == 50


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (1, 3), (4, 3)])
def test_a_step_sees_the_same_samples_on_any_number_of_ranks(ranks, accumulate):
    one = batches(order(flip=True), 7)
    parts = [
        batches(order(ranks=ranks, rank=r, accumulate=accumulate, flip=True), 7 * accumulate) for r in range(ranks)
    ]
    for step, (index, flip) in enumerate(one):
        pieces = [parts[r][step * accumulate + m] for m in range(accumulate) for r in range(ranks)]
        assert torch.equal(torch.cat([i for i, _ in pieces]), index)
        assert torch.equal(torch.cat([f for _, f in pieces]), flip)
    assert len(order(ranks=ranks, accumulate=accumulate)) == 4 * accumulate


@pytest.mark.parametrize("step", [1, 3, 4, 9])
def test_continues_after_any_step(step):
    whole = batches(order(flip=True), 12)
    rest = batches(order(flip=True, step=step), 12 - step)
    assert all(torch.equal(a, b) for x, y in zip(whole[step:], rest, strict=True) for a, b in zip(x, y, strict=True))


def test_loaders_serve_a_loop_without_a_trainer(store, make_module, make_trainer):
    """Epochs are those of a run with the same seed, and end; validation visits every held-out sample once."""
    data = LatentDataModule(store, val_size=8, global_batch_size=8, seed=3)
    data.prepare_data()
    data.setup()
    loader = data.train_dataloader()
    epochs = [[batch["labels"] for batch in loader] for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [len(loader)] * 2 == [4, 4]
    assert torch.cat(epochs[0]).tolist() != torch.cat(epochs[1]).tolist()
    assert torch.cat([batch["index"] for batch in data.val_dataloader()]).tolist() == list(range(8))
    assert sum(int(batch["valid"].sum()) for batch in data.predict_dataloader()) == data.predict_samples

    seen, module = [], make_module()
    step = module.training_step
    module.training_step = lambda batch, batch_idx: seen.append(batch["labels"]) or step(batch, batch_idx)
    make_trainer(max_steps=8).fit(module, LatentDataModule(store, val_size=8, global_batch_size=8, seed=3))
    assert torch.equal(torch.cat(seen), torch.cat(epochs[0] + epochs[1]))


def test_half_are_flipped():
    flips = torch.cat([flip for _, flip in batches(order(1000, 100, flip=True), 100)])
    assert abs(flips.float().mean().item() - 0.5) < 0.02
    assert not torch.cat([flip for _, flip in batches(order(1000, 100), 100)]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ranks=5), "12 does not divide evenly over 5 devices and 1 accumulated batch; choose a multiple of 5"),
        (dict(batch=64), "global_batch_size 64 exceeds the 50 training samples"),
    ],
)
def test_batches_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        order(**changes)


@pytest.mark.parametrize(("n", "ranks"), [(10, 1), (10, 3), (2, 4), (12, 4)])
def test_evaluation_visits_every_sample_once_with_equal_work_for_all_ranks(n, ranks):
    parts = [list(EvalOrder(n, 2, ranks, r)) for r in range(ranks)]
    assert len({tuple(len(index) for index, _ in part) for part in parts}) == 1
    assert all(len(part) == len(EvalOrder(n, 2, ranks, 0)) for part in parts)
    visited = [i for part in parts for index, valid in part for i in index[valid].tolist()]
    assert sorted(visited) == list(range(n))


SHARDS = torch.arange(60) // 5  # 12 shards of 5 samples


def windowed(size=3, prefetch=lambda shards: None, **settings):
    settings = dict(batch=6, ranks=1, rank=0, accumulate=1, step=0) | settings
    return TrainOrder(
        60, settings["batch"], settings["ranks"], settings["rank"], settings["accumulate"], 0, True,
        lambda: settings["step"], windows=ShuffleWindows(SHARDS, size, prefetch),
    )  # fmt: skip


def test_windows_confine_the_shards_of_a_stretch_of_samples():
    order = windowed()
    groupings = set()
    for epoch in range(5):
        index, _ = order.permutation(epoch)
        assert index.sort().values.tolist() == list(range(60))
        stretches = [frozenset(SHARDS[part].tolist()) for part in index.split(15)]
        assert [len(shards) for shards in stretches] == [3] * 4
        groupings.update(stretches)
        assert (SHARDS[index].diff() != 0).sum() > 30  # samples of a window are mixed, not read shard by shard
    assert len(groupings) > 10


def test_samples_of_a_window_are_exchangeable():
    order = windowed()
    places = torch.stack([order.permutation(epoch)[0].argsort() for epoch in range(400)])  # (epochs, samples)
    assert (places % 15).double().mean(0).sub(7).abs().max() < 4 * 4.32 / 400**0.5  # uniform on 0..14: std 4.32
    assert places.double().mean(0).sub(29.5).abs().max() < 4 * 17.3 / 400**0.5


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (3, 2)])
def test_a_windowed_step_sees_the_same_samples_on_any_number_of_ranks(ranks, accumulate):
    one = batches(windowed(), 14)
    parts = [batches(windowed(ranks=ranks, rank=r, accumulate=accumulate), 14 * accumulate) for r in range(ranks)]
    for step, (index, flip) in enumerate(one):
        pieces = [parts[r][step * accumulate + m] for m in range(accumulate) for r in range(ranks)]
        assert torch.equal(torch.cat([i for i, _ in pieces]), index)
        assert torch.equal(torch.cat([f for _, f in pieces]), flip)
    rest = batches(windowed(step=4), 10)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one[4:], rest, strict=True))


def test_at_most_two_windows_are_wanted_and_all_that_a_batch_needs_was_wanted_before():
    wanted = []
    order = iter(windowed(prefetch=wanted.append, batch=5))
    for _ in range(12 * 4):
        index, _ = next(order)
        assert set(SHARDS[index].tolist()) <= set(wanted[-1][:3])
    assert all(len(shards) == len(set(shards)) <= 6 for shards in wanted)
    assert len(wanted) == 4 * 4  # one call for each window of each epoch
    for now, then in pairwise(wanted):
        assert set(then[:3]) <= set(now)
