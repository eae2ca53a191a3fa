import json
import logging
import math

import pytest
import torch
from ranks import run_ranks

from dinov2 import distributed
from dinov2.logging import MetricLogger, SmoothedValue, setup_logging
from dinov2.logging.writers import append_json_line


@pytest.fixture
def own_logger():
    name = "dinov2-test"
    yield name
    for handler in list(logging.getLogger(name).handlers):
        logging.getLogger(name).removeHandler(handler)
        handler.close()
    logging.captureWarnings(False)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- averages


def test_a_smoothed_value_knows_its_window_and_its_whole_past():
    series = SmoothedValue(window_size=3)
    for value in (1.0, 5.0, 2.0, 10.0):
        series.update(value)
    assert (series.median, series.max, series.value) == (5.0, 10.0, 10.0)
    assert series.avg == pytest.approx(17 / 3)
    assert series.global_avg == pytest.approx(18 / 4)


def test_a_number_may_stand_for_several_samples():
    series = SmoothedValue()
    series.update(1.0, num=3)
    series.update(5.0)
    assert series.global_avg == 2.0


def test_an_empty_series_is_nan_rather_than_an_error():
    series = SmoothedValue()
    assert all(math.isnan(getattr(series, name)) for name in ("median", "avg", "global_avg", "max", "value"))


def test_a_tensor_is_read_late_but_with_the_value_it_had(monkeypatch):
    reads = []
    monkeypatch.setattr(torch, "stack", lambda *a, stack=torch.stack: reads.append(1) or stack(*a))
    series, loss = SmoothedValue(), torch.tensor(2.0, requires_grad=True)
    for _ in range(50):
        series.update(loss)
    loss.data.fill_(7.0)
    assert reads == []
    assert series.global_avg == 2.0
    assert reads == [1]


def test_nan_is_shown_not_hidden():
    series = SmoothedValue()
    for value in (1.0, float("nan"), 2.0):
        series.update(torch.tensor(value))
    assert math.isnan(series.median)


def test_a_series_prints_as_asked():
    series = SmoothedValue(fmt="{value:.1f}|{max:.0f}")
    series.update(2.25)
    assert str(series) == "2.2|2"


# ------------------------------------------------------------------------------------------------------------ loop


def run(metrics, *, period=10, stop=25, start=3):
    seen = []
    for item in metrics.log_every(range(start, 1000), period, "Training", stop, start):
        metrics.update(total_loss=torch.tensor(float(item)), lr=0.5, wd=0.1)
        seen.append(item)
    return seen


def test_a_resumed_loop_yields_what_is_left_and_reports_by_the_period_and_at_the_end(tmp_path):
    path = tmp_path / "m.json"
    assert run(MetricLogger(output_file=path)) == list(range(3, 25))
    assert [row["iteration"] for row in rows(path)] == [10, 20, 24]
    assert set(rows(path)[0]) == {"iteration", "iter_time", "data_time", "total_loss", "lr", "wd"}


@pytest.mark.parametrize("start", [25, 26])
def test_a_finished_run_that_is_resumed_yields_nothing(start):
    assert run(MetricLogger(), start=start) == []


def test_without_a_number_of_iterations_the_length_counts():
    assert list(MetricLogger().log_every([1, 2, 3], 1)) == [1, 2, 3]
    with pytest.raises(ValueError, match="n_iterations"):
        list(MetricLogger().log_every(iter([1]), 1))


def test_data_that_ends_early_ends_the_loop_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "dinov2"):
        assert list(MetricLogger().log_every([1, 2], 1, n_iterations=5)) == [1, 2]
    assert "after iteration 2 of 5" in caplog.text


def test_speed_and_waiting_are_reported_where_the_batch_size_is_known(tmp_path):
    path = tmp_path / "m.json"
    run(MetricLogger(output_file=path, images_per_iteration=64))
    row = rows(path)[-1]
    assert row["images_per_s"] == pytest.approx(64 / row["iter_time"])
    assert 0 <= row["data_wait"] <= 1


def test_utilisation_and_memory_are_reported(tmp_path, caplog):
    path = tmp_path / "m.json"
    with caplog.at_level(logging.INFO, "dinov2"):
        run(MetricLogger(output_file=path, images_per_iteration=64, ideal_iteration_time=1e-6))
    row = rows(path)[-1]
    assert row["mfu"] == pytest.approx(1e-6 / row["iter_time"])
    assert row["memory_gib"] > 0.01
    assert "MFU " in caplog.messages[0]
    assert "mem " in caplog.messages[0]


def test_what_is_measured_now_and_then_is_told_as_last_measured():
    metrics = MetricLogger(window_size=5)
    for value in (1.0, 2.0, torch.tensor(3.0)):
        metrics.set_latest(sign=value)
    assert metrics.sign.median == 3.0


def test_a_line_tells_progress_eta_losses_and_speed_and_nothing_else(caplog):
    with caplog.at_level(logging.INFO, "dinov2"):
        run(MetricLogger(images_per_iteration=64))
    line = caplog.messages[0]
    assert line.startswith("Training [10/25]  eta 0:00:00  total ")
    assert "lr 0.5" in line
    assert "img/s" in line
    assert "data " in line
    assert "wd" not in line


