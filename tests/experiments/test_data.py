"""Images: their splits, their batches in memory and on demand, and what is said when they lack."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import prepare_data
from experiments.data import Part
from experiments.data.folders import ImageFolder
from experiments.data.images import Digits, epoch_order, load_images, stratified_split
from experiments.data.prepared import PreparedImages
from experiments.train.errors import DatasetNotFoundError, UsageError

ON_DEMAND = {"in_memory_bytes": 0}


def rows(images):
    return {row.tobytes() for row in images.reshape(len(images), -1)}


def training(dataset):
    """All training images and labels, in the order of epoch 0."""
    [batch] = dataset.train_batches(dataset.train_size, seed=0, epoch=0)
    return batch.inputs, batch.targets


def evaluation(dataset):
    """All images and labels that are reported on, in order."""
    return dataset.evaluation_examples(np.arange(dataset.evaluation_size))


LABELS = {}
"""Labels of CIFAR-10 by split, which take seconds to read."""


@pytest.fixture(params=["digits", "folder", "prepared"])
def opened(request, tmp_path, monkeypatch):
    """`load_images` of a small data set of each kind."""
    if request.param == "digits":
        name, options = "digits", {"train_examples": 70, "eval_examples": 53, "seed": 3}
    elif request.param == "folder":
        name, options = str(noise_folder(tmp_path / "noise")), {"image_size": 6}
    else:
        folder, labels = request.getfixturevalue("shared_tfds"), PreparedImages.labels

        def once(self, split):
            if split not in LABELS:
                LABELS[split] = labels(self, split)
            return LABELS[split]

        monkeypatch.setattr(PreparedImages, "labels", once)
        name, options = "cifar10", {"data_dir": folder, "train_examples": 60, "eval_examples": 41}
    return lambda **more: load_images(name, **options, **more)


def noise_folder(folder, count=40):
    """Three classes of noise, in files of two sizes."""
    generator = np.random.default_rng(0)
    for number in range(3 * count):
        file = folder / "abc"[number % 3] / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (9, 7, 3) if number % 2 else (6, 6, 3)
        Image.fromarray(generator.integers(256, size=shape, dtype=np.uint8)).save(file)
    return folder


def assert_same_batches(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for array, wanted in zip(one[:3], other[:3], strict=True):
            assert array.dtype == wanted.dtype
            np.testing.assert_array_equal(array, wanted)


@pytest.mark.slow
def test_digits_are_split_stratified_and_disjoint():
    dataset = load_images("digits")
    assert (dataset.train_size, dataset.evaluation_size) == (1438, 359)
    assert (dataset.image_shape, dataset.num_classes) == ((8, 8, 1), 10)
    assert dataset.evaluation_name == "test"
    images, labels = training(dataset)
    test_images, test_labels = evaluation(dataset)
    assert images.dtype == np.uint8
    assert images.max() == dataset.white
    train, test = np.bincount(labels), np.bincount(test_labels)
    assert np.abs(test - 0.2 * (train + test)).max() < 1
    # No two of the digits have the same pixels, so equal pixels would be a leak.
    assert len(rows(images)) == 1438
    assert not rows(images) & rows(test_images)


def test_test_split_of_digits_does_not_depend_on_the_seed():
    first, second = (evaluation(load_images("digits", seed=seed)) for seed in (0, 1))
    np.testing.assert_array_equal(first[0], second[0])
    # Pinned: reported accuracies hold for these examples.
    assert first[1][:10].tolist() == [5, 9, 2, 4, 6, 7, 9, 3, 4, 6]


def test_validation_comes_out_of_train_and_is_the_same_for_each_seed_and_subset():
    whole = rows(training(load_images("digits"))[0])
    first = load_images("digits", validation_fraction=0.2, seed=0)
    subset = {"train_examples": 100, "eval_examples": 288}
    second = load_images("digits", validation_fraction=0.2, seed=1, **subset)
    assert first.evaluation_name == "validation"
    held_out = evaluation(first)[0]
    assert len(held_out) == 288
    np.testing.assert_array_equal(held_out, evaluation(second)[0])
    assert rows(held_out) | rows(training(first)[0]) == whole
    assert not rows(held_out) & rows(training(first)[0])
    assert not rows(held_out) & rows(training(second)[0])


def test_subset_is_stratified_and_follows_the_seed():
    sets = [training(load_images("digits", train_examples=100, seed=s)) for s in (0, 0, 1)]
    for images, labels in sets:
        assert len(images) == 100
        assert set(np.bincount(labels)) <= {9, 10, 11}
    np.testing.assert_array_equal(sets[0][0], sets[1][0])
    assert rows(sets[0][0]) != rows(sets[2][0])


def test_reported_subset_is_stratified_and_the_same_for_each_seed():
    sets = [load_images("digits", train_examples=50, eval_examples=100, seed=s) for s in (0, 1)]
    images, labels = evaluation(sets[0])
    np.testing.assert_array_equal(images, evaluation(sets[1])[0])
    assert set(np.bincount(labels)) <= {9, 10, 11}
    assert rows(images) < rows(evaluation(load_images("digits"))[0])
    # As many as are trained on, unless told otherwise.
    assert load_images("digits", train_examples=50).evaluation_size == 50
    assert load_images("digits", train_examples=1400).evaluation_size == 359


def test_more_examples_than_there_are():
    with pytest.raises(UsageError, match=r"--data.train must be at most 1438.*got 1439"):
        load_images("digits", train_examples=1439)
    with pytest.raises(UsageError, match=r"--data.eval must be at most 359.*got 360"):
        load_images("digits", eval_examples=360)


def test_stratified_split_draws_exactly_the_count():
    labels = np.repeat([0, 1, 2], [7, 11, 2])
    for count in range(1, 20):
        drawn, rest = stratified_split(labels, count, np.random.default_rng(3))
        assert len(drawn) == count
        np.testing.assert_array_equal(np.sort(np.concatenate([drawn, rest])), np.arange(20))
        shares = np.bincount(labels[drawn], minlength=3) - np.bincount(labels) * count / 20
        assert np.abs(shares).max() < 1
    with pytest.raises(ValueError, match="count must be from 1 to 19, got 20"):
        stratified_split(labels, 20, np.random.default_rng(3))


def test_order_is_a_permutation_of_its_own_in_each_epoch():
    orders = [epoch_order(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(50))
    assert len({order.tobytes() for order in orders}) == 4


@pytest.mark.parametrize("more", [{}, ON_DEMAND], ids=["memory", "on_demand"])
def test_training_batches_by_hand(more):
    """From scikit-learn's own arrays, without this module but for the images that it held out."""
    from sklearn.datasets import load_digits

    dataset = load_images("digits", **more)
    digits, held_out = load_digits(), rows(evaluation(dataset)[0])
    images = digits.images.astype(np.uint8)[..., None]
    kept = np.array([image.tobytes() not in held_out for image in images])
    images, labels = images[kept], digits.target[kept]
    # Pinned: a run that goes on with another version has the same batches.
    order = np.random.default_rng([5, 7, 2]).permutation(1438)
    batches = list(dataset.train_batches(100, seed=5, epoch=7))
    assert len(batches) == 14  # and 38 examples are left out
    for number, (inputs, targets, counts, *_) in enumerate(batches):
        chosen = order[100 * number : 100 * (number + 1)]
        np.testing.assert_array_equal(inputs, images[chosen])
        np.testing.assert_array_equal(targets, labels[chosen])
        assert (inputs.dtype, targets.dtype, counts.dtype) == (np.uint8, np.int32, bool)
        assert counts.shape == (100,)
        assert counts.all()


