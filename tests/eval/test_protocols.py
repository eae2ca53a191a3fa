"""DINOv2's k-NN, linear and logistic regression protocols, on features that are their own images."""

import argparse
import json

import numpy as np
import pytest
import torch
from ranks import run_ranks
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from dinov2.eval import knn, linear, log_regression, setup, utils
from dinov2.eval.metrics import AccuracyAveraging, MetricType, build_metric
from dinov2.models.vision_transformer import vit_tiny
from dinov2.models.weights import save_backbone

PROTOCOLS = """
from functools import partial
import numpy as np, tempfile
from torch import nn
from dinov2.eval import knn, linear, log_regression, utils
from dinov2.eval.features import extract
from dinov2.eval.metrics import AccuracyAveraging, MetricType
from dinov2.models.vision_transformer import DinoVisionTransformer

class Features:
    def __init__(self, n, seed, classes=5, dim=12):
        centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
        self.labels = np.arange(n) % classes
        noise = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
        self.x = centres[torch.from_numpy(self.labels)] + 1.1 * noise
    def __len__(self):
        return len(self.labels)
    def __getitem__(self, i):
        return self.x[i], int(self.labels[i])
    def get_target(self, i):
        return int(self.labels[i])

train, val = Features(83, 1), Features(33, 2)
average = AccuracyAveraging.MEAN_PER_CLASS_ACCURACY
found = knn.eval_knn(nn.Identity(), train, val, average, [1, 10], 0.07, 8, 0, True, [4, -1], 2)
answers["knn"] = {str(k): {n: float(x) for n, x in v.items()} for k, v in found.items()}

features, targets = utils.extract_features(nn.Identity(), train, 5, 0, gather_on_cpu=True)
answers["extract_features"] = {"features": features.tolist(), "targets": targets.tolist()}

log_regression.C_POWER_RANGE = torch.linspace(-2, 1, 4)
found = log_regression.eval_log_regression(
    model=nn.Identity(), train_dataset=train, val_dataset=val, finetune_dataset=None,
    metric_type=MetricType.MEAN_ACCURACY, batch_size=16, num_workers=0)
answers["log_regression"] = {k: float(v) for k, v in found.items()}

class Pictures(Features):
    paths = [str(i) for i in range(9)]
    classes = ["a", "b", "c", "d", "e"]
    def read(self, row):
        return np.random.default_rng(row).integers(0, 256, (64, 70, 3), dtype=np.uint8)
    def __getitem__(self, i):
        return self.x[i].view(3, 2, 2).repeat(1, 28, 28) + torch.rand(1), int(self.labels[i])

torch.manual_seed(0)
vit = DinoVisionTransformer(
    img_size=56, patch_size=14, embed_dim=32, depth=4, num_heads=2, init_values=1.0, block_chunks=0)
table = extract(vit, Pictures(9, 3), image_size=56, batch_size=2, num_workers=0)
answers["extract"] = {"features": table.features.tolist(), "labels": table.labels.tolist()}

backbone = utils.ModelWithIntermediateLayers(vit, 4, partial(utils.autocast, torch.device("cpu"), torch.float32))
tokens = backbone(Pictures(2, 3)[0][0][None])
torch.manual_seed(0)
batch = 8 // world
grid, groups = linear.setup_linear_classifiers(tokens, [1, 4], [1.0, 4.0], batch, num_classes=5)
optimizer = torch.optim.SGD(groups, momentum=0.9)
folder = tempfile.mkdtemp()
outcome, *_ = linear.eval_linear(
    feature_model=backbone, linear_classifiers=grid, optimizer=optimizer,
    train_data_loader=linear.make_train_data_loader(Pictures(40, 5), batch, 0, 0, 4, seed=0),
    val_data_loader=utils.make_share_loader(Pictures(21, 6), 4, 0),
    scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4), metrics_file_path=folder + "/m.json",
    output_dir=folder, max_iter=4, checkpoint_period=100, running_checkpoint_period=100, eval_period=0,
    metric_type=MetricType.MEAN_ACCURACY, training_num_classes=5)
answers["linear"] = outcome["best_classifier"]
classifiers = linear.remove_ddp_wrapper(grid).classifiers_dict
answers["weights"] = {name: classifier.linear.weight.tolist() for name, classifier in classifiers.items()}
"""


def close(ours, others):
    """Equal but for rounding, in any nesting of dicts."""
    if isinstance(ours, dict):
        return ours.keys() == others.keys() and all(close(ours[k], others[k]) for k in ours)
    return ours == others if isinstance(ours, str) else np.allclose(ours, others, atol=2e-5)


