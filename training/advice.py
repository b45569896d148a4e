"""What limits a job, and what to change, in one plain sentence: starved of data, held up by copies, or simply busy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Job = Literal["train", "predict", "convert"]

STARVING = 0.10  # share of the time spent waiting for data, or copying it, above which that is what limits a job
HELD_DOWN = 0.20  # share of the samples in which a GPU's clocks were held down, above which it is worth telling
IDLE_GPU = 70.0  # per cent of utilisation below which a GPU that never waits for data has too little to do at a time
BUSY_CORES = 0.85  # share of this machine's cores above which they are what limits a job

_MORE_DATA: Mapping[Job, str] = {
    "train": "try data.loader.cache=host, more data.loader.threads, or a store with codec none",
    "predict": "give it more cores; if you predict the same files more than once, convert them first (--store)",
    "convert": "give it more cores, or machines with --scheduler",
}
_IDLE_GPU: Mapping[Job, str] = {
    "train": "a larger batch, model.compile=true or data.loader.steps_on=cpu",
    "predict": "a larger --batch-size",
    "convert": "more cores",
}
_ALL_CORES: Mapping[Job, str] = {
    "train": "a smaller picture or model, or a GPU, makes it faster",
    "predict": "more cores, or a GPU for the model, make it faster",
    "convert": "more cores, machines with --scheduler, or fewer --levels make it faster",
}


def advise(
    shares: Mapping[str, float],
    means: Mapping[str, float],
    slowed: Mapping[str, float],
    cores: int,
    job: Job = "train",
) -> str:
    """One sentence.

    Args:
        shares: of the time, by phase: "data" (waiting for it), "transfer" and "compute"; empty where nothing was timed.
        means: of the sampled figures, such as `cpu_percent_mean` (100 is one core) and `gpu0.utilisation_mean`.
        slowed: share of the samples in which a GPU was held down, by the reason that NVML gives.
        cores: that this process may use.
        job: what was watched, since what helps depends on it.
    """
    waiting, busy = shares.get("data", 0.0), means.get("cpu_percent_mean", 0.0) / 100 / cores
    # GPUs that belong to others idle here: the busiest one is ours.
    utilisation = max((v for name, v in means.items() if name.endswith(".utilisation_mean")), default=None)
    if waiting > STARVING:
        return f"{waiting:.0%} of the time is spent waiting for data, which limits this run: {_MORE_DATA[job]}."
    held = [reason for reason, share in slowed.items() if share > HELD_DOWN]
    if held:
        return f"The GPU is held down by its {', '.join(sorted(held))}: look at cooling and power limits."
    if shares.get("transfer", 0.0) > STARVING:
        return f"{shares['transfer']:.0%} of the time goes into copying batches to the device: a larger batch may help."
    if shares and utilisation is not None and utilisation < IDLE_GPU:
        return f"Data comes in time but the GPU idles between kernels: try {_IDLE_GPU[job]}."
    if shares:
        return f"The model itself limits this run; only {waiting:.1%} of the time is spent waiting for data."
    if not means:
        return "Too short to tell what limits it."
    if busy > BUSY_CORES:
        return f"All {cores} cores are busy ({busy:.0%}), which limits this job: {_ALL_CORES[job]}."
    return f"Only {busy:.0%} of {cores} cores are busy: reading or writing, or too few workers, limit this job."
