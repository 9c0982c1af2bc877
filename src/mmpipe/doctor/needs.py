"""What the chosen recipes and benchmarks still need on this machine."""

from __future__ import annotations

from mmpipe.doctor.base import Machine
from mmpipe.errors import ConfigError
from mmpipe.estimate.stage import estimate
from mmpipe.plan.plan import Plan
from mmpipe.sources.base import Source


def missing_sources(machine: Machine) -> dict[str, Source]:
    """The entries of the catalogues that must still be fetched, by ``datasets/name`` or ``backbones/name``."""
    try:
        wanted = _sources(machine.plan)
    except ConfigError:  # reported by the check of the configuration
        return {}
    return {
        name: source
        for name, source in wanted.items()
        if not (machine.root / "resources" / name / "manifest.json").is_file()
    }


def _sources(plan: Plan) -> dict[str, Source]:
    """The entries that the chosen stages and benchmarks read, and what those are joined from."""
    stages = plan.chosen_stages()
    backbones = {name for stage in stages for name in stage.vision_language.parts().values()}
    mixtures = {mixture for stage in stages if (mixture := stage.settings.mixture())}
    waiting = [
        *(part.dataset for mixture in mixtures for part in plan.mixtures[mixture].parts),
        *(plan.benchmarks[name].data for name in plan.chosen_benchmarks),
    ]
    datasets: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in datasets:
            datasets.add(name)
            waiting += plan.datasets[name].needs()
    return {f"backbones/{name}": plan.backbones[name] for name in sorted(backbones)} | {
        f"datasets/{name}": plan.datasets[name] for name in sorted(datasets)
    }


def checkpoint_bytes(machine: Machine) -> float:
    """Bytes of the checkpoints still to be made: float32 weights of each, and for the largest one the checkpoints in
    progress (two are kept while a third is written; weights and two moments of what trains)."""
    found = [
        needs
        for stage in machine.stages
        if not (machine.root / stage.manifest()).is_file() and (needs := estimate(machine.plan, stage, machine.root))
    ]
    return sum(needs.published for needs in found) + max((3 * 12 * needs.trainable for needs in found), default=0)