def test_tensorboard_gets_every_number_and_scores_from_outside(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = MetricLogger(tensorboard_dir=tmp_path, output_file=tmp_path / "m.json")
    run(metrics)
    metrics.log_scalars(25, {"eval/knn_1_accuracy": 0.5})
    metrics.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("total_loss")] == [10, 20, 24]
    assert events.Scalars("eval/knn_1_accuracy")[0].value == 0.5
    assert "eval/knn_1_accuracy" not in rows(tmp_path / "m.json")[-1]


def test_a_resumed_run_replaces_the_points_that_an_interrupted_one_wrote_ahead(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, loss in ((0, 1.0), (10, 2.0)):
        metrics = MetricLogger(tensorboard_dir=tmp_path)
        if start == 0:
            metrics.log_scalars(10, {"eval/accuracy": 0.5})
        for _ in metrics.log_every(range(20), 5, "", 20, start):
            metrics.update(loss=loss)
        metrics.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    last = {event.step: event.value for event in events.Scalars("loss")}
    assert last[15] == 2.0
    assert len([event for event in events.Scalars("loss") if event.step == 15]) == 1
    assert events.Scalars("eval/accuracy")[0].value == 0.5


def test_further_writers_get_the_same_numbers():
    class Memory:
        def __init__(self):
            self.got, self.closed = {}, False

        def write(self, iteration, scalars):
            self.got[iteration] = dict(scalars)

        def close(self):
            self.closed = True

    memory = Memory()
    metrics = MetricLogger(writers=[memory])
    run(metrics)
    metrics.close()
    assert memory.got[24]["lr"] == 0.5
    assert memory.closed


def test_other_processes_write_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    run(MetricLogger(output_file=tmp_path / "m.json", tensorboard_dir=tmp_path / "tb"))
    assert list(tmp_path.iterdir()) == []


def test_meters_are_attributes_and_unknown_ones_are_named():
    metrics = MetricLogger()
    metrics.update(loss=1.0)
    metrics.add_meter("speed", SmoothedValue(fmt="{value:.0f}"))
    assert metrics.loss.value == 1.0
    assert str(metrics) == "loss: 1 (1)  speed: nan"
    with pytest.raises(AttributeError, match="los"):
        _ = metrics.los


def test_the_mean_over_two_processes_counts_every_sample(tmp_path):
    body = """
from dinov2.logging import MetricLogger
metrics = MetricLogger()
for value in range(1 + 2 * rank):
    metrics.update(loss=float(value + 10 * rank))
metrics.synchronize_between_processes()
answers["mean"], answers["last"] = metrics.loss.global_avg, metrics.loss.value
"""
    answers = run_ranks(body, tmp_path)
    assert [each["mean"] for each in answers] == [(0 + 10 + 11 + 12) / 4] * 2
    assert [each["last"] for each in answers] == [0.0, 12.0]


# ------------------------------------------------------------------------------------------------------------ files


def test_the_log_goes_to_the_console_and_to_a_file_in_the_folder(tmp_path, capsys, own_logger):
    setup_logging(tmp_path, name=own_logger, level=logging.INFO)
    logging.getLogger(own_logger).info("hello %d", 7)
    logging.getLogger(own_logger).debug("too quiet")
    logging.getLogger(own_logger).warning("careful")
    text = (tmp_path / "logs" / "log.txt").read_text()
    console = capsys.readouterr().out
    assert "hello 7" in text
    assert "hello 7" in console
    assert "too quiet" not in text
    assert "WARNING" in console.splitlines()[1]


def test_setting_up_again_replaces_the_handlers_instead_of_doubling_lines(tmp_path, capsys, own_logger):
    for _ in range(2):
        setup_logging(tmp_path / "log.txt", name=own_logger)
    logging.getLogger(own_logger).info("once")
    assert (tmp_path / "log.txt").read_text().count("once") == 1
    assert capsys.readouterr().out.count("once") == 1


def test_other_processes_keep_quiet_and_have_their_own_file(tmp_path, capsys, monkeypatch, own_logger):
    monkeypatch.setattr(distributed, "get_global_rank", lambda: 3)
    setup_logging(tmp_path, name=own_logger)
    logging.getLogger(own_logger).info("from three")
    assert capsys.readouterr().out == ""
    assert "from three" in (tmp_path / "logs" / "log.txt.rank3").read_text()


def test_numbers_that_find_the_disk_full_are_told_and_end_nothing(caplog):
    with caplog.at_level("ERROR", logger="dinov2"):
        append_json_line("/dev/full", {"iteration": 7})
    assert "/dev/full lacks the numbers of iteration 7: [Errno 28] No space left on device" in caplog.text


def test_a_line_that_a_crash_has_cut_off_takes_no_other_with_it(tmp_path):
    path = tmp_path / "numbers.json"
    path.write_text('{"iteration": 0, "lo')
    append_json_line(path, {"iteration": 1})
    append_json_line(path, {"iteration": 2})
    assert path.read_text().splitlines() == ['{"iteration": 0, "lo', '{"iteration": 1}', '{"iteration": 2}']
