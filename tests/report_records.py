"""Invented records of a comparison, in the runner's files and with its keys. For the report's tests."""

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACCURACY = {"key": "accuracy", "name": "test accuracy", "higher_is_better": True, "unit": "%"}
LOSS = {"key": "loss", "name": "validation loss", "higher_is_better": False, "unit": ""}
ENVIRONMENT = {
    "archopt": "0.1.0",
    "torch": "2.13.0",
    "python": "3.12.4",
    "device": "cpu",
    "threads": 1,
    "machine": "Invented CPU, 2 cores",
}


@dataclass(frozen=True)
class Invented:
    """An optimiser that never was: how well it does depends on how far its rate is from `best_lr`."""

    label: str
    default_lr: float | None
    best_lr: float | None
    skill: float  # error at the best rate, as a share of the workload's
    width: float  # in decades: how forgiving it is of another rate
    diverges_above: float = math.inf
    milliseconds: float = 1.0
    state: float = 4.0  # bytes a parameter


OPTIMIZERS = (
    Invented("nero", 0.01, 0.01, 1.0, 1.3, milliseconds=1.3, state=0.1),
    Invented("agd", None, None, 1.3, 1.0, milliseconds=1.2, state=0.0),
    Invented("adamw", 0.001, 0.002, 0.95, 0.9, milliseconds=1.25, state=8.0),
    Invented("adam", 0.001, 0.002, 1.05, 0.85, milliseconds=1.2, state=8.0),
    Invented("sgd", 0.001, 0.1, 1.2, 0.8, diverges_above=0.4, milliseconds=0.9, state=0.0),
    Invented("lamb", 0.001, 0.01, 1.1, 1.0, milliseconds=1.9, state=8.0),
    Invented("madam", 0.01, 0.02, 1.5, 0.7, diverges_above=0.4, milliseconds=1.4),
    Invented("mine.optim:Clever", 0.01, 0.03, 1.25, 0.6, milliseconds=2.4, state=12.0),
)


