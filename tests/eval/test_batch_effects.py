import numpy as np
import pytest

from dinov2.eval.batch_effects import batch_effects
from dinov2.eval.features import FeatureTable


def cells(by_class, by_source, count=120):
    """Features of two classes from two scanners, each a direction of its own."""
    rng = np.random.default_rng(0)
    labels, source = np.arange(count) % 2, np.arange(count) // 2 % 2
    features = rng.standard_normal((count, 8)) * 0.3
    features[:, 0] += by_class * (2 * labels - 1)
    features[:, 1] += by_source * (2 * source - 1)
    names = [f"scanner{i}" for i in source]
    return FeatureTable(features.astype(np.float32), labels, [str(i) for i in range(count)], ["a", "b"], names)


def test_features_that_tell_the_scanner_are_found_out():
    effects = batch_effects(cells(by_class=0, by_source=3))
    assert effects["source_balanced_accuracy"] == 1
    assert effects["source_chance"] == 0.5
    assert effects["silhouette_source"] > 0.5 > effects["silhouette_class"]
    assert effects["neighbours_from_other_source"] == 0


def test_features_that_tell_the_class_only_mix_the_scanners():
    effects = batch_effects(cells(by_class=3, by_source=0))
    assert effects["source_balanced_accuracy"] == pytest.approx(0.5, abs=0.15)
    assert effects["silhouette_class"] > 0.5
    assert abs(effects["silhouette_source"]) < 0.1
    expected = effects["neighbours_from_other_source_if_mixed"]
    assert expected == pytest.approx(1 - 59 / 119)
    assert effects["neighbours_from_other_source"] == pytest.approx(expected, abs=0.05)


def test_one_source_has_no_batch_effect():
    table = cells(1, 1)
    with pytest.raises(ValueError, match="two sources"):
        batch_effects(FeatureTable(table.features, table.labels, table.paths, table.classes, ["one"] * len(table)))
