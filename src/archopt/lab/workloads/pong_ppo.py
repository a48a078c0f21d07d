"""pong-ppo: proximal policy optimisation on Atari Pong (Nero paper, figure 9).

Games: real Pong in ale-py's emulator, 8 at a time, without sticky actions, with the usual preprocessing
(`archopt.lab.atari`): four frames an action, grey pictures of 84 x 84, the last four of the episode as input
(black before its start). The policy is trained on the sign of the rewards; returns are told as the game counts,
from -21 to 21.
Model: the convolutional actor and critic of Mnih et al. 2015 with 6 actions, orthogonal weights of gain sqrt(2),
0.01 (actor) and 1 (critic), biases 0; 866,439 parameters. (Nero scales all rows to norm 1, so its first policy is
far from uniform.)
Loss: rollouts of 128 steps in 8 games, 1,024 samples; generalised advantages with gamma 0.99 and lambda 0.95,
standardised over the rollout; 4 epochs of 4 minibatches of 256; ratio clip 0.1; half the squared error of the
value, clipped likewise, times 0.5; entropy bonus 0.01; gradients clipped to norm 0.5 for every optimiser. The rate
falls linearly: at update j of J it is 1 - j/J times the first. A step of the laboratory is one of the optimiser.
Metric: mean return of the last 10 training episodes that have ended, -21 (the least) before the first has; the
mean of the last 100, and median, least and greatest of the 10, are recorded too, every 50 updates, so that records
stay small (published: every update; `eval_updates=1`). The spec leaves open which the paper's table holds
(proposal: both means).

Presets: `paper` is the above, 4,882 updates, 78,112 steps of the optimiser, 5 million actions. `small` is a
reduction for an hour: half the channels and units, 700 updates, 2 epochs each. `smoke` takes two updates of 16
steps in 2 games with an eighth of the network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from archopt.lab import ppo
from archopt.lab.atari import SIZE, Games, load_ale, reduced
from archopt.lab.data import DataFolder
from archopt.lab.models.actor_critic import FRAMES, ActorCritic
from archopt.lab.workload import Metric, Training, Workload
from archopt.lab.workloads.supervised import check_positive

GAME = "pong"
ACTIONS = 6
LEAST_RETURN = -21.0
LAST, MORE = 10, 100
"""Episodes whose mean is the metric, and of the longer mean."""


FILM_SEED = 2**20  # of an episode that is filmed, which no training game has
FRAMES_APART, MOST_FRAMES = 2, 1500
"""A film shows every second picture that the policy saw, and ends after so many."""


@dataclass
class Rollout:
    """What was seen and done in the games since the last update. Pictures are kept once, not four times."""

    frames: Tensor
    """(3 + steps + 1, games, 84, 84) uint8: the three before the first step, and the one after the last."""
    age: Tensor
    """(steps + 1, games) int64: steps since the episode began; pictures before its start are black."""
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    """(steps + 1, games); once `advantages` are there, of the policy that played."""
    rewards: Tensor
    ends: Tensor
    advantage: Tensor
    returns: Tensor

    def inputs(self, steps: Tensor, games: Tensor) -> Tensor:
        """The network's input at these steps of these games, (samples, 4, 84, 84) uint8."""
        back = torch.arange(FRAMES - 1, -1, -1, device=steps.device)  # oldest first
        pictures = self.frames[steps[:, None] + (FRAMES - 1) - back, games[:, None]]
        return pictures * (back <= self.age[steps, games][:, None])[..., None, None]


