"""Action layout: no change is zeros, exchanging views negates the jitter, each flag changes one entry."""

import pytest
import torch

from dali_pipelines.augmentations import IDENTITY, PARAMS, PHOTOMETRIC_FIELDS, SOURCE, TARGET
from dali_pipelines.views import SCENARIOS, Views
from iwm.actions import ActionSpec, action_between, action_from_params, action_spec, describe_action
from iwm.model_config import ActionConfig

KINDS = ("difference", "log_ratio")


def view(**changes: float) -> torch.Tensor:
    values = dict(zip(PHOTOMETRIC_FIELDS, IDENTITY, strict=True)) | changes
    return torch.tensor([[values[name] for name in PHOTOMETRIC_FIELDS]])


def random_views(n: int) -> torch.Tensor:
    views = torch.tensor(IDENTITY).repeat(n, 1)
    views[:, :4] = torch.cat((torch.rand(n, 3) * 0.8 + 0.6, torch.rand(n, 1) * 0.2 - 0.1), dim=1)
    return views


def spec(kind: str, scenario: str = "default") -> ActionSpec:
    return action_spec(ActionConfig(jitter_encoding=kind), SCENARIOS[scenario])


@pytest.mark.parametrize("kind", KINDS)
def test_no_change_is_all_zeros(kind: str) -> None:
    same = random_views(8)
    assert torch.equal(action_between(same, same, spec(kind)), torch.zeros(8, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_exchanging_source_and_target_negates_the_action(kind: str) -> None:
    one, other = random_views(32), random_views(32)
    torch.testing.assert_close(action_between(one, other, spec(kind)), -action_between(other, one, spec(kind)))


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        ({"grayscale": 1.0}, "source_grayscale"),
        ({"blur_sigma": 0.1}, "source_blur"),
        ({"solarize": 1.0}, "source_solarize"),
    ],
)
def test_each_destructive_op_changes_one_entry(change: dict[str, float], entry: str) -> None:
    s = spec("difference")
    action = action_between(view(**change), view(), s)[0]
    assert action.nonzero().flatten().tolist() == [s.names.index(entry)]
    assert action[s.names.index(entry)] == 1


@pytest.mark.parametrize("parameter", PHOTOMETRIC_FIELDS[:4])
def test_the_largest_jitter_is_one_in_its_own_entry_alone(parameter: str) -> None:
    s = spec("difference", "strong")
    strength = dict(zip(PHOTOMETRIC_FIELDS, SCENARIOS["strong"].source.strengths, strict=False))[parameter]
    changed = view(**{parameter: strength + (0.0 if parameter == "hue" else 1.0)})
    expected = torch.zeros(7)
    expected[s.names.index(parameter)] = 1.0
    torch.testing.assert_close(action_between(view(), changed, s)[0], expected)


def test_log_ratio_is_the_logarithm_of_the_factors_ratio() -> None:
    action = action_between(view(brightness=0.8), view(brightness=1.2), spec("log_ratio"))
    torch.testing.assert_close(action[0, 0], torch.tensor(1.2 / 0.8).log() / 0.4)


def test_params_of_a_batch_give_the_action_between_its_views() -> None:
    params = torch.zeros(5, len(PARAMS))
    params[:, SOURCE], params[:, TARGET] = random_views(5), random_views(5)
    s = spec("difference")
    assert torch.equal(action_from_params(params, s), action_between(params[:, SOURCE], params[:, TARGET], s))


def test_a_destroyed_target_adds_its_flags() -> None:
    source = Views().source
    s = action_spec(ActionConfig(), Views(source=source, target=source))
    action = action_between(view(), view(solarize=1.0), s)[0]
    assert s.size == 10
    assert action.nonzero().flatten().tolist() == [s.names.index("target_solarize")]


def test_an_action_is_described_in_words() -> None:
    s = spec("difference")
    action = action_between(view(grayscale=1.0), view(brightness=1.3, hue=-0.05), s)[0]
    assert describe_action(action, s) == "brightness +0.30, hue -18°, undo grayscale"
    assert describe_action(torch.zeros(7), s) == "nothing"


@pytest.mark.parametrize(("scenario", "added"), [("extended", ["gamma", "temperature"]), ("geometric", ["rotation"])])
def test_ops_that_the_paper_lacks_have_entries_where_views_may_apply_them(scenario: str, added: list[str]) -> None:
    paper = action_spec(ActionConfig(), Views())
    assert paper.names == spec("difference").names
    own = spec("difference", scenario)
    assert own.names == (*paper.names[:4], *added, *paper.names[4:])
    name = added[-1]
    strength = getattr(SCENARIOS[scenario].target, name)
    action = action_between(view(), view(**{name: -strength / 2, "solarize": 1.0}), own)
    assert action[0, own.names.index(name)] == pytest.approx(-0.5)
    assert action.count_nonzero() == 1, "the target's flags have no entries"
    assert torch.equal(action_between(view(), view(**{name: 0.3}), paper), torch.zeros(1, 7))
    words = {"temperature": "temperature -0.20 stops", "rotation": "rotation -10°"}
    assert describe_action(action[0], own) == words[name]
