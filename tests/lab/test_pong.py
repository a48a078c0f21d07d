"""PPO on Pong: advantages and losses against slow forms, the games and their states, the published numbers."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from archopt import Nero
from archopt.lab import ppo
from archopt.lab.atari import SIZE, Games, area_weights, reduced
from archopt.lab.data import DataError
from archopt.lab.errors import Interrupted
from archopt.lab.experiment import Experiment, WorkloadChoice, open_experiment
from archopt.lab.models.actor_critic import ActorCritic
from archopt.lab.optimizers import parse_optimizer
from archopt.lab.train import Settings, train
from archopt.lab.workloads.pong_ppo import PongPPO, Rollout
from lab.running import ONE_THREAD, StopAt, bits

try:
    import ale_py
except ImportError:
    ale_py = None
plays = pytest.mark.skipif(ale_py is None, reason="needs ale-py: pip install 'archopt[atari]'")


# -- plain functions ---------------------------------------------------------------------------------------


def test_advantages_are_sums_of_discounted_errors():
    """A_t = sum_k (gamma lam)^k delta_(t+k), up to the end of the episode or of the rollout."""
    generator = torch.Generator().manual_seed(0)
    steps, games, gamma, lam = 12, 3, 0.9, 0.8
    rewards = torch.randn(steps, games, generator=generator)
    values = torch.randn(steps + 1, games, generator=generator)
    ends = torch.rand(steps, games, generator=generator) < 0.2
    assert ends.any()
    found, returns = ppo.advantages(rewards, values, ends, gamma=gamma, lam=lam)
    for game in range(games):
        for t in range(steps):
            total, weight = 0.0, 1.0
            for k in range(t, steps):
                over = bool(ends[k, game])
                later = 0.0 if over else gamma * float(values[k + 1, game])
                total += weight * (float(rewards[k, game]) + later - float(values[k, game]))
                weight *= gamma * lam
                if over:
                    break
            assert float(found[t, game]) == pytest.approx(total, abs=1e-5)
            assert float(returns[t, game]) == pytest.approx(total + float(values[t, game]), abs=1e-5)


def test_losses_by_hand():
    """Two samples, two actions of equal probability now; before, the actions taken had 1/4 and 1/2."""
    parts = ppo.losses(
        torch.zeros(2, 2),
        torch.tensor([1.0, 0.0]),
        torch.tensor([0, 1]),
        torch.tensor([0.25, 0.5]).log(),
        torch.tensor([0.5, 0.05]),
        torch.tensor([1.0, -2.0]),
        torch.tensor([2.0, 1.0]),
        clip=0.1,
    )
    # Ratios 2 and 1: min(2, 1.1) * 1 and -2; values clipped to 0.6 and 0.0 (within 0.1 of 0.05).
    assert float(parts.policy) == pytest.approx(-(1.1 - 2.0) / 2)
    assert float(parts.value) == pytest.approx(0.5 * (max(1.0, 1.4**2) + 1.0) / 2)
    assert float(parts.entropy) == pytest.approx(math.log(2))
    assert float(parts.clipped) == 0.5


def test_a_bad_action_is_not_made_better_by_clipping():
    """Where the advantage is negative the larger of the two ratios counts (the smaller product)."""
    logits = torch.tensor([[0.0, 0.0]])
    for ratio, expected in ((2.0, -2.0), (0.5, -0.9)):
        one = ppo.losses(
            logits,
            torch.zeros(1),
            torch.tensor([0]),
            torch.tensor([0.5 / ratio]).log(),
            torch.zeros(1),
            torch.tensor([-1.0]),
            torch.zeros(1),
            clip=0.1,
        )
        assert float(one.policy) == pytest.approx(-expected)


@pytest.mark.parametrize(("source", "target"), [(210, 84), (160, 84), (5, 2)])
def test_reduction_by_area_counts_each_pixel_as_far_as_it_is_inside(source: int, target: int):
    weights = area_weights(source, target)
    scale = source / target
    for row in range(target):
        for pixel in range(source):
            inside = max(0.0, min((row + 1) * scale, pixel + 1) - max(row * scale, pixel))
            assert float(weights[row, pixel]) == pytest.approx(inside / scale, abs=1e-6)


def test_screens_are_reduced_to_grey_pictures():
    screens = np.zeros((2, 210, 160, 3), dtype=np.uint8)
    screens[0, :, :, 0] = 100  # red counts 0.299
    screens[1] = 255
    pictures = reduced(screens)
    assert pictures.shape == (2, SIZE, SIZE)
    assert pictures.dtype == torch.uint8
    assert pictures[0].unique().tolist() == [30]
    assert pictures[1].unique().tolist() == [255]


def test_inputs_are_the_last_four_pictures_of_the_episode():
    steps, games = 4, 2
    frames = torch.arange(1, steps + 5).view(-1, 1, 1, 1).expand(-1, games, SIZE, SIZE).to(torch.uint8)
    age = torch.tensor([[0, 9], [1, 10], [0, 11], [1, 12], [2, 13]])
    nothing = torch.zeros(steps, games)
    seen = Rollout(frames, age, *[nothing] * 7)
    inputs = seen.inputs(torch.tensor([0, 1, 4, 4]), torch.tensor([0, 0, 0, 1]))
    assert inputs.shape == (4, 4, SIZE, SIZE)
    told = inputs[:, :, 0, 0].tolist()
    assert told == [[0, 0, 0, 4], [0, 0, 4, 5], [0, 6, 7, 8], [5, 6, 7, 8]]


# -- published numbers -------------------------------------------------------------------------------------


def test_the_network_has_the_published_size():
    model = ActorCritic(6)
    assert sum(param.numel() for param in model.parameters()) == 866_439
    assert len(list(model.parameters())) == 12
    optimizer = Nero(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert sum(optimizer.state[param]["exp_avg_sq"].numel() for param in model.parameters()) == 1_294
    logits, values = model(torch.zeros(3, 4, SIZE, SIZE, dtype=torch.uint8))
    assert (logits.shape, values.shape) == ((3, 6), (3,))


def test_initial_weights_are_orthogonal_with_the_published_gains():
    torch.manual_seed(0)
    model = ActorCritic(6)
    assert torch.linalg.matrix_norm(model.actor.weight, 2).item() == pytest.approx(0.01, rel=1e-4)
    assert torch.linalg.matrix_norm(model.critic.weight, 2).item() == pytest.approx(1.0, rel=1e-4)
    first = model.trunk[0].weight.flatten(1)
    torch.testing.assert_close(first @ first.T, 2 * torch.eye(32), atol=1e-4, rtol=0)
    assert not any(param.any() for name, param in model.named_parameters() if name.endswith("bias"))


def test_steps_and_rates_of_the_paper():
    paper = PongPPO(**PongPPO.presets["paper"])
    assert paper.updates == 5_000_000 // 1024 == 4882
    assert paper.steps == 78_112
    assert [paper.schedule(step) for step in (0, 15, 16)] == [1.0, 1.0, 1 - 1 / 4882]
    assert paper.schedule(paper.steps - 1) == pytest.approx(1 / 4882)


def test_minibatches_must_divide_the_samples():
    with pytest.raises(ValueError, match="minibatches=3 does not divide"):
        PongPPO(minibatches=3)


# -- the games ---------------------------------------------------------------------------------------------


def smoke(**options) -> Experiment:
    choice = WorkloadChoice("pong-ppo", "smoke", options)
    return open_experiment(choice, None, torch.device("cpu"))


@plays
def test_games_go_on_with_the_same_bits_from_a_saved_state():
    actions = torch.randint(6, (60, 3), generator=torch.Generator().manual_seed(0))
    one, two = Games("pong", 3, seed=5), Games("pong", 3, seed=5)
    assert torch.equal(one.begin(), two.begin())
    for row in actions[:30]:
        one.act(row)
    two.load_state_dict(one.state_dict())
    for row in actions[30:]:
        for a, b in zip(one.act(row), two.act(row), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@plays
def test_games_differ_by_rank_and_by_seed_and_lose_when_nobody_plays():
    games = Games("pong", 2, seed=0)
    assert games.action_count == 6
    games.begin()
    frames = [game.emulator.getEpisodeFrameNumber() for game in games.games]
    assert all(1 <= frame - 8 <= 30 for frame in frames)  # without action, before the two presses of 4 frames
    assert frames[0] != frames[1]
    scores: list[float] = []
    rewards = torch.zeros(2)
    while not scores:
        _, reward, _, ended = games.act(torch.tensor([0, 0]))
        rewards += reward
        scores += ended
    assert scores[0] == -21
    assert rewards.min() == -21


@plays
@pytest.mark.parametrize("stop", [3, 8, 13])
def test_a_run_that_stops_within_an_update_goes_on_with_the_same_bits(tmp_path: Path, stop: int):
    experiment, choice = smoke(), parse_optimizer("adam")
    whole = train(experiment, choice, 1e-3, 0, ONE_THREAD, tmp_path / "whole")
    assert whole["status"] == "finished"
    with pytest.raises(Interrupted):
        train(experiment, choice, 1e-3, 0, ONE_THREAD, tmp_path / "parts", StopAt(stop))
    train(experiment, choice, 1e-3, 0, ONE_THREAD, tmp_path / "parts")
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")


@plays
def test_an_episode_is_filmed_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A film moves, has the size of the screen, and recording it changes no bit of the training."""
    monkeypatch.setattr("archopt.lab.workloads.pong_ppo.MOST_FRAMES", 40)
    weights = []
    for film in (False, True):
        experiment = open_experiment(
            WorkloadChoice("pong-ppo", "smoke", {"film": film}), None, torch.device("cpu")
        )
        result = train(
            experiment, parse_optimizer("nero"), 0.01, 0, Settings(threads=1), tmp_path / str(film)
        )
        weights.append(result["weights_sha256"])
    assert weights[0] == weights[1]
    assert not list((tmp_path / "False").rglob("*.gif"))
    (found,) = (tmp_path / "True" / "pictures").iterdir()
    assert found.name == "step=16-episode.gif"
    with Image.open(found) as picture:
        assert picture.size == (160, 210)
        assert 20 < picture.n_frames <= 40  # frames that look the same are one that lasts longer
        first = np.asarray(picture.convert("RGB")).astype(int)
        picture.seek(picture.n_frames - 1)
        assert (np.asarray(picture.convert("RGB")).astype(int) != first).any()


@plays
@pytest.mark.parametrize("optimizer", ["nero", "agd", "autonero", "sgd"])
def test_every_kind_of_rule_plays(tmp_path: Path, optimizer: str):
    choice = parse_optimizer(optimizer)
    result = train(smoke(updates=1), choice, choice.default_lr, 0, Settings(threads=1), tmp_path / "run")
    assert result["status"] == "finished"
    assert result["final"]["mean_return"] == -21


def test_without_ale_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(DataError, match=r"pip install 'archopt\[atari\]'"):
        smoke()