def test_two_processes_give_the_numbers_of_one(tmp_path):
    alone = {}
    exec(PROTOCOLS, {"answers": alone, "torch": torch, "rank": 0, "world": 1})
    alone = json.loads(json.dumps(alone))
    for together in run_ranks(PROTOCOLS, tmp_path):
        assert together.keys() == alone.keys()
        for name in alone:
            assert close(alone[name], together[name]), name


@pytest.fixture
def blobs():
    """Training and validation features of 5 classes that overlap, rows of length one."""
    names: dict = {"answers": {}, "torch": torch, "rank": 0, "world": 1}
    exec(PROTOCOLS.split("train, val =")[0], names)
    return names["Features"](83, 1), names["Features"](33, 2)


def unit(x):
    return nn.functional.normalize(x, dim=1)


# --------------------------------------------------------------------------- k-NN


def test_knn_predicts_what_scikit_learn_predicts(blobs):
    train, val = blobs
    module = knn.KnnModule(unit(train.x), torch.from_numpy(train.labels), [1, 10], 0.07, torch.device("cpu"), 5)
    votes = module(unit(val.x))
    for k in (1, 10):
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
        theirs.fit(train.x, train.labels)
        np.testing.assert_array_equal(votes[k].argmax(dim=1), theirs.predict(val.x))


def test_eval_knn_counts_what_a_loop_counts(blobs):
    train, val = blobs
    found = knn.eval_knn(nn.Identity(), train, val, AccuracyAveraging.MEAN_ACCURACY, [1], 0.07, 16, 0, True)
    nearest = (unit(val.x) @ unit(train.x).T).argmax(dim=1)
    expected = np.mean(train.labels[nearest] == val.labels)
    assert float(found["full", 1]["top-1"]) == pytest.approx(expected)


def test_few_shot_is_the_mean_over_draws_and_asks_for_as_many_neighbours_as_images(blobs):
    train, val = blobs
    settings = (AccuracyAveraging.MEAN_ACCURACY, [1, 10], 0.07, 16, 0, True, [4], 3)
    found = knn.eval_knn(nn.Identity(), train, val, *settings)
    assert list(found) == [("4 per class", 1), ("4 per class", 4)]
    mapping = knn.create_class_indices_mapping(torch.from_numpy(train.labels))
    accuracies = []
    for seed in range(3):
        rows = knn.filter_train(mapping, 4, seed)
        nearest = rows[(unit(val.x) @ unit(train.x[rows]).T).argmax(dim=1)]
        accuracies.append(np.mean(train.labels[nearest] == val.labels))
    assert float(found["4 per class", 1]["top-1"]) == pytest.approx(np.mean(accuracies), abs=1e-6)


def test_a_draw_is_balanced_without_repeats_and_leaves_the_global_random_state_alone():
    labels = torch.tensor([0, 1, 2] * 7 + [0])
    mapping = knn.create_class_indices_mapping(labels)
    before = torch.random.get_rng_state()
    rows = knn.filter_train(mapping, 3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert labels[rows].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(rows.tolist())) == 9
    assert rows.tolist() == knn.filter_train(mapping, 3, seed=1).tolist()


def test_validation_classes_beyond_those_of_training_are_refused(blobs):
    train, val = blobs
    val.labels[0] = 7
    with pytest.raises(ValueError, match=r"class 7, the training set only 0\.\.4"):
        knn.eval_knn(nn.Identity(), train, val, AccuracyAveraging.MEAN_ACCURACY, [1], 0.07, 16, 0, True)


# --------------------------------------------------------------------------- logistic regression


def test_logistic_regression_gives_scikit_learns_probabilities(blobs):
    train, val = blobs
    model = log_regression.train_for_C(
        C=0.5, max_iter=500, train_features=train.x, train_labels=torch.from_numpy(train.labels)
    )
    theirs = LogisticRegression(C=0.5, max_iter=5000, tol=1e-9).fit(train.x.double().numpy(), train.labels)
    answer = model(val.x, torch.from_numpy(val.labels))
    np.testing.assert_allclose(answer["preds"], theirs.predict_proba(val.x.double().numpy()), atol=1e-3)
    assert answer["target"].tolist() == val.labels.tolist()