@dataclass
class PongPPO(Workload):
    """PPO on Atari Pong (see the module's text)."""

    name = "pong-ppo"
    summary = "PPO on Atari Pong, real game (Nero paper, figure 9); needs ale-py"
    metric = Metric("mean_return", "mean return of the last 10 episodes", higher_is_better=True)
    presets = {
        "paper": {},
        "small": {"updates": 700, "scale": 0.5, "epochs": 2, "eval_updates": 10},
        "smoke": {
            "updates": 2,
            "scale": 0.125,
            "games": 2,
            "rollout": 16,
            "minibatches": 2,
            "eval_updates": 1,
        },
    }
    settings = {
        "nero": {"lr": 0.01},
        "sgd": {"lr": 0.1},
        "adam": {"lr": 1e-4, "betas": (0.0, 0.999), "eps": 1e-5},
        "lamb": {"lr": 1e-3, "betas": (0.0, 0.999), "eps": 1e-5},
    }
    clip_norm = 0.5

    updates: int = 4882
    rollout: int = 128
    """Steps of every game between updates."""
    games: int = 8
    epochs: int = 4
    """Passes over the samples of an update."""
    minibatches: int = 4
    scale: float = 1.0
    """Of the network's widths."""
    gamma: float = 0.99
    lam: float = 0.95
    clip: float = 0.1
    value_weight: float = 0.5
    entropy_weight: float = 0.01
    eval_updates: int = 50
    """Updates between two lines of the record."""
    film: bool = False
    """Keep an episode that the policy plays after the last step, as an animated GIF among the run's pictures."""

    def __post_init__(self) -> None:
        check_positive(self, "updates", "rollout", "games", "epochs", "minibatches", "eval_updates")
        if (self.rollout * self.games) % self.minibatches:
            raise ValueError(
                f"minibatches={self.minibatches} does not divide the samples of an update, "
                f"rollout={self.rollout} times games={self.games}"
            )

    def load(self, data: DataFolder) -> None:
        load_ale()
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        self.device = device

    def build(self) -> nn.Module:
        self.playing: Games | None = None
        self.seen: Rollout | None = None
        self.order = torch.empty(0, dtype=torch.int64)
        self.finished: list[float] = []
        self.steps_done = 0
        return ActorCritic(ACTIONS, self.scale)

    @property
    def updates_steps(self) -> int:
        """Optimiser steps of an update."""
        return self.epochs * self.minibatches

    @property
    def steps(self) -> int:
        return self.updates * self.updates_steps

    @property
    def eval_every(self) -> int:
        return self.eval_updates * self.updates_steps

    def schedule(self, step: int) -> float:
        return 1 - (step // self.updates_steps) / self.updates

    # -- one step ------------------------------------------------------------------------------------------

    def train_step(self, training: Training, step: int) -> dict[str, Tensor]:
        model, part = training.models["model"], step % self.updates_steps
        if part == 0:
            self._play(model, training)
        assert self.seen is not None
        samples, seen = self.rollout * self.games, self.seen
        if part % self.minibatches == 0:
            self.order = torch.randperm(samples)
        chosen = self.order.view(self.minibatches, -1)[part % self.minibatches].to(self.device)
        steps, games = chosen // self.games, chosen % self.games
        logits, values = model(seen.inputs(steps, games))
        parts = ppo.losses(
            logits,
            values,
            seen.actions[steps, games],
            seen.log_probs[steps, games],
            seen.values[steps, games],
            seen.advantage[steps, games],
            seen.returns[steps, games],
            self.clip,
        )
        loss = parts.policy + self.value_weight * parts.value - self.entropy_weight * parts.entropy
        training.update("model", loss)
        self.steps_done = step + 1
        told = {"policy_loss": parts.policy, "value_loss": parts.value, "entropy": parts.entropy}
        return {
            "loss": loss.detach(),
            **{name: value.detach() for name, value in told.items()},
            "clipped": parts.clipped,
        }

    @torch.no_grad()
    def _play(self, model: nn.Module, training: Training) -> None:
        """Plays `rollout` steps in every game with the policy as it is, and estimates advantages."""
        if self.playing is None:
            self.playing = Games(GAME, self.games, training.seed)
        seen = self.seen = self._next_rollout()
        rewards: list[Tensor] = []
        every = torch.arange(self.games, device=self.device)
        for t in range(self.rollout + 1):
            logits, values = model(seen.inputs(torch.full_like(every, t), every))
            seen.values[t] = values
            if t == self.rollout:
                break
            seen.actions[t] = torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
            seen.log_probs[t] = ppo.log_prob(logits, seen.actions[t])
            with training.apart():
                pictures, reward, ends, scores = self.playing.act(seen.actions[t].cpu())
            seen.frames[t + FRAMES] = pictures.to(self.device)
            seen.ends[t] = ends.to(self.device)
            seen.age[t + 1] = torch.where(seen.ends[t], 0, seen.age[t] + 1)
            rewards.append(reward.sign())
            self.finished = (self.finished + scores)[-MORE:]
        seen.rewards.copy_(torch.stack(rewards))
        seen.advantage, seen.returns = ppo.advantages(
            seen.rewards, seen.values, seen.ends, gamma=self.gamma, lam=self.lam
        )
        seen.advantage = (seen.advantage - seen.advantage.mean()) / (seen.advantage.std() + 1e-5)

    def _next_rollout(self) -> Rollout:
        """An empty rollout that goes on where the last one ended."""
        assert self.playing is not None
        last, shape = self.seen, (self.rollout, self.games)
        frames = torch.zeros(
            self.rollout + FRAMES, self.games, SIZE, SIZE, dtype=torch.uint8, device=self.device
        )
        age = torch.zeros(self.rollout + 1, self.games, dtype=torch.int64, device=self.device)
        if last is None:
            frames[FRAMES - 1] = self.playing.begin().to(self.device)
        else:
            frames[:FRAMES], age[0] = last.frames[-FRAMES:], last.age[-1]
        numbers = [torch.zeros(shape, device=self.device) for _ in range(4)]
        return Rollout(
            frames=frames,
            age=age,
            actions=torch.zeros(shape, dtype=torch.int64, device=self.device),
            log_probs=numbers[0],
            values=torch.zeros(self.rollout + 1, self.games, device=self.device),
            rewards=numbers[1],
            ends=torch.zeros(shape, dtype=torch.bool, device=self.device),
            advantage=numbers[2],
            returns=numbers[3],
        )

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, float]:
        """Returns of training episodes, as the paper tells them: nothing is played for it."""
        last = self.finished[-LAST:] or [LEAST_RETURN]
        return {
            "mean_return": fmean(last),
            "mean_return_100": fmean(self.finished or [LEAST_RETURN]),
            "median_return": median(last),
            "least_return": min(last),
            "greatest_return": max(last),
        }

    def pictures(self, models: dict[str, nn.Module]) -> Mapping[str, Tensor]:
        """With `film`, after the last step: an episode as the policy plays it, (frames, 3, 210, 160) uint8."""
        if not self.film or self.steps_done < self.steps:
            return {}
        return {"episode": self._filmed(models["model"])}

    def _filmed(self, model: nn.Module) -> Tensor:
        game = Games(GAME, 1, FILM_SEED).games[0]
        screen, over = game.begin(), False
        seen = torch.zeros(1, FRAMES, SIZE, SIZE, dtype=torch.uint8)
        frames: list[Tensor] = []
        while not over and len(frames) < MOST_FRAMES * FRAMES_APART:
            seen = torch.cat([seen[:, 1:], reduced(screen[None])[None]], 1)
            frames.append(torch.from_numpy(screen.copy()))
            logits, _ = model(seen.to(self.device))
            action = torch.multinomial(logits.float().softmax(-1), 1)
            screen, _, over = game.act(int(action))
        return torch.stack(frames[::FRAMES_APART]).permute(0, 3, 1, 2)

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self.playing is None or self.seen is None:
            return {}
        return {
            "games": self.playing.state_dict(),
            "seen": {name: value.cpu() for name, value in vars(self.seen).items()},
            "order": self.order,
            "finished": self.finished,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        # The seeds of a game's episodes were drawn from the run's seed, which the saved games know.
        self.playing = Games(GAME, self.games, state["games"]["seed"]).load_state_dict(state["games"])
        self.seen = Rollout(**{name: value.to(self.device) for name, value in state["seen"].items()})
        self.order, self.finished = state["order"], list(state["finished"])