@pytest.mark.slow
def test_batches_on_demand_are_those_in_memory(opened):
    memory, on_demand = opened(), opened(**ON_DEMAND)
    for epoch in (0, 1):
        assert_same_batches(
            on_demand.train_batches(9, seed=2, epoch=epoch),
            memory.train_batches(9, seed=2, epoch=epoch),
        )
    assert_same_batches(on_demand.evaluation_batches(10), memory.evaluation_batches(10))
    for found, expected in zip(
        on_demand.evaluation_examples(np.arange(7)),
        memory.evaluation_examples(np.arange(7)),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(on_demand.evaluation_labels(), memory.evaluation_labels())


@pytest.mark.parametrize("more", [{}, ON_DEMAND], ids=["memory", "on_demand"])
def test_training_resumes_at_any_batch(opened, more):
    dataset = opened(**more)
    whole = list(dataset.train_batches(8, seed=1, epoch=4))
    for start in range(len(whole)):
        assert_same_batches(dataset.train_batches(8, seed=1, epoch=4, start=start), whole[start:])
    for start in (len(whole), len(whole) + 1):
        assert list(dataset.train_batches(8, seed=1, epoch=4, start=start)) == []


def count_reads(monkeypatch):
    """Has `Digits` note how many images it is asked for."""
    asked, read = [], Digits.read

    def noting(self, split, positions):
        asked.extend(positions.tolist())
        return read(self, split, positions)

    monkeypatch.setattr(Digits, "read", noting)
    return asked


def test_skipped_batches_are_not_decoded(monkeypatch):
    dataset = load_images("digits", **ON_DEMAND)
    asked = count_reads(monkeypatch)
    assert len(list(dataset.train_batches(100, seed=0, epoch=0, start=12))) == 2
    # Threads read in any order. No image is read twice, and none but those of the two batches.
    assert len(asked) == len(set(asked)) == 200


def test_a_reader_that_is_left_behind_stops(monkeypatch):
    dataset = load_images("digits", **ON_DEMAND)
    asked = count_reads(monkeypatch)
    batches = dataset.train_batches(10, seed=0, epoch=0)
    next(batches)
    del batches
    # The batch that was taken, and what the threads had begun of the next.
    assert len(asked) <= 40


def test_what_fits_is_held_in_memory(monkeypatch):
    asked = count_reads(monkeypatch)
    size = 1797 * 64
    load_images("digits", in_memory_bytes=size - 1)
    assert asked == []
    load_images("digits", in_memory_bytes=size)
    assert sorted(asked) == list(range(1797))


@pytest.mark.parametrize("more", [{}, ON_DEMAND], ids=["memory", "on_demand"])
@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [
        (10, 1, (10, [10, 10, 10, 10, 10, 3])),
        (53, 2, (53, [53])),
        (60, 1, (53, [53])),  # cut to the number of examples
        (60, 53, (53, [53])),
        (60, 2, (60, [53])),  # 53 would not be a multiple of 2
        (27, 3, (27, [27, 26])),
    ],
)
def test_each_example_is_counted_once(more, size, multiple, expected):
    dataset = load_images("digits", train_examples=70, eval_examples=53, **more)
    images, labels = evaluation(dataset)
    batches = list(dataset.evaluation_batches(size, multiple_of=multiple))
    width, counted = expected
    assert [int(batch.counts.sum()) for batch in batches] == counted
    start = 0
    for batch in batches:
        assert batch.inputs.shape == (width, 8, 8, 1)
        assert batch.counts.shape == batch.targets.shape == (width,)
        count = int(batch.counts.sum())
        np.testing.assert_array_equal(batch.inputs[batch.counts], images[start : start + count])
        np.testing.assert_array_equal(batch.targets[batch.counts], labels[start : start + count])
        # Filling repeats examples of the same batch.
        assert rows(batch.inputs) == rows(images[start : start + count])
        start += count
    assert start == 53


