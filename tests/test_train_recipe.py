import math
from itertools import pairwise

import pytest

from nearfold.train import Recipe
from nearfold.train.augment import AUGMENTATIONS
from nearfold.train.recipe import learning_rate


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"epochs": 0}, "Recipe.epochs must be an integer of at least 1; got 0"),
        ({"epochs": 2.0}, "Recipe.epochs must be an integer"),
        ({"batch_size": True}, "Recipe.batch_size must be an integer"),
        ({"accumulate": 0}, "Recipe.accumulate must be an integer of at least 1; got 0"),
        ({"mixup": -0.1}, "Recipe.mixup must be a number of at least 0 (0 switches it off); got -0.1"),
        ({"cutmix": math.inf}, "Recipe.cutmix must be a number of at least 0"),
        ({"until": 1.1}, "Recipe.until must be an accuracy in [0, 1] (0: train for all epochs); got 1.1"),
        ({"optimizer": "adam"}, "Recipe.optimizer must be one of 'adamw', 'sgd', 'muon'; got 'adam'"),
        ({"lr": 0}, "Recipe.lr must be a number above 0; got 0"),
        ({"lr": math.nan}, "Recipe.lr"),
        ({"lr": math.inf}, "Recipe.lr"),
        ({"lr": "fast"}, "Recipe.lr must be a number above 0; got 'fast'"),
        ({"weight_decay": -0.1}, "Recipe.weight_decay"),
        ({"momentum": 1.0}, "Recipe.momentum"),
        ({"warmup_epochs": -1}, "Recipe.warmup_epochs"),
        ({"epochs": 2, "warmup_epochs": 3}, "Recipe.warmup_epochs must be at most epochs=2; got 3"),
        ({"schedule": "step"}, "'cosine', 'linear', 'constant'"),
        ({"label_smoothing": 1.0}, "Recipe.label_smoothing"),
        ({"clip_grad_norm": -1}, "Recipe.clip_grad_norm"),
        ({"augment": "flip"}, "'none', 'crop_flip', 'shift_flip', 'randaugment'"),
        ({"ema": 1.0}, "Recipe.ema"),
        ({"precision": "half"}, "'float32', 'bfloat16', 'float16'"),
        ({"device": "gpu"}, "Recipe.device must be 'auto' or a torch device"),
        ({"seed": -1}, "Recipe.seed"),
        ({"deterministic": 1}, "Recipe.deterministic"),
    ],
)
def test_a_field_that_does_not_fit_is_named(fields, says):
    with pytest.raises(ValueError) as error:
        Recipe(**fields)
    assert says in str(error.value)


def test_round_trip_and_unknown_fields():
    recipe = Recipe(epochs=3, augment="crop_flip", ema=0.9)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(ValueError, match=r"no field 'learning_rate'.*batch_size"):
        Recipe.from_dict({"learning_rate": 1})


def test_every_augmentation_can_be_asked_for():
    for name in AUGMENTATIONS:
        assert Recipe(augment=name).augment == name


def test_every_field_is_documented():
    text = Recipe.__doc__
    for name in Recipe().to_dict():
        assert f"\n        {name}: " in text


def test_learning_rate_rises_to_lr_and_falls_to_nearly_zero():
    recipe = Recipe(epochs=10, lr=0.3, warmup_epochs=2.5)
    rates = [learning_rate(recipe, step, 8) for step in range(80)]
    assert all(a < b for a, b in pairwise(rates[:20]))
    assert rates[19] == rates[20] == max(rates) == 0.3
    assert all(a > b for a, b in pairwise(rates[20:]))
    assert 0 < rates[-1] < 0.001
    assert rates[50] == pytest.approx(0.15)  # half way between steps 20 and 80


def test_a_linear_schedule_falls_by_equal_steps_to_nothing():
    recipe = Recipe(epochs=4, lr=0.4, warmup_epochs=1, schedule="linear")
    rates = [learning_rate(recipe, step, 10) for step in range(40)]
    assert rates[9] == rates[10] == 0.4
    assert [a - b for a, b in pairwise(rates[10:])] == pytest.approx([0.4 / 30] * 29)
    assert rates[-1] == pytest.approx(0.4 / 30)


def test_constant_schedule_without_warmup():
    recipe = Recipe(epochs=2, lr=0.1, warmup_epochs=0, schedule="constant")
    assert {learning_rate(recipe, step, 5) for step in range(10)} == {0.1}