def write_json(path: Path, record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def write_run(
    folder: Path,
    invented: Invented,
    lr: float | None,
    seed: int,
    *,
    workload: str = "digits",
    preset: str = "small",
    metric: dict[str, Any] = ACCURACY,
    steps: int = 600,
    evaluations: int = 20,
    difficulty: float = 1.0,
    status: str | None = None,
) -> Path:
    """One run's folder. `status` overrides how it ends; "unfinished" leaves the result out."""
    rng = random.Random(f"{invented.label} {lr} {seed} {workload}")
    run = (
        folder
        / re.sub(r"[^\w.-]", "-", invented.label)
        / f"lr={'auto' if lr is None else lr}"
        / f"seed={seed}"
    )
    distance = 0.0 if lr is None or invented.best_lr is None else math.log10(lr / invented.best_lr)
    penalty = (distance / invented.width) ** 2
    speed = 12.0 / (1.0 + 3.0 * penalty) if distance <= 0 else 10.0 / (1.0 + penalty)
    floor = 0.02 * difficulty * invented.skill * math.exp(1.2 * penalty) * math.exp(rng.gauss(0, 0.06))
    if status is None:
        runaway = lr is not None and lr * math.exp(rng.gauss(0, 0.5)) > invented.diverges_above
        status = "diverged" if runaway else "finished"
    last = {"diverged": rng.randrange(1, 5), "failed": 1, "unfinished": evaluations // 2}.get(
        status, evaluations
    )
    second = invented.milliseconds * 1e-3 * math.exp(rng.gauss(0, 0.03))
    lines = []
    error = 0.9
    for k in range(last + 1):
        progress = k / evaluations
        error = min(0.9, floor + (0.9 - floor) * math.exp(-speed * progress)) * math.exp(rng.gauss(0, 0.03))
        loss = 2.3 * (error / 0.9) ** 1.4 * (1 - 0.3 * progress)
        if status == "diverged":
            error, loss = 0.9 - 0.01 * k, math.nan if k == last else 2.3 * 8.0**k
        key = metric["key"]
        line: dict[str, Any] = {
            "step": k * steps // evaluations,
            "epoch": 10 * progress,
            "eval": {key: 1 - min(error, 0.99) if key == "accuracy" else loss * 1.05},
            "lr": lr,
            "seconds": second * k * steps / evaluations,
        }
        if k:
            line["train"] = {"loss": loss}
            line["time"] = {
                "forward_backward": second * 0.7,
                "optimizer": second * 0.27,
                "other": second * 0.03,
            }
        if lr is None:
            line["optimizer"] = {"eta": 0.3 / (1 + 30 * progress) * math.exp(rng.gauss(0, 0.1))}
        lines.append(json.dumps(line))
    write_json(
        run / "config.json",
        {
            "format": 1,
            "workload": workload,
            "preset": preset,
            "options": {"width": 64},
            "optimizer": {"label": invented.label, "name": invented.label, "lr": lr, "options": {"lr": lr}},
            "seed": seed,
            "steps": steps,
            "data": {"digits.csv.gz": "0" * 64},
            "average": False,
            "environment": ENVIRONMENT,
        },
    )
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if status == "unfinished":
        return run
    final = json.loads(lines[-1])["eval"] | {"train_loss": loss}
    write_json(
        run / "result.json",
        {
            "status": status,
            "error": "ValueError: refuses a network with vectors" if status == "failed" else None,
            "step": last * steps // evaluations,
            "metric": metric,
            "final": final if status == "finished" else {},
            "best": {"value": final[metric["key"]], "step": last * steps // evaluations},
            "seconds": second * steps,
            "seconds_per_step": second,
            "optimizer_share": 0.1 * invented.milliseconds,
            "overhead_share": 0.03,
            "peak_memory_bytes": 250_000_000 + int(1e6 * invented.state),
            "optimizer_state_bytes": int(50_000 * invented.state),
            "parameters": 50_000,
        },
    )
    return run


def write_comparison(
    root: Path,
    *,
    optimizers: Sequence[Invented] = OPTIMIZERS,
    lrs: Sequence[float] = (1e-4, 3.162e-4, 1e-3, 3.162e-3, 1e-2, 3.162e-2, 1e-1, 3.162e-1, 1.0),
    seeds: Sequence[int] = (0, 1, 2),
    workloads: Sequence[tuple[str, dict[str, Any], float]] = (("digits", ACCURACY, 1.0),),
    steps: int = 600,
) -> Path:
    """A whole comparison's folder: every optimiser at every rate and its default, over the seeds."""
    entries = []
    for name, metric, difficulty in workloads:
        folder = f"{name}-small"
        entries.append(
            {
                "name": name,
                "preset": "small",
                "folder": folder,
                "summary": f"{name}: an invented workload with a network of 50,000 parameters",
                "metric": metric,
                "options": {"width": 64},
            }
        )
        for invented in optimizers:
            rates = [None] if invented.best_lr is None else sorted({*lrs, invented.default_lr or lrs[0]})
            for lr in rates:
                for seed in seeds:
                    write_run(
                        root / folder,
                        invented,
                        lr,
                        seed,
                        workload=name,
                        metric=metric,
                        difficulty=difficulty,
                        steps=steps,
                    )
    write_json(
        root / "comparison.json",
        {
            "format": 1,
            "command": "archopt compare digits --optimizers nero,agd,adamw --lrs grid --seeds 0,1,2",
            "workloads": entries,
            "optimizers": [
                {
                    "label": o.label,
                    "name": o.label,
                    "default_lr": o.default_lr,
                    "rate": o.best_lr is not None,
                    "published_lr": {},
                }
                for o in optimizers
            ],
            "lrs": list(lrs),
            "seeds": list(seeds),
        },
    )
    return root