def test_processes_share_each_batch(opened):
    for more in ({}, ON_DEMAND):
        dataset = opened(**more)

        def both(count, dataset=dataset):
            """The batches that each of `count` processes gets."""
            for part in (Part(index, count) for index in range(count)):
                yield (
                    list(dataset.train_batches(12, seed=0, epoch=0, start=1, part=part)),
                    list(dataset.evaluation_batches(20, part=part)),
                )

        [alone] = both(1)
        for count in (2, 4):
            shares = list(both(count))
            for kind in (0, 1):
                # Put together again, and no smaller or larger than that: disjoint and whole.
                parts = zip(*(share[kind] for share in shares), strict=True)
                joined = [
                    [np.concatenate(arrays) for arrays in zip(*(b[:3] for b in p), strict=True)]
                    for p in parts
                ]
                assert_same_batches(joined, alone[kind])
            assert all(len(batch.targets) == 12 // count for batch in shares[0][0])
            assert sum(int(b.counts.sum()) for s in shares for b in s[1]) == dataset.evaluation_size
        with pytest.raises(UsageError, match="12 examples cannot be shared equally by 5 processes"):
            next(both(5))


def test_checksum_in_memory_covers_all_pixels_and_labels(tmp_path):
    folder = noise_folder(tmp_path / "noise")
    checksum = load_images(str(folder), image_size=6).checksum()
    assert load_images(str(folder), image_size=6, seed=1).checksum() == checksum
    file = folder / "b" / "004.png"
    pixels = np.array(Image.open(file))
    pixels[0, 0, 0] ^= 255
    Image.fromarray(pixels).save(file)
    changed = load_images(str(folder), image_size=6).checksum()
    file.rename(folder / "c" / "004.png")
    relabelled = load_images(str(folder), image_size=6).checksum()
    assert len({checksum, changed, relabelled}) == 3


def test_checksum_on_demand_decodes_nothing(tmp_path, monkeypatch):
    folder = noise_folder(tmp_path / "noise")

    def checksum(path=folder, **more):
        return load_images(str(path), **{"image_size": 6, **ON_DEMAND, **more}).checksum()

    monkeypatch.setattr(ImageFolder, "read", lambda *arguments: pytest.fail("decodes an image"))
    first = checksum()
    os.utime(folder / "a" / "000.png", (0, 0))
    assert checksum() == first
    assert checksum(shutil.copytree(folder, tmp_path / "copy")) == first
    others = [checksum(image_size=8), checksum(train_examples=50), checksum(eval_examples=20)]
    others.append(checksum(validation_fraction=0.2))
    file = folder / "b" / "004.png"
    file.write_bytes(file.read_bytes() + b"longer")
    others.append(checksum())
    file.rename(file.with_name("004b.png"))
    others.append(checksum())
    assert len({first, *others}) == 7


def test_checksum_of_prepared_data_on_demand(shared_tfds, monkeypatch):
    def refuse(*arguments):
        pytest.fail("reads a record")

    monkeypatch.setattr(PreparedImages, "_fetch", refuse)
    sets = [load_images(n, data_dir=shared_tfds, **ON_DEMAND) for n in ("cifar10", "mnist")]
    assert [dataset.train_size for dataset in sets] == [50_000, 60_000]
    assert sets[0].checksum() != sets[1].checksum()
    again = load_images(str(shared_tfds / "mnist"), **ON_DEMAND)
    assert again.checksum() == sets[1].checksum()


def test_a_file_that_cannot_be_decoded_is_named_on_demand(tmp_path):
    folder = noise_folder(tmp_path / "noise")
    file = folder / "b" / "001.png"
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(DatasetNotFoundError, match=r"cannot decode .*001\.png"):
        load_images(str(folder), image_size=6)
    dataset = load_images(str(folder), image_size=6, **ON_DEMAND)
    train = dataset.train_batches(dataset.train_size, seed=0, epoch=0)
    with pytest.raises(DatasetNotFoundError, match=r"cannot decode .*001\.png"):
        [*train, *dataset.evaluation_batches(8)]


def test_reads_prepared_images(shared_tfds):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(shared_tfds / "cifar10" / "3.0.2")
    folder = PreparedImages("cifar10", shared_tfds)
    assert folder.sizes == {"train": 50_000, "test": 10_000}
    positions = np.array([0, 7, 9999])
    images, labels = folder.read("test", positions)
    source = builder.as_data_source(split="test")
    for position, image, label in zip(positions.tolist(), images, labels, strict=True):
        np.testing.assert_array_equal(image, source[position]["image"])
        assert label == source[position]["label"]
    assert np.bincount(folder.labels("test")).tolist() == [1000] * 10


@pytest.mark.slow
def test_reads_mnist(shared_tfds):
    dataset = load_images("mnist", data_dir=shared_tfds, **ON_DEMAND)
    assert (dataset.image_shape, dataset.evaluation_size) == ((28, 28, 1), 10_000)
    # The first labels and the sizes of the classes of the test images, as they are published.
    counts = np.bincount(PreparedImages("mnist", shared_tfds).labels("test"))
    assert counts.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    images, _ = dataset.evaluation_examples(np.arange(0, dataset.evaluation_size, 20))
    assert 25 < images.mean() < 42  # white on black; the mean of the whole set is 33.3


@pytest.mark.slow
def test_loads_a_subset_of_prepared_images(shared_tfds):
    dataset = load_images(
        "cifar10", data_dir=shared_tfds, train_examples=50, validation_fraction=0.001
    )
    assert dataset.image_shape == (32, 32, 3)
    assert dataset.num_classes == 10
    assert dataset.white == 255
    images, labels = training(dataset)
    assert np.bincount(labels).tolist() == [5] * 10
    assert np.bincount(evaluation(dataset)[1]).tolist() == [5] * 10
    assert images.dtype == np.uint8
    assert 90 < images.mean() < 150


def test_missing_data_name_folder_and_command(tmp_path):
    with pytest.raises(DatasetNotFoundError) as caught:
        load_images("mnist", data_dir=tmp_path)
    message = str(caught.value)
    assert f"no prepared data set in {tmp_path / 'mnist'}" in message
    assert "--data-dir" in message
    assert "pip install -e '.[prepare]'" in message
    assert f"python -m experiments.prepare_data mnist --data-dir {tmp_path}" in message
    # It looked, and did not start to download.
    assert list(tmp_path.iterdir()) == []


def test_default_folder_is_that_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(DatasetNotFoundError, match=str(tmp_path)):
        load_images("cifar10")


def copy_description(shared_tfds, data_dir, **changes):
    folder = data_dir / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    for file in (shared_tfds / "cifar10" / "3.0.2").glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | changes))


