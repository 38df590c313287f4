"""Mixtures of stores, subsets of classes and balanced classes: exact counts, and the same order everywhere."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from ditlit.data import LatentDataModule, write_store
from ditlit.data.collection import StoreCollection, hold_out
from ditlit.data.mixture import Mixture, make_mixture, split_evenly
from ditlit.data.sampler import TrainOrder
from ditlit.errors import InputError

K = 4
NAMES = ["tench", "goldfish", "great white shark", "tiger shark"]


def make_store(folder, start, size, **changes):
    """Latents that hold their sample's number, start + 0, 1, ...; labels with class k at every 4th place."""
    latents = torch.arange(start, start + size).float()[:, None, None, None].expand(size, 1, 2, 2)
    about = dict(shard_size=5, class_names=NAMES) | changes
    write_store(folder, latents, torch.arange(size) % K, K, **about)
    return str(folder)


@pytest.fixture
def stores(tmp_path):
    return make_store(tmp_path / "a", 0, 20), make_store(tmp_path / "b", 100, 12)


def set_up(store, step=0, ranks=1, rank=0, **settings):
    data = LatentDataModule(store, **(dict(global_batch_size=4, flip=False, verify=False) | settings))
    data.setup()
    data.trainer = SimpleNamespace(world_size=ranks, global_rank=rank, accumulate_grad_batches=1, global_step=step)
    return data


def read(data, batches):
    """Numbers and labels of the samples in the next batches."""
    iterator = iter(data.train_dataloader())
    parts = [next(iterator) for _ in range(batches)]
    numbers = torch.cat([part["latents"][:, 0, 0, 0] for part in parts]).int().tolist()
    return numbers, torch.cat([part["labels"] for part in parts]).tolist()


def draw(mixture, seed=0):
    return mixture.draw(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("total", "shares", "parts"),
    [(10, [1, 1, 1], [4, 3, 3]), (7, [0.5, 0.5], [4, 3]), (100, [3, 1], [75, 25]), (5, [0, 2], [0, 5])],
)
def test_totals_are_split_in_proportion(total, shares, parts):
    assert split_evenly(total, shares) == parts


def test_a_group_that_gives_more_than_it_holds_repeats_evenly():
    mixture = Mixture([torch.arange(10), torch.arange(10, 13)], [4, 8])
    rests = set()
    for seed in range(20):
        counts = Counter(draw(mixture, seed).tolist())
        small = [counts[i] for i in range(10, 13)]
        assert sum(counts[i] for i in range(10)) == 4 and max(counts[i] for i in range(10)) == 1
        assert sorted(small) == [2, 3, 3]
        rests.add(tuple(small))
    assert len(rests) == 3


def test_stores_are_mixed_exactly_by_weight():
    store_of = torch.tensor([0] * 60 + [1] * 20 + [2] * 20)
    counts = store_of[draw(make_mixture(store_of, [1, 2, 7]))].bincount()
    assert counts.tolist() == [10, 20, 70]


def test_classes_are_balanced_exactly():
    labels = torch.tensor([0] * 50 + [1] * 5 + [2] * 6)
    rows = draw(make_mixture(torch.zeros(61).long(), None, labels, 3))
    assert labels[rows].bincount().tolist() == [20, 20, 20]
    assert rows[labels[rows] == 1].bincount(minlength=55)[50:].tolist() == [4] * 5


def test_weights_hold_within_balanced_classes():
    labels = torch.arange(80) % 2
    store_of = (torch.arange(80) >= 60).long()
    rows = draw(make_mixture(store_of, [1, 3], labels, 2))
    assert (2 * labels[rows] + store_of[rows]).bincount().tolist() == [10, 30, 10, 30]


def test_a_list_of_stores_is_joined(stores):
    data = set_up(list(stores))
    numbers, labels = read(data, 8)
    assert sorted(numbers) == [*range(20), *range(100, 112)]
    assert all(label == number % 100 % K for number, label in zip(numbers, labels, strict=True))
    assert data.manifest.num_samples == 32


