"""Settings of a merge by tensor and by depth: every rule in a closed form."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neulig_fast.checkpoints.parameters import depth, evaluate, faults, interpolate, look_up

NAME = "model.layers.3.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("setting", "at", "value"),
    [
        (0.5, 0.7, 0.5),
        (True, 0.7, True),
        ("sum", 0.7, "sum"),
        ([0, 10], 0.25, 2.5),
        ([0, 1, 4], 0.0, 0),
        ([0, 1, 4], 0.5, 1),
        ([0, 1, 4], 0.75, 2.5),
        ([0, 1, 4], 1.0, 4),
        ([7], 0.3, 7),
        ({"value": 2}, 0.3, 2),
        ({"filter": "self_attn", "value": [0, 2]}, 0.5, 1),
        ({"filter": "mlp", "value": 2}, 0.5, None),
        ([{"filter": "mlp", "value": 1}, {"filter": "q_proj", "value": 2}, {"value": 3}], 0, 2),
        ([{"filter": "*", "value": 1}, {"filter": "q_proj", "value": 2}], 0, 1),
        ([{"filter": "q.proj", "value": 1}, {"value": 3}], 0, 3),  # no regular expression
        (None, 0.3, None),
    ],
)
def test_a_setting_has_one_value_per_tensor_and_depth(setting, at, value) -> None:
    assert evaluate(setting, NAME, at) == value


def test_depths() -> None:
    assert [depth(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert depth(0, 1) == 1
    assert depth(None, 5) == 0


def test_inner_scopes_come_first_and_are_left_where_no_filter_applies() -> None:
    source = {"weight": [{"filter": "mlp", "value": 1}]}
    piece, whole = {"density": 0.3}, {"weight": 2, "density": 0.9}
    scopes = (source, piece, whole)
    assert look_up("weight", "layers.0.mlp.up", 0, scopes) == 1
    assert look_up("weight", NAME, 0, scopes) == 2
    assert look_up("density", NAME, 0, scopes) == 0.3
    assert look_up("gamma", NAME, 0, scopes, 0.01) == 0.01
    assert look_up("gamma", NAME, 0, scopes) is None
    assert look_up("weight", NAME, 0, [{"weight": 0.0}, whole], 5) == 0.0  # zero is a value


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_gradients_stay_between_their_points_and_meet_them(points, a, b) -> None:
    slack = 1e-9 * (1 + max(map(abs, points)))
    assert min(points) - slack <= interpolate(points, a) <= max(points) + slack
    for k, point in enumerate(points):
        at = k / (len(points) - 1) if len(points) > 1 else a
        assert interpolate(points, at) == pytest.approx(point, abs=slack)
    steepest = (len(points) - 1) * max((abs(y - x) for x, y in pairwise(points)), default=0)
    assert abs(interpolate(points, a) - interpolate(points, b)) <= steepest * abs(a - b) + slack


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ([], "got an empty list"),
        ([1, "a"], "must be of finite numbers, got 'a'"),
        ([1, True], "must be of finite numbers, got True"),
        ([1, float("nan")], "must be of finite numbers, got nan"),
        (float("inf"), "must be a finite number, a flag or a word, got inf"),
        (None, "must be a finite number, a flag or a word, got None"),
        ({"filter": "mlp"}, "must have a value and at most a filter"),
        ({"value": 1, "filtre": "mlp"}, "must have a value and at most a filter"),
        ([{"value": 1}, 2], "must have a value and at most a filter besides, got 2"),
        ({"filter": 3, "value": 1}, "filter must be a part of a tensor's name, got 3"),
        ({"filter": "", "value": 1}, "filter must be a part of a tensor's name, got ''"),
        ({"value": []}, r"must be a finite number, a flag or a word, got \[\]"),
        ({"value": [1, [2]]}, r"must be of finite numbers, got \[2\]"),
    ],
)
def test_what_is_no_setting(setting, said) -> None:
    with pytest.raises(AssertionError, match=said):
        assert not list(faults(setting)), "\n".join(faults(setting))


@pytest.mark.parametrize("setting", [0, 0.3, True, "sum", [0, 1], {"value": [1, 2]}])
def test_what_is_one(setting) -> None:
    assert not list(faults(setting))