def test_other_formats_and_missing_files(shared_tfds, tmp_path):
    copy_description(shared_tfds, tmp_path / "records", fileFormat="tfrecord")
    with pytest.raises(DatasetNotFoundError, match="is in the format tfrecord"):
        load_images("cifar10", data_dir=tmp_path / "records")
    copy_description(shared_tfds, tmp_path / "incomplete")
    with pytest.raises(DatasetNotFoundError, match="is incomplete"):
        load_images("cifar10", data_dir=tmp_path / "incomplete")


def test_preparing_without_tensorflow(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert prepare_data.main(["cifar10", "--data-dir", str(tmp_path)]) == 2
    assert "pip install -e '.[prepare]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_prepared_is_what_is_read(tmp_path, monkeypatch, capsys):
    """With the folder already prepared nothing is downloaded, and the command says where it is."""
    asked = {}

    class Builder:
        data_dir = tmp_path / "mnist" / "3.0.1"

        def download_and_prepare(self):
            asked["prepared"] = True

    def builder(name, **options):
        asked.update(options, name=name)
        return Builder()

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("tensorflow_datasets.builder", builder)
    assert prepare_data.main(["mnist", "--data-dir", str(tmp_path)]) == 0
    expected = {"name": "mnist", "data_dir": tmp_path, "file_format": "array_record"}
    assert asked == {**expected, "prepared": True}
    assert str(Builder.data_dir) in capsys.readouterr().out


def test_without_tensorflow_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DatasetNotFoundError, match=r"pip install -e '.\[experiments\]'"):
        load_images("mnist", data_dir=tmp_path)