def test_a_mapping_of_stores_is_mixed(stores):
    for step in (0, 8, 16):
        numbers, _ = read(set_up({stores[0]: 1, stores[1]: 3}, step), 8)
        counts = Counter(numbers)
        assert sum(counts[i] for i in range(20)) == 8
        assert {counts[i] for i in range(100, 112)} == {2}


def test_chosen_classes_are_renumbered_in_the_order_given(stores):
    data = set_up(stores[0], classes=["tiger shark", 1], val_store=stores[1], class_balanced=True)
    numbers, labels = read(data, 2)
    assert all(number % K == (3, 1)[label] for number, label in zip(numbers, labels, strict=True))
    assert data.manifest.num_classes == 2 and data.manifest.class_names == ["tiger shark", "goldfish"]
    (batch,) = data.val_dataloader()
    assert batch["labels"].tolist() == [1, 0] * 3
    assert (batch["latents"][:, 0, 0, 0].int() % K).tolist() == [1, 3] * 3


@pytest.mark.parametrize(
    ("about", "settings", "expected"),
    [
        (dict(class_names=NAMES[::-1]), {}, [3, 2, 1, 0]),
        (dict(class_names=["tiger shark", "ray", "tench", "eel"]), {}, [3, None, 0, None]),
        (dict(class_names=NAMES[::-1]), dict(classes=["tiger shark", "tench"]), [0, None, None, 1]),
        (dict(class_names=None), dict(classes=[3, 0]), [1, None, None, 0]),
        (dict(class_names=None), dict(val_classes="goldfish,0,3,2"), [1, 0, 3, 2]),
        (dict(class_names=None), dict(val_classes=[1, 0, 3, 2], classes="0,tiger shark"), [None, 0, 1, None]),
    ],
)
def test_validation_samples_get_the_labels_that_training_gives_their_classes(
    stores, tmp_path, about, settings, expected
):
    val = make_store(tmp_path / "c", 0, 12, **about)
    data = set_up(stores[0], val_store=val, **settings)
    (batch,) = data.val_dataloader()
    found = dict(zip((batch["latents"][:, 0, 0, 0].int() % K).tolist(), batch["labels"].tolist(), strict=True))
    assert [found.get(k) for k in range(K)] == expected


def test_a_validation_store_that_lacks_a_class_is_taken(stores, tmp_path):
    def val(name, class_names):
        write_store(tmp_path / name, torch.zeros(6, 1, 2, 2), torch.arange(6) % 2, 2, class_names=class_names)
        return str(tmp_path / name)

    data = set_up(stores[0], val_store=val("named", ["tiger shark", "goldfish"]))
    (batch,) = data.val_dataloader()
    assert batch["labels"].tolist() == [3, 1] * 3
    with pytest.raises(InputError, match=r"has 2 classes, .*a has 4, .*set data.val_classes to the class of"):
        set_up(stores[0], val_store=val("unnamed", None))
    with pytest.raises(InputError, match="unnamed has no samples of the classes that are wanted"):
        set_up(stores[0], val_store=str(tmp_path / "unnamed"), val_classes=[0, 1], classes=[2, 3])


@pytest.mark.parametrize("window", [None, 2])
def test_held_out_samples_are_not_trained_on(stores, window):
    data = set_up(stores[0], val_size=8, classes=[0, 1, 2], shuffle_window=window)
    trained = set(read(data, 10)[0])
    held_out = {int(x) for batch in data.val_dataloader() for x in batch["latents"][batch["valid"], 0, 0, 0]}
    assert len(held_out) == 8 and not trained & held_out and all(i % K < 3 for i in trained | held_out)


def test_whole_shards_are_held_out():
    shard_of = torch.arange(100) // 10
    train, val = hold_out(torch.arange(100), 25, torch.Generator().manual_seed(0), shard_of)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(100))
    assert sorted(shard_of[val].bincount().tolist())[-3:] == [5, 10, 10] and len(shard_of[val].unique()) == 3


