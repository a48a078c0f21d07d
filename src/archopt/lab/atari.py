"""Atari games behind ale-py, several at once, with the preprocessing that deep reinforcement learning uses.

ale-py has a vector environment of its own, which cannot give its state away: a run that is killed could not go on
where it was. So this drives the emulators one by one (`ALEInterface`), whose states can be saved; the pictures of
all games are reduced together. What happens, from the inside out, as in the wrappers of Mnih et al. 2015: up to 30
frames without action at the start; each action held for four frames, the last two pictures joined by their
maximum, rewards added; the game's fire buttons pressed once at the start; grey, 84 x 84, by area. Needs `ale-py`,
which brings the games.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archopt.lab import seeds
from archopt.lab.data import DataError

SKIP = 4
MOST_NOOPS = 30
START = (1, 2)
"""Actions pressed at the start of an episode."""
SIZE = 84
LONGEST_EPISODE = 400_000
"""Frames, as the games were registered in gym."""
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def area_weights(source: int, target: int) -> Tensor:
    """The (target, source) matrix that averages over areas: a pixel counts as far as it lies in the new one."""
    edges = torch.arange(target + 1, dtype=torch.float64) * (source / target)
    low, high = edges[:-1, None], edges[1:, None]
    pixel = torch.arange(source, dtype=torch.float64)
    overlap = (torch.minimum(high, pixel + 1) - torch.maximum(low, pixel)).clamp(min=0)
    return (overlap / overlap.sum(1, keepdim=True)).float()


def reduced(screens: NDArray[np.uint8]) -> Tensor:
    """Colour screens (n, height, width, 3) as grey pictures (n, 84, 84), uint8, by area."""
    grey = torch.from_numpy(screens.astype(np.float32) @ LUMA).round()
    rows, columns = area_weights(grey.shape[1], SIZE), area_weights(grey.shape[2], SIZE)
    return (rows @ grey @ columns.T).round().clamp(0, 255).to(torch.uint8)


def load_ale() -> Any:
    """The module `ale_py`. Raises DataError where it is not installed."""
    try:
        import ale_py
        import ale_py.roms  # not imported by ale_py itself unless gymnasium is there
    except ImportError as error:
        raise DataError("Atari games need the package ale-py: pip install 'archopt[atari]'") from error
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    return ale_py


@dataclass
class Game:
    """One emulator and where its episode stands."""

    emulator: Any
    actions: list[Any]
    rank: int
    seed: int
    episodes: int = 0
    """Episodes begun."""
    score: float = 0.0
    """Rewards of this episode, as the game gives them."""

    def begin(self) -> NDArray[np.uint8]:
        """Starts an episode; returns the screen."""
        self.score = 0.0
        self.emulator.reset_game()
        mixed = seeds.mix(self.seed, 1_000_000 * self.rank + self.episodes, seeds.BATCH)
        self.episodes += 1
        noops = int(torch.randint(1, MOST_NOOPS + 1, (), generator=torch.Generator().manual_seed(mixed)))
        for _ in range(noops):
            self.emulator.act(self.actions[0])
        screen: NDArray[np.uint8] = self.emulator.getScreenRGB()
        for action in START:
            screen, _, over = self.act(action)
            if over:
                self.emulator.reset_game()
        return screen

    def act(self, action: int) -> tuple[NDArray[np.uint8], float, bool]:
        """Holds an action for four frames; returns the screen, the reward and whether the episode is over."""
        reward = 0.0
        screens: list[NDArray[np.uint8]] = []
        for frame in range(SKIP):
            reward += self.emulator.act(self.actions[action])
            over = bool(self.emulator.game_over())
            if over or frame >= SKIP - 2:
                screens.append(self.emulator.getScreenRGB())
            if over:
                break
        self.score += reward
        return np.maximum(screens[0], screens[-1]), reward, over


class Games:
    """Several games of the same name, stepped together."""

    def __init__(self, name: str, count: int, seed: int) -> None:
        self._ale = load_ale()
        self.seed = seed
        self.games = [self._game(name, rank) for rank in range(count)]

    def _game(self, name: str, rank: int) -> Game:
        emulator = self._ale.ALEInterface()
        emulator.setInt("random_seed", (self.seed + rank) % 2**31)
        emulator.setFloat("repeat_action_probability", 0.0)
        emulator.setInt("max_num_frames_per_episode", LONGEST_EPISODE)
        emulator.loadROM(self._ale.roms.get_rom_path(name))
        return Game(emulator, list(emulator.getMinimalActionSet()), rank, self.seed)

    @property
    def action_count(self) -> int:
        return len(self.games[0].actions)

    def begin(self) -> Tensor:
        """Starts all games; returns their pictures, (games, 84, 84) uint8."""
        return reduced(np.stack([game.begin() for game in self.games]))

    def act(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, list[float]]:
        """One action in each game. A game whose episode ends begins the next at once.

        Returns pictures (games, 84, 84) uint8, which of a new episode are its first; rewards (games,) float32;
        whether each episode ended, (games,) bool; and the scores of those that did.
        """
        screens, rewards, ends, scores = [], [], [], []
        for game, action in zip(self.games, actions.tolist()):
            screen, reward, over = game.act(action)
            if over:
                scores.append(game.score)
                screen = game.begin()
            screens.append(screen)
            rewards.append(reward)
            ends.append(over)
        return reduced(np.stack(screens)), torch.tensor(rewards), torch.tensor(ends), scores

    def state_dict(self) -> dict[str, Any]:
        """All emulators as they are, so that the games go on with the same bits."""
        return {
            "seed": self.seed,
            "emulators": [
                torch.frombuffer(bytearray(game.emulator.cloneSystemState().serialize()), dtype=torch.uint8)
                for game in self.games
            ],
            "episodes": [game.episodes for game in self.games],
            "scores": [game.score for game in self.games],
        }

    def load_state_dict(self, state: dict[str, Any]) -> Self:
        """Takes back what `state_dict` gave, for as many games of the same name and seed."""
        told = zip(self.games, state["emulators"], state["episodes"], state["scores"], strict=True)
        for game, emulator, episodes, score in told:
            game.emulator.restoreSystemState(self._ale.ALEState(emulator.numpy().tobytes()))
            game.episodes, game.score = episodes, score
        return self
