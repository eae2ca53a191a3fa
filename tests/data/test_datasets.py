import gzip
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dinov2.data.adapters import DatasetWithEnumeratedTargets
from dinov2.data.datasets import ImageDataset, ImageNet, ImageNet22k, LabelledDataset
from dinov2.data.datasets.custom_image_datasets import read_path_list
from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.data.datasets.registry import is_dataset_string, make_registered_dataset, parse_dataset_string
from dinov2.data.decode import UnreadableImage
from dinov2.data.manifest import DatasetNotFound


def draw(root, names):
    """Write small pictures, each of its own colour."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (i % 256, 40, 60)).save(path, **({"quality": 95} if "jp" in path.suffix else {}))
    return root


def names_of(paths, root):
    return [os.path.relpath(path, root) for path in paths]


@pytest.fixture
def cells(tmp_path):
    return draw(tmp_path / "cells", [f"{name}/{i:02}.png" for name in ("blast", "platelet") for i in range(20)])


def test_a_folder_gives_its_images_in_order(cells):
    dataset = ImageDataset(cells)
    assert len(dataset) == 40
    assert names_of(dataset.images_list, cells)[:2] == ["blast/00.png", "blast/01.png"]
    assert dataset[3].getpixel((0, 0)) == (3, 40, 60)
    assert dataset.read(3).shape == (7, 9, 3)
    assert len(dataset.preserved_images) == 0


def test_a_transform_gets_the_pil_image(cells):
    dataset = ImageDataset(str(cells), transform=lambda image: image.size)
    assert dataset[0] == (9, 7)


@pytest.mark.parametrize("as_list", [True, False])
def test_a_share_of_a_folder_is_held_out_and_the_rest_is_trained_on(cells, as_list):
    preserved = str(cells / "blast")
    dataset = ImageDataset(cells, path_preserved=[preserved] if as_list else preserved, frac=0.25)
    held = set(dataset.preserved_images)
    assert len(held) == 5
    assert all(path.startswith(preserved) for path in held)
    assert held.isdisjoint(dataset.images_list)
    assert len(dataset) == len(dataset.images_list) == 35
    other = ImageDataset(cells, path_preserved=preserved, frac=0.25, is_valid=False)
    assert len(other) == 5
    assert {other.path(i) for i in range(5)} == held


def test_what_is_held_out_depends_neither_on_the_place_nor_on_the_order_of_the_data(cells, tmp_path):
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(cells / "platelet", moved / "platelet")  # first, so that the system lists it first
    shutil.copytree(cells / "blast", moved / "blast")
    here = ImageDataset(cells, path_preserved=cells, frac=0.2)
    there = ImageDataset(
        [moved / "platelet", moved / "blast"], path_preserved=[moved / "platelet", moved / "blast"], frac=0.2
    )
    whole = ImageDataset(moved, path_preserved=moved, frac=0.2)
    assert names_of(whole.preserved_images, moved) == names_of(here.preserved_images, cells)
    part = ImageDataset(cells, path_preserved=[cells / "blast", cells / "platelet"], frac=0.2)
    assert set(names_of(there.preserved_images, moved)) == set(names_of(part.preserved_images, cells))


def test_the_seed_changes_what_is_held_out(cells):
    choices = {
        tuple(ImageDataset(cells, path_preserved=cells, frac=0.2, seed=seed).preserved_images) for seed in range(4)
    }
    assert len(choices) == 4


def test_images_added_later_do_not_let_more_than_a_few_held_out_ones_into_training(cells):
    before = set(ImageDataset(cells, path_preserved=cells, frac=0.5).preserved_images)
    draw(cells, [f"blast/{i:02}.png" for i in range(20, 24)])
    after = set(ImageDataset(cells, path_preserved=cells, frac=0.5).preserved_images)
    assert len(before) == 20
    assert len(after) == 22
    assert len(before - after) <= 2


@pytest.mark.parametrize(("frac", "held"), [(0, 0), (0.001, 1), (0.5, 20)])
def test_the_share_is_exact_but_at_least_one_image(cells, frac, held):
    assert len(ImageDataset(cells, path_preserved=cells, frac=frac).preserved_images) == held


def test_a_whole_folder_can_be_held_out(cells):
    dataset = ImageDataset(cells, path_preserved=cells / "blast", frac=1)
    assert len(dataset) == 20
    with pytest.raises(ValueError, match="no image is left of 40"):
        ImageDataset(cells, path_preserved=cells, frac=1)


def test_groups_of_a_manifest_are_held_out_whole(cells):
    rows = [f"{name}/{i:02}.png,{name},patient{i % 5}" for name in ("blast", "platelet") for i in range(20)]
    (cells / "cells.csv").write_text("path,label,patient\n" + "\n".join(rows))
    dataset = ImageDataset(cells / "cells.csv", path_preserved=cells / "cells.csv", frac=0.3)
    patients = {int(os.path.basename(path)[:2]) % 5 for path in dataset.preserved_images}
    assert len(dataset.preserved_images) == 16  # two patients of eight images: the first to reach 12
    assert patients.isdisjoint(int(os.path.basename(path)[:2]) % 5 for path in dataset.images_list)


def test_a_held_out_folder_outside_the_data_is_refused_with_the_choice(cells, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=rf"path_preserved: .*other holds no image(.|\n)*{cells}"):
        ImageDataset(cells, path_preserved=tmp_path / "other")
    with pytest.raises(ValueError, match="does not exist"):
        ImageDataset(cells, path_preserved=str(cells / "blasts"))


def test_a_share_beyond_one_is_refused(cells):
    with pytest.raises(ValueError, match="frac=10 is not a share"):
        ImageDataset(cells, path_preserved=cells, frac=10)


def test_the_held_out_list_is_readable_and_excludes_the_same_images(cells, tmp_path):
    dataset = ImageDataset(cells, path_preserved=cells, frac=0.1)
    dataset.write_preserved(tmp_path / "held_out.txt")
    assert read_path_list(tmp_path / "held_out.txt") == list(dataset.preserved_images)
    again = ImageDataset(cells, exclude=tmp_path / "held_out.txt")
    assert list(again.images_list) == list(dataset.images_list)
    assert again.summary.excluded == 4


def test_an_exclude_list_takes_relative_paths_and_warns_of_unknown_ones(cells, caplog):
    (cells / "bad.txt").write_text("# found by hand\n\nblast/03.png\nblast/99.png\n")
    dataset = ImageDataset(cells, exclude=cells / "bad.txt")
    assert "blast/03.png" not in names_of(dataset.images_list, cells)
    assert len(dataset) == 39
    assert "1 of its paths are not in the data set" in caplog.text


def test_an_excluded_image_is_neither_trained_on_nor_held_out(cells):
    everything = ImageDataset(cells, path_preserved=cells, frac=0.2)
    (cells / "bad.txt").write_text("\n".join(everything.preserved_images[:2]))
    dataset = ImageDataset(cells, path_preserved=cells, frac=0.2, exclude=cells / "bad.txt")
    assert list(dataset.preserved_images) == list(everything.preserved_images)[2:]
    assert len(dataset) == 32


def test_the_summary_says_found_skipped_excluded_held_out_and_used(cells, tmp_path):
    (cells / "notes.txt").write_text("x")
    (cells / "blast" / "empty.jpg").touch()
    more = draw(tmp_path / "more", ["1.jpg", "2.jpg"])
    (tmp_path / "bad.txt").write_text(str(more / "1.jpg"))
    dataset = ImageDataset([cells, more], path_preserved=[cells / "blast"], frac=0.1, exclude=tmp_path / "bad.txt")
    assert str(dataset.summary).splitlines() == [
        "42 images found in 3 folder(s)",
        f"          40  {cells}",
        f"           2  {more}",
        "2 files skipped: .txt 1, empty file (0 bytes) 1",
        f"1 images left out by {tmp_path}/bad.txt",
        f"2 images held out of 20 in {cells}/blast",
        "39 images to train on",
    ]


def test_sources_keep_their_spans_and_weights_after_the_holding_out(cells, tmp_path):
    more = draw(tmp_path / "more", [f"{i}.jpg" for i in range(10)])
    dataset = ImageDataset([{"path": cells, "weight": 3}, more], path_preserved=cells, frac=0.5)
    assert [tuple(span) for span in dataset.spans] == [(str(cells), 0, 20, 3.0), (str(more), 20, 30, 1.0)]


def test_a_data_set_costs_a_worker_nothing(tmp_path):
    draw(tmp_path / "d", ["0.png"])
    for i in range(1, 3000):
        os.link(tmp_path / "d" / "0.png", tmp_path / "d" / f"{i}.png")
    dataset = ImageDataset(tmp_path / "d", path_preserved=tmp_path / "d", frac=0.5)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    assert copy.path(-1) == dataset.path(-1)
    assert len(copy) == 1500


def test_a_data_loader_with_workers_reads_it(cells):
    dataset = ImageDataset(cells, transform=lambda image: torch.tensor(image.getpixel((0, 0))))
    loader = torch.utils.data.DataLoader(dataset, batch_size=40, num_workers=1)
    assert next(iter(loader))[:, 0].tolist() == list(range(40))


def test_an_unreadable_image_is_named(cells):
    (cells / "blast" / "05.png").write_bytes(b"not a picture")
    dataset = ImageDataset(cells)
    with pytest.raises(UnreadableImage, match=r"blast/05\.png: not an image of a known format"):
        dataset.read(5)


def test_a_data_set_of_which_nothing_can_be_read_says_so_at_once(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.jpg").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"none of the 16 images tried could be read(.|\n)*not an image"):
        ImageDataset(tmp_path)


def test_a_missing_folder_is_both_a_value_error_and_a_file_not_found_error(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        ImageDataset(tmp_path / "nowhere")
    assert issubclass(DatasetNotFound, FileNotFoundError)


def test_shards_are_a_data_set_too(cells, tmp_path):
    with tarfile.open(tmp_path / "shard-0.tar", "w") as shard:
        for name in ("blast/00.png", "platelet/19.png"):
            shard.add(cells / name, name)
    dataset = ImageDataset(str(tmp_path / "shard-*.tar"))
    assert dataset[1].getpixel((0, 0)) == (39, 40, 60)
    assert dataset.path(1) == str(tmp_path / "shard-0.tar/platelet/19.png")


def test_many_channel_images_keep_their_channels(tmp_path):
    planes = np.random.default_rng(0).integers(0, 60_000, (5, 8, 6), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="minisblack", metadata={"axes": "CYX"})
    dataset = ImageDataset(tmp_path, in_chans=5)
    np.testing.assert_array_equal(dataset[0], planes.transpose(1, 2, 0))
    with pytest.raises(ValueError, match=r"has 5 channel\(s\) where student.in_chans asks for 4"):
        ImageDataset(tmp_path, in_chans=4)


def test_labels_come_from_the_folders_of_the_first_level(cells):
    draw(cells, ["blast/patient1/99.png", "stray.png"])
    dataset = LabelledDataset(str(cells))
    assert dataset.classes == ["blast", "platelet"]
    assert dataset.translate_dict == {0: "blast", 1: "platelet"}
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == [0] * 21 + [1] * 20
    assert dataset.skipped == {"no label": 1}
    image, label = dataset[40]
    assert (image.size, label) == ((9, 7), 1)
    assert dataset.paths[20] == str(cells / "blast/patient1/99.png")
    assert set(dataset.sources) == {"cells"}


def test_labels_come_from_a_csv_with_a_root(cells, tmp_path):
    csv = tmp_path / "labels.csv"
    csv.write_text("path;label;slide;source\nplatelet/01.PNG;10;s1;A\nblast/01.png;9;s2;B\nblast/02.png;;s2;B\n")
    (cells / "platelet/01.png").rename(cells / "platelet/01.PNG")
    dataset = LabelledDataset(csv, root=cells, transform=lambda image: image.getpixel((0, 0)))
    assert dataset.classes == ["9", "10"]
    assert [dataset[i] for i in range(2)] == [((21, 40, 60), 1), ((1, 40, 60), 0)]
    assert (dataset.groups, dataset.sources) == (["s1", "s2"], ["A", "B"])
    assert dataset.skipped == {"no label": 1}


def test_two_labelled_folders_share_their_classes(cells, tmp_path):
    other = draw(tmp_path / "other", ["platelet/1.png", "rubricyte/2.png"])
    dataset = LabelledDataset([cells, other])
    assert dataset.classes == ["blast", "platelet", "rubricyte"]
    assert (np.array(dataset.sources)[-2:] == "other").all()
    assert LabelledDataset(other, classes=dataset.classes).labels.tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"class\(es\) rubricyte are not among"):
        LabelledDataset(other, classes=["platelet"])


def test_images_without_any_label_are_refused(tmp_path):
    draw(tmp_path, ["1.png", "2.png"])
    with pytest.raises(ValueError, match="2 images, none in a folder named after its class"):
        LabelledDataset(tmp_path)


def test_a_labelled_data_set_never_replaces_an_unreadable_image(cells):
    (cells / "blast" / "05.png").write_bytes(b"")
    dataset = LabelledDataset(cells)
    assert dataset.skipped == {"empty file (0 bytes)": 1}
    (cells / "blast" / "06.png").write_bytes(b"GIF87a???")
    with pytest.raises(UnreadableImage, match=r"06\.png"):
        dataset[5]


def test_the_real_cells_are_found(shared_data):
    dataset = ImageDataset([shared_data / "pbc", shared_data / "raabin"], path_preserved=str(shared_data / "pbc"))
    assert (dataset.summary.found, len(dataset.preserved_images)) == (1138, 82)
    assert len(LabelledDataset(shared_data / "raabin").classes) == 5


@pytest.fixture
def small_imagenet(tmp_path, monkeypatch):
    root = draw(tmp_path / "in1k", [f"train/{c}/{c}_{k}.JPEG" for c in ("n01440764", "n01443537") for k in (1, 2, 10)])
    (root / "labels.txt").write_text('n01443537,"goldfish, Carassius auratus"\nn01440764,tench\n')
    monkeypatch.setattr(ImageNet.Split, "length", property(lambda split: 6))
    dataset = ImageNet(split=ImageNet.Split.TRAIN, root=str(root), extra=str(tmp_path / "extra"))
    dataset.dump_extra()
    return dataset


def test_imagenet_writes_and_reads_the_files_that_dinov2_keeps_beside_it(small_imagenet, tmp_path):
    entries = np.load(tmp_path / "extra" / "entries-TRAIN.npy")
    assert entries.dtype.names == ("actual_index", "class_index", "class_id", "class_name")
    assert entries["actual_index"].tolist() == [1, 10, 2, 1, 10, 2]
    assert len(small_imagenet) == 6
    image, target = small_imagenet[4]
    assert (image.size, target) == ((9, 7), 1)
    assert small_imagenet.get_class_name(4) == small_imagenet.find_class_name(1) == "goldfish, Carassius auratus"
    assert small_imagenet.find_class_id(0) == "n01440764"
    assert small_imagenet.read(0).shape == (7, 9, 3)


def test_imagenet_without_its_extra_files_says_how_to_make_them(tmp_path):
    with pytest.raises(ValueError, match=r"entries-VAL\.npy does not exist.*dump_extra"):
        ImageNet(split=ImageNet.Split.VAL, root=str(tmp_path), extra=str(tmp_path)).get_targets()


def test_the_names_of_imagenet_files_follow_the_split():
    split = ImageNet.Split
    assert split.TRAIN.get_image_relpath(42, "n01440764") == "train/n01440764/n01440764_42.JPEG"
    assert split.VAL.get_image_relpath(293, "n01440764") == "val/n01440764/ILSVRC2012_val_00000293.JPEG"
    assert split.TEST.get_image_relpath(1) == "test/ILSVRC2012_test_00000001.JPEG"
    assert split.VAL.parse_image_relpath("val/n01440764/ILSVRC2012_val_00000293.JPEG") == ("n01440764", 293)


def test_imagenet_22k_reads_plain_and_gzipped_members_of_its_tar_files(tmp_path):
    root = draw(tmp_path, ["src/a.JPEG", "src/b.JPEG"])
    (root / "src" / "b.JPEG").write_bytes(gzip.compress((root / "src" / "b.JPEG").read_bytes()))
    (root / "tars").mkdir()
    for class_id, name in (("n001", "a"), ("n002", "b")):
        with tarfile.open(root / "tars" / f"{class_id}.tar", "w") as archive:
            archive.add(root / "src" / f"{name}.JPEG", f"{class_id}_{name}.JPEG")
    dataset = ImageNet22k(root=str(root / "tars"), extra=str(root / "extra"))
    dataset.dump_extra()
    assert [dataset[i][0].size for i in range(2)] == [(9, 7)] * 2
    assert dataset.get_targets().tolist() == [0, 1]
    assert (dataset.find_class_id(1), len(dataset)) == ("n002", 2)


def test_dataset_strings_name_a_class_and_its_arguments(cells):
    dataset_class, kwargs = parse_dataset_string("ImageNet:split=VAL:root=/in1k:extra=/extra")
    assert dataset_class is ImageNet
    assert kwargs == {"split": ImageNet.Split.VAL, "root": "/in1k", "extra": "/extra"}
    assert len(make_registered_dataset(f"ImageDataset:root={cells}")) == 40
    assert is_dataset_string("ImageNet22k:root=/a:extra=/b")
    assert not is_dataset_string("/data/cells")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Imagenet:split=TRAIN", "unknown data set 'Imagenet'.*known are ImageNet, ImageNet22k"),
        ("ImageNet:split=train", "no split 'train'; it has TRAIN, VAL, TEST"),
        ("ImageNet:rot=/a", "'rot=/a' in .* is not one of root=…, extra=…, split=…"),
    ],
)
def test_a_wrong_dataset_string_is_answered_with_the_right_ones(text, message):
    with pytest.raises(ValueError, match=message):
        parse_dataset_string(text)


def test_enumerated_targets_carry_the_index():
    class Pictures:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return "image", [7, None, 9][index]

        def get_target(self, index):
            return [7, None, 9][index]

        def get_image_data(self, index):
            return b"bytes"

    dataset = DatasetWithEnumeratedTargets(Pictures())
    assert [dataset[i] for i in range(len(dataset))] == [("image", (0, 7)), ("image", (1, 1)), ("image", (2, 9))]
    assert dataset.get_target(2) == (2, 9)
    assert dataset.get_image_data(0) == b"bytes"


def test_the_base_class_decodes_what_is_stored_and_names_what_it_cannot(tmp_path):
    class Stored(ExtendedVisionDataset):
        def get_image_data(self, index):
            return (tmp_path / "0.png").read_bytes() if index == 0 else b"rubbish"

        def get_target(self, index):
            return index + 5

    draw(tmp_path, ["0.png"])
    dataset = Stored(str(tmp_path), target_transform=lambda target: target * 2)
    image, target = dataset[0]
    assert (image.mode, image.size, target) == ("RGB", (9, 7), 10)
    with pytest.raises(UnreadableImage, match="Stored image 1: not an image"):
        dataset[1]