def test_the_mixed_order_is_the_same_on_two_ranks_and_after_a_restart(stores):
    settings = dict(store={stores[0]: 1, stores[1]: 2}, shuffle_window=2, class_balanced=True)
    whole, _ = read(set_up(**settings), 12)
    parts = [read(set_up(ranks=2, rank=rank, step=3, **settings), 9)[0] for rank in range(2)]
    joined = [
        number
        for i in range(0, 18, 2)
        for number in (*parts[0][i : i + 2], *parts[1][i : i + 2])
    ]  # fmt: skip
    assert joined == whole[12:]


def test_an_order_over_a_mixture_has_its_length():
    order = TrainOrder(5, 4, 1, 0, 1, 0, False, lambda: 0, mixture=Mixture([torch.arange(5)], [12]))
    assert len(order) == 3


@pytest.mark.parametrize(
    ("changes", "entry"),
    [
        (dict(classes=[1, 0]), "data.classes"),
        (dict(class_balanced=True), "data.class_balanced"),
        (dict(shuffle_window=3), "data.shuffle_window"),
        (dict(global_batch_size=2), "data.global_batch_size"),
    ],
)
def test_a_checkpoint_of_another_order_is_refused(stores, changes, entry):
    settings = dict(store=stores[0], classes=[0, 1])
    data, other = set_up(**settings), set_up(**(settings | changes))
    for old, new in ((data, other), (other, data)):
        new.load_state_dict(old.state_dict())
        with pytest.raises(InputError, match=f"was trained with {entry} .* set it back"):
            new.train_dataloader()
        new.load_state_dict(new.state_dict())
        new.train_dataloader()


def test_a_checkpoint_from_before_these_settings_continues(stores):
    data = set_up(stores[0])
    data.load_state_dict({"data.global_batch_size": 4, "data.seed": 0, "samples": 20})
    data.train_dataloader()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(classes=["tiger"]), "no class 'tiger'; names like it are tiger shark"),
        (dict(classes=[4]), "no class 4: .*a knows classes 0 to 3"),
        (dict(classes=[]), "no class is named"),
        (dict(classes=[1, "goldfish"]), "at least one class and none twice"),
        (dict(shuffle_window=0), "shuffle_window must be positive, got 0"),
        (dict(store=[]), "names no store"),
    ],
)
def test_bad_settings_are_refused(stores, changes, message):
    with pytest.raises(InputError, match=message):
        set_up(**(dict(store=stores[0]) | changes)).train_dataloader()


@pytest.mark.parametrize("weight", [0, -1, float("nan")])
def test_weights_must_be_positive(stores, weight):
    with pytest.raises(InputError, match="weights of stores must be positive"):
        set_up({stores[0]: 1, stores[1]: weight})


def test_balance_needs_samples_of_every_class(tmp_path):
    write_store(tmp_path, torch.zeros(4, 1, 2, 2), torch.tensor([0, 0, 2, 2]), 3)
    with pytest.raises(InputError, match=r"samples of every class, but there are none of \[1\]"):
        set_up(str(tmp_path), class_balanced=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(shift=[1.0]), r"hold different latents: shift is \[0.0\] and \[1.0\]"),
        (dict(class_names=NAMES[::-1]), "number their classes differently: 'tench' is 'tiger shark' in the other"),
    ],
)
def test_stores_of_other_latents_or_classes_are_not_mixed(stores, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        set_up([stores[0], make_store(tmp_path / "c", 0, 8, **changes)])


def test_stores_of_the_same_vae_in_two_places_go_together(tmp_path):
    latents, labels = torch.zeros(4, 1, 2, 2), torch.arange(4)
    stores = []
    for i, vae in enumerate(({"source": "a", "hash": "1"}, {"source": "b", "hash": "1"}, {"source": "a", "hash": "2"})):
        stores.append(write_store(tmp_path / str(i), latents, labels, 4, vae=vae))
    assert len(StoreCollection(stores[:2])) == 8
    with pytest.raises(InputError, match="hold different latents: vae is 1 and 2"):
        StoreCollection(stores[::2])
