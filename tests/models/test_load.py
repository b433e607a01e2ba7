"""Which type the weights have, by what the machine computes faster."""

import pytest

import settings
from models import load


@pytest.mark.parametrize(
    ("speed", "auto", "said"),
    [(2.0, "bfloat16", {"float32"}), (1.1, "float32", set()), (0.1, "float32", {"bfloat16"})],
)
def test_auto_is_the_faster_type_and_a_slow_one_is_said(speed, auto, said, monkeypatch, capsys):
    monkeypatch.setattr(load, "bfloat16_speed", lambda: speed)
    monkeypatch.setattr(load, "default_device", lambda: "cpu")
    assert load.dtype_name("auto") == auto
    for dtype in load.DTYPES:
        load.say_speed(dtype)
        assert bool(capsys.readouterr().err) == (dtype in said)


def test_a_preset_with_auto_is_recorded_as_the_type_that_was_taken(monkeypatch):
    monkeypatch.setattr(load, "bfloat16_speed", lambda: 0.1)
    monkeypatch.setattr(load, "default_device", lambda: "cpu")
    parser = settings.training_parser("", "", settings.RFT, settings.Evaluation)
    resolved = settings.parse_training(parser, "train_rft.py", ["--preset", "others"])
    assert resolved.model.dtype == resolved.flags["dtype"] == "float32"


def test_the_speed_is_measured():
    load.bfloat16_speed.cache_clear()
    assert 0.001 < load.bfloat16_speed() < 100
