"""Folders of one's own images, read and trained on."""

import numpy as np
import pytest
from PIL import Image

from experiments import image_classification
from experiments.data.images import load_images
from experiments.train.errors import DatasetNotFoundError, UsageError
from tests.experiments.conftest import TINY
from tests.experiments.test_data import evaluation, training
from tests.experiments.training import records, run

CLASSES = ("apple", "bread", "cup", "door", "egg")


def make(folder, counts=(10, 5, 15, 10, 10), size=(12, 12), mode="RGB", suffix="png"):
    """A folder of images whose first pixel is 51 times the number of the class."""
    for label, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((*size, 3), 51 * label, np.uint8)
            pixels[-1, -1] = number  # no two are equal
            image = Image.fromarray(pixels).convert(mode)
            image.save(folder / name / f"{number:02d}.{suffix}")
    (folder / "notes.txt").write_text("not an image", encoding="utf-8")
    return folder


def test_a_stratified_fifth_is_the_test_split(tmp_path):
    dataset = load_images(str(make(tmp_path / "food")))
    assert dataset.name == "food"
    assert dataset.num_classes == 5
    assert dataset.image_shape == (12, 12, 3)
    (images, labels), (test_images, test_labels) = training(dataset), evaluation(dataset)
    assert np.bincount(test_labels).tolist() == [2, 1, 3, 2, 2]
    assert np.bincount(labels).tolist() == [8, 4, 12, 8, 8]
    np.testing.assert_array_equal(images[:, 0, 0, 0], 51 * labels)
    np.testing.assert_array_equal(test_images[:, 0, 0, 0], 51 * test_labels)
    # All images, each once.
    seen = {image.tobytes() for image in (*images, *test_images)}
    assert len(seen) == 50
    again = load_images(str(tmp_path / "food"), seed=1)
    assert again.checksum() == dataset.checksum()


def test_train_and_test_folders_are_kept_apart(tmp_path):
    make(tmp_path / "train")
    make(tmp_path / "val", counts=(1, 2, 3, 1, 1))
    dataset = load_images(str(tmp_path))
    assert (dataset.train_size, dataset.evaluation_size) == (50, 8)
    assert np.bincount(evaluation(dataset)[1]).tolist() == [1, 2, 3, 1, 1]
    (tmp_path / "val" / "cup").rename(tmp_path / "val" / "mug")
    with pytest.raises(DatasetNotFoundError, match="mug"):
        load_images(str(tmp_path))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)])
def test_colours(tmp_path, mode, channels):
    dataset = load_images(str(make(tmp_path, mode=mode)))
    assert dataset.image_shape == (12, 12, channels)
    images, labels = training(dataset)
    np.testing.assert_array_equal(images[:, 0, 0, 0], 51 * labels)


def test_sizes_that_differ(tmp_path):
    make(tmp_path)
    Image.new("RGB", (20, 9)).save(tmp_path / "cup" / "wide.png")
    with pytest.raises(UsageError, match=r"9x20.*--data.size|--data.size.*9x20"):
        load_images(str(tmp_path))
    dataset = load_images(str(tmp_path), image_size=16)
    assert dataset.image_shape == (16, 16, 3)
    # Resizing an image of one colour leaves its colour.
    images, _ = training(dataset)
    assert set(images[:, 0, 0, 0].tolist()) == {0, 51, 102, 153, 204}


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(DatasetNotFoundError, match="no folder"):
        load_images(str(tmp_path / "absent"))
    with pytest.raises(DatasetNotFoundError, match="at least two classes"):
        load_images(str(tmp_path))
    with pytest.raises(UsageError, match=r"--data\.size"):
        load_images("digits", image_size=16)
    make(tmp_path)
    (tmp_path / "bread" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DatasetNotFoundError, match=r"broken\.png"):
        load_images(str(tmp_path))
    (tmp_path / "bread" / "broken.png").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetNotFoundError, match=r"no images in .*empty"):
        load_images(str(tmp_path))


def test_sixteen_bits_are_refused_and_not_cut_off(tmp_path):
    make(tmp_path)
    Image.fromarray(np.full((12, 12), 3000, np.uint16)).save(tmp_path / "cup" / "deep.png")
    with pytest.raises(UsageError, match=r"deep\.png has more than 8 bits"):
        load_images(str(tmp_path))


def test_a_folder_of_the_name_of_a_data_set_is_not_taken_for_it(tmp_path, monkeypatch):
    make(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert load_images("digits").image_shape == (8, 8, 1)
    assert load_images("./digits").image_shape == (12, 12, 3)


@pytest.mark.slow
def test_the_command_trains_on_a_folder(tmp_path, without_figures):
    folder = make(tmp_path / "food", size=(10, 14), suffix="jpg")
    flags = [f"--data.name={folder}", "--data.size=8", "--batch-size=20", "--epochs=12"]
    flags += ["--data.train=40", "--data.eval=10", "--optim.lr=0.01"]
    ended = run(image_classification, *TINY, *flags, f"--run.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.errors
    assert "food, 40 training and 10 test images of 8x8x3, 5 classes" in ended.output
    assert records(tmp_path / "run")[-1]["test_accuracy"] > 0.4  # chance is 0.2
