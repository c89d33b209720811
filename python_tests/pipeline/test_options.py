"""Options: every rule has its sentence."""

import dataclasses

import pytest

from floe_kernels.pipeline.options import CHOICES, RULES, Options


@pytest.mark.parametrize("f", dataclasses.fields(Options), ids=lambda f: f.name)
def test_every_option_has_help_a_group_and_a_rule_that_holds(f):
    assert f.metadata["help"].endswith(".")
    assert f.metadata["group"]
    assert f.metadata["rule"] == "" or RULES[f.metadata["rule"]](f.default)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0.0}, r"--keep must be in \(0, 1\], got 0.0"),
        ({"keep": float("nan")}, "--keep must be in"),
        ({"learning_rate": float("inf")}, "--learning-rate must be > 0, got inf"),
        ({"batch_size": 0}, "--batch-size must be >= 1, got 0"),
        ({"batch_size": 1.5}, "--batch-size must be of type int, got 1.5"),
        ({"batch_size": True}, "--batch-size must be of type int, got True"),
        ({"shared_a": 1}, "--shared-a must be of type bool, got 1"),
        ({"schedule": "linear"}, "--schedule must be one of cosine, constant, got 'linear'"),
        ({"top_k": 5}, r"--top-k must be in 1..E = 1..4 \(--experts\), got 5"),
        ({"ranks": "2,2"}, "--ranks must be different whole numbers >= 1"),
        ({"ranks": ""}, "--ranks must be"),
        ({"ranks": "0,4"}, "--ranks must be"),
        ({"ranks": "4,-2"}, "--ranks must be"),
    ],
)
def test_a_broken_rule_is_named_with_what_came(changes, message):
    with pytest.raises(ValueError, match=message):
        Options(**changes)


def test_whole_numbers_stand_for_floats():
    assert Options(keep=1).keep == 1.0
    assert isinstance(Options(mu=3).mu, float)


@pytest.mark.parametrize(("name", "known"), CHOICES.items())
def test_defaults_are_among_the_choices(name, known):
    assert getattr(Options(), name) in known


def test_options_survive_json():
    options = Options(keep=0.5, ranks="4, 8", data="d")
    assert Options(**options.to_json()) == options
    assert options.rank_choices() == (4, 8)


def test_alpha_follows_the_rank_unless_it_is_given():
    assert Options().adapter(8)["lora_alpha"] == 16
    assert Options(alpha=5).adapter(8)["lora_alpha"] == 5
    assert Options(shared_a=True).adapter(8)["top_k"] is None