def test_the_sweep_chooses_the_C_that_scikit_learn_finds_best(blobs, monkeypatch):
    train, val = blobs
    monkeypatch.setattr(log_regression, "C_POWER_RANGE", torch.tensor([-4.0, -1.0, 3.0]))
    found = log_regression.eval_log_regression(
        model=nn.Identity(),
        train_dataset=train,
        val_dataset=val,
        finetune_dataset=None,
        metric_type=MetricType.MEAN_ACCURACY,
        batch_size=16,
        num_workers=0,
        finetune_on_val=True,
    )
    accuracy = {
        C: LogisticRegression(C=C, max_iter=5000).fit(train.x, train.labels).score(val.x, val.labels)
        for C in (1e-4, 1e-1, 1e3)
    }
    assert found["best_C"] == pytest.approx(max(accuracy, key=accuracy.get), rel=1e-4)
    assert float(found["top-1"]) == pytest.approx(max(accuracy.values()))


# --------------------------------------------------------------------------- linear


def tokens(blocks=4, batch=3, width=8):
    return [(torch.randn(batch, 9, width), torch.randn(batch, width)) for _ in range(blocks)]


def test_a_classifier_sees_class_tokens_of_the_last_blocks_and_the_last_mean_patch():
    x = tokens()
    expected = torch.cat([x[2][1], x[3][1], x[3][0].mean(dim=1)], dim=1)
    torch.testing.assert_close(linear.create_linear_input(x, use_n_blocks=2, use_avgpool=True), expected)
    torch.testing.assert_close(linear.create_linear_input(x, use_n_blocks=1, use_avgpool=False), x[3][1])


@pytest.mark.parametrize("batch", [1, 128, 256, 4096])
def test_no_two_classifiers_share_a_name_at_any_batch_size(batch):
    grid, groups = linear.setup_linear_classifiers(
        tokens(), [1, 4], linear.DEFAULT_LEARNING_RATES, batch, num_classes=5
    )
    assert len(grid) == len(groups) == 52


def test_learning_rates_are_for_a_batch_of_256_and_names_are_dinov2s():
    grid, groups = linear.setup_linear_classifiers(tokens(), [1], [1e-4, 0.1], 512, num_classes=5)
    assert [group["lr"] for group in groups] == pytest.approx([2e-4, 0.2] * 2)
    assert next(iter(grid.classifiers_dict)) == "classifier_1_blocks_avgpool_False_lr_0_00020"


def test_a_class_mapping_picks_outputs_for_the_classes_of_another_data_set():
    classifier, x = linear.LinearClassifier(8, 1, False, num_classes=5), tokens()
    answer = linear.LinearPostprocessor(classifier, np.array([3, 0]))(x, torch.tensor([0, 1, 0]))
    torch.testing.assert_close(answer["preds"], classifier(x)[:, [3, 0]])


def test_targets_of_different_number_are_filled_up_with_minus_one():
    _, targets = linear._pad_and_collate([(torch.zeros(2), np.array([1, 2])), (torch.ones(2), np.array([4]))])
    assert targets.tolist() == [[1, 2], [4, -1]]


def test_the_stream_of_images_and_augmentations_does_not_depend_on_where_it_starts(blobs):
    class Jittered:
        def __len__(self):
            return 7

        def __getitem__(self, i):
            return torch.rand(1) + i, i

    whole = list(linear.make_train_data_loader(Jittered(), 3, 0, 0, 6, seed=1))
    rest = list(linear.make_train_data_loader(Jittered(), 3, 0, 4, 6, seed=1))
    for (x, y), (again, labels) in zip(whole[4:], rest, strict=True):
        torch.testing.assert_close(x, again)
        assert y.tolist() == labels.tolist()
    first_pass = torch.cat([y for _, y in whole])[:7]
    assert sorted(first_pass.tolist()) == list(range(7))


def arguments(parser, *words):
    return parser.parse_args(list(words))


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "backbone.safetensors"
    save_backbone(vit_tiny(patch_size=28, img_size=224, depth=4, init_values=1.0), path)
    return str(path)


def test_the_three_protocols_run_from_the_command_line_on_a_folder(tmp_path, weights, cell_folder, monkeypatch):
    monkeypatch.setattr(log_regression, "C_POWER_RANGE", torch.tensor([-1.0, 1.0]))
    common = ["--pretrained-weights", weights, "--train-dataset", str(cell_folder), "--val-dataset", str(cell_folder)]
    for name, module, more in (
        ("knn", knn, ["--nb_knn", "1", "5", "--batch-size", "16"]),
        ("log_regression", log_regression, []),
        (
            "linear",
            linear,
            [
                "--epochs",
                "2",
                "--epoch-length",
                "4",
                "--batch-size",
                "8",
                "--num-workers",
                "0",
                "--learning-rates",
                "0.1",
            ],
        ),
    ):
        out = tmp_path / name
        args = arguments(module.get_args_parser(), *common, "--output-dir", str(out), *more)
        assert module.main(args) == 0
        assert (out / f"results_eval_{name}.json").is_file()
    top1 = json.loads((tmp_path / "knn" / "results_eval_knn.json").read_text().splitlines()[0])
    assert top1 == {"('full', 1) Top 1": 100.0}  # validated on the training images


def test_the_linear_grid_goes_on_where_it_stopped(tmp_path, weights, cell_folder):
    model = setup.load_model(weights).backbone

    def run(folder, epochs, resume=True):
        folder.mkdir(exist_ok=True)
        return linear.run_eval_linear(
            model=model,
            output_dir=str(folder),
            train_dataset_str=str(cell_folder),
            val_dataset_str=str(cell_folder),
            batch_size=4,
            epochs=epochs,
            epoch_length=2,
            num_workers=0,
            save_checkpoint_frequency=1,
            eval_period_iterations=0,
            learning_rates=[0.1],
            autocast_dtype=torch.float32,
            resume=resume,
        )

    def final(folder):
        return torch.load(folder / "model_final.pth", weights_only=True)["model"]

    run(tmp_path / "whole", 2)
    (tmp_path / "parts").mkdir()
    for name in ("model_0000001.pth", "last_checkpoint"):  # as if the run had stopped after its first epoch
        (tmp_path / "parts" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (tmp_path / "parts" / "last_checkpoint").write_text("model_0000001.pth")
    run(tmp_path / "parts", 2)
    for name, tensor in final(tmp_path / "whole").items():
        torch.testing.assert_close(final(tmp_path / "parts")[name], tensor)


# --------------------------------------------------------------------------- shared


def test_evaluate_averages_the_loss_and_counts_the_metrics():
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 6, generator=generator), torch.randint(0, 6, (8,), generator=generator)) for _ in range(3)]
    averages, results = utils.evaluate(
        nn.Identity(),
        data,
        {"a": lambda outputs, targets: {"preds": outputs, "target": targets}},
        {"a": build_metric(MetricType.MEAN_ACCURACY, num_classes=6)},
        torch.device("cpu"),
        criterion=nn.CrossEntropyLoss(),
    )
    x, y = (torch.cat(part) for part in zip(*data))
    assert averages["loss"] == pytest.approx(float(nn.functional.cross_entropy(x, y)), rel=1e-5)
    assert float(results["a"]["top-1"]) == pytest.approx(float((x.argmax(dim=1) == y).float().mean()))


def test_features_come_out_in_the_order_of_the_data_whatever_the_batches(blobs):
    batches = [(blobs[0].x[rows], (rows, rows % 5)) for rows in torch.randperm(83).split(10)]
    features, targets = utils.extract_features_with_dataloader(nn.Identity(), batches, 83)
    torch.testing.assert_close(features, blobs[0].x)
    assert targets.tolist() == [i % 5 for i in range(83)]
    with pytest.raises(ValueError, match="3 of 83 rows were in no batch"):
        utils.extract_features_with_dataloader(nn.Identity(), batches[:-1], 83)


def test_weights_that_are_not_given_are_asked_for(tmp_path):
    args = argparse.Namespace(config_file="", pretrained_weights=None, output_dir=str(tmp_path), opts=[])
    with pytest.raises(ValueError, match="--pretrained-weights"):
        setup.setup_and_build_model(args)


def test_a_model_is_rebuilt_from_its_file_and_its_untrained_twin_is_another(weights):
    loaded = setup.load_model(weights)
    assert not loaded.backbone.training
    assert not any(p.requires_grad for p in loaded.backbone.parameters())
    twin = loaded.untrained(seed=1)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (loaded.backbone, twin.backbone)]
    assert shapes[0] == shapes[1]
    assert setup.fingerprint(loaded.backbone) != setup.fingerprint(twin.backbone)
    assert setup.fingerprint(twin.backbone) == setup.fingerprint(loaded.untrained(seed=1).backbone)


def test_the_precision_of_an_evaluation_follows_the_configuration():
    from dinov2.configs import dinov2_default_config

    cfg = dinov2_default_config.copy()
    assert setup.get_autocast_dtype(cfg) == torch.float16
    assert setup.resolve_autocast_dtype(cfg, torch.device("cpu")) == torch.float32
    cfg.compute_precision.dtype = "bf16"
    assert setup.resolve_autocast_dtype(cfg, torch.device("cpu")) == torch.bfloat16
