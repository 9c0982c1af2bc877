"""The command line ``mmpipe``: plan, catalogues, results, offline scoring, export, chat, and a check of
the machine. Snakemake makes the results: ``snakemake results/mmbench.json``."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mmpipe import __version__
from mmpipe.chat.options import LoadOptions, SamplingOptions, takes_options
from mmpipe.errors import ConfigError, MmpipeError
from mmpipe.escapes import escape_tracebacks, json_text, message, printable

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, distil and benchmark vision-language models. snakemake makes results; mmpipe explains and uses them.",
)

ConfigFile = Annotated[Path, typer.Option("--configfile", help="The main configuration file.", show_default=True)]
References = Annotated[list[Path], typer.Option(help="The official file(s), or JSON lines of its records.")]
Answers = Annotated[list[Path], typer.Option(help="JSON lines with question_id and text.")]


def main() -> None:
    """Run the command line; errors that a user can correct exit with status 1 and no traceback."""
    escape_tracebacks()
    try:
        app()
    except MmpipeError as error:
        print(f"mmpipe: {message(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def _plan(configfile: Path) -> Any:
    from mmpipe.plan.plan import Plan
    from mmpipe.settings import read_mapping

    return Plan(read_mapping(configfile), where=str(configfile))


def _print_json(value: Any) -> None:
    print(json_text(value))


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.command()
def plan(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; default: the chosen ones.")] = None,
    configfile: ConfigFile = Path("config/config.yaml"),
) -> None:
    """Show the stages of recipes: owner, settings, starting point, estimated memory and time."""
    from mmpipe.cli.show import print_plan

    print_plan(_plan(configfile), recipe)


@app.command()
def doctor(
    profile: Annotated[str, typer.Option(help="The profile of the jobs: local, gpu, slurm.")] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    configfile: ConfigFile = Path("config/config.yaml"),
) -> None:
    """Check this machine: versions, driver, GPUs, disks, Slurm, profile, with advice. Exit status 1 on a problem."""
    from mmpipe.cli import doctor
    from mmpipe.doctor import Machine, examine

    found = examine(Machine(Path(), profile, configfile))
    if as_json:
        print(doctor.as_json(found))
    else:
        doctor.print_findings(found)
    raise typer.Exit(any(finding.status == "problem" for finding in found))


@app.command()
def show(comparison: Annotated[Path, typer.Argument(help="A comparison, e.g. results/mmbench.json.")]) -> None:
    """Print a comparison as a table."""
    from mmpipe.cli.show import print_comparison

    print_comparison(comparison)


@app.command()
def why(
    targets: Annotated[list[str], typer.Argument(help="Files or target rules, e.g. results/mmbench.json.")],
    configfile: Annotated[Path | None, typer.Option("--configfile", help="As given to snakemake.")] = None,
) -> None:
    """Explain which jobs snakemake would run for a target, and why."""
    from mmpipe.cli.why import explain

    print(printable(explain(targets, configfile)))


@app.command()
def verify(
    artifacts: Annotated[
        list[Path] | None, typer.Argument(help="Artifacts or folders of some; default: results and resources.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Read files again that were hashed before.")] = False,
) -> None:
    """Check every file of artifacts against the hash in its manifest. Exit status 1 when one is damaged."""
    from mmpipe.cli.verify import print_verified

    raise typer.Exit(not print_verified(artifacts or [], cache=not no_cache))


@app.command()
def data(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Entries, mixtures, recipes, benchmarks to show in full; default: all in brief."),
    ] = None,
    lock: Annotated[bool, typer.Option("--lock", help="Pin the fetched entries in config/lock.json.")] = False,
    configfile: ConfigFile = Path("config/config.yaml"),
) -> None:
    """List data sets and backbones: state, size, licence; for a mixture or recipe, what must still be fetched."""
    from mmpipe.cli.data import print_catalogue
    from mmpipe.sources.transfer.lock import LOCK, write_lock

    plan = _plan(configfile)
    if not lock:
        return print_catalogue(plan, names or ())
    added = write_lock({"backbones": plan.backbones, "datasets": plan.datasets})
    print(f"{LOCK}: {', '.join(added) if added else 'nothing new'}")


@app.command()
def smoke(
    targets: Annotated[list[str], typer.Argument(help="Targets, e.g. results/mmbench.json.")],
    max_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each stage.")] = 2,
    configfile: Annotated[Path | None, typer.Option("--configfile", help="As given to snakemake.")] = None,
    cores: Annotated[str, typer.Option(help="As given to snakemake.")] = "all",
) -> None:
    """Try every stage on the way to a target for a few steps, in results/smoke/."""
    from mmpipe.cli.why import snakemake_command

    for target in targets:
        if not target.startswith("results/"):
            raise MmpipeError(f"'{target}' is no file below results/; name one, e.g. results/mmbench.json")
    smoke = [target.replace("results/", "results/smoke/", 1) for target in targets]
    limit = ["--cores", cores, "--config", f"smoke={{max_steps: {max_steps}}}"]
    raise typer.Exit(subprocess.run([*snakemake_command(smoke, configfile), *limit], check=False).returncode)


@app.command()
def score(
    benchmark: Annotated[str, typer.Argument(help="A benchmark, e.g. mmbench.")],
    references: References,
    answers: Answers,
    protocol: Annotated[str, typer.Option(help="The protocol; default: the official one.")] = "",
    judge: Annotated[Path | None, typer.Option(help="The judge's replies, for judged protocols.")] = None,
    per_item: Annotated[
        Path | None, typer.Option(help="Also write the verdict on every question to this file.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the score to this file.")] = None,
) -> None:
    """Score answers offline; prints JSON."""
    from mmpipe.benchmarks.scoring import score_files

    _print_json(score_files(benchmark, references, answers, protocol=protocol, judge=judge, per_item=per_item, out=out))


@app.command()
def benchmarks() -> None:
    """List the benchmarks and their protocols; prints JSON."""
    from mmpipe.benchmarks.scoring import describe

    _print_json(describe())


@app.command()
def convert(
    benchmark: Annotated[str, typer.Argument(help="A benchmark, e.g. mmbench.")],
    references: References,
    answers: Answers,
    out: Annotated[Path, typer.Option(help="The submission file.")],
) -> None:
    """Write the submission file for a benchmark's server; prints JSON."""
    from mmpipe.benchmarks.scoring import convert_files

    _print_json(convert_files(benchmark, references, answers, out))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A published checkpoint, e.g. results/demo/finetune/model.")],
    out: Annotated[Path, typer.Argument(help="A directory that does not exist yet.")],
    layout: Annotated[str, typer.Option(help="A layout of another system, e.g. llava.")],
    language: Annotated[
        str | None, typer.Option(help="The layout of a packed language model inside, e.g. moss2.")
    ] = None,
    tower: Annotated[
        str, typer.Option(help="The name of the vision tower in the configuration.")
    ] = "openai/clip-vit-large-patch14-336",
    binary: Annotated[bool, typer.Option("--binary", help="Write pytorch_model.bin instead of safetensors.")] = False,
) -> None:
    """Export a checkpoint in the layout of another system, tensors bit for bit equal."""
    from mmpipe.artifacts.files import staged_directory
    from mmpipe.checkpoints.layouts import get

    if out.exists():
        raise ConfigError(f"{out}: exists; name a directory that does not")
    with staged_directory(out) as stage:
        get(layout).write(checkpoint, stage, language=language, tower=tower, binary=binary)
    print(out)


@app.command()
def export_mixture(
    mixture: Annotated[str, typer.Argument(help="A mixture, e.g. rlaif-v, or the directory of one.")],
    out: Annotated[Path, typer.Argument(help="A file that does not exist yet: .json, or .parquet for messages.")],
    layout: Annotated[
        str,
        typer.Option(
            "--as",
            help="llava (conversations), messages (Parquet for TRL and datasets), preference (LLaVA-MoD's pairs).",
        ),
    ],
    root: Annotated[Path, typer.Option(help="Images are named relative to this folder.")] = Path(),
    images: Annotated[
        Path | None, typer.Option(help="Link images into this folder instead, and name them relative to it.")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="With --images: copy, do not link.")] = False,
    embed: Annotated[bool, typer.Option("--embed", help="Put images into the Parquet file itself (messages).")] = False,
) -> None:
    """Export a verified mixture in a format of other programs."""
    from mmpipe.data.export import export_mixture as write
    from mmpipe.data.export import keep_in_place, place_in_folder

    if copy and images is None:
        raise ConfigError("--copy needs --images, the folder to copy into")
    directory = Path(mixture) if Path(mixture).is_dir() else Path("resources/mixtures", mixture)
    placement = keep_in_place(root) if images is None else place_in_folder(images, copy)
    print(f"{out}: {write(directory, out, layout, placement, embed=embed)} records")


@dataclass(frozen=True)
class JudgeOptions:
    """The settings of a judge model that the command line takes."""

    model: Annotated[str, typer.Option(help="The judge's name; part of the score's protocol.")]
    base_url: Annotated[str, typer.Option(help="An OpenAI-compatible endpoint.")] = "https://api.openai.com/v1"
    max_requests: Annotated[int, typer.Option(min=0, help="Requests at most, repeated ones included.")] = 5000
    max_usd: Annotated[float | None, typer.Option(min=0, help="Dollars at most, by the prices below.")] = None
    usd_per_million_input: Annotated[float, typer.Option(min=0, help="Price of request tokens.")] = 0.0
    usd_per_million_output: Annotated[float, typer.Option(min=0, help="Price of reply tokens.")] = 0.0
    key_variable: Annotated[str, typer.Option(help="Environment variable with the key.")] = "OPENAI_API_KEY"


@app.command()
@takes_options
def judge(
    benchmark: Annotated[str, typer.Argument(help="A benchmark with judged protocols, e.g. mmhal.")],
    references: References,
    answers: Answers,
    settings: JudgeOptions,
    out: Annotated[Path, typer.Option(help="The replies; recorded ones are not requested again.")] = Path(
        "judge.jsonl"
    ),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate requests and costs, send nothing.")] = False,
) -> None:
    """Grade answers with a judge model, or estimate the costs; prints JSON."""
    from mmpipe.benchmarks.judge import judge_answers, price
    from mmpipe.benchmarks.spec import JudgeSettings
    from mmpipe.settings import validate

    chosen: JudgeSettings = validate(JudgeSettings, asdict(settings), "mmpipe judge")
    _print_json((price if dry_run else judge_answers)(benchmark, references, answers, out, chosen))


@app.command()
@takes_options
def chat(
    checkpoint: Annotated[
        str, typer.Argument(help="A directory, recipe, recipe@stage, or owner/name[@revision] on the Hugging Face hub.")
    ],
    load: LoadOptions,
    sampling: SamplingOptions,
    image: Annotated[list[str] | None, typer.Option(help="A file or address; repeat it for several images.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this one question and exit; '-' reads it from standard input.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --prompt: print everything as JSON.")] = False,
    configfile: ConfigFile = Path("config/config.yaml"),
) -> None:
    """Talk to a checkpoint about images."""
    from mmpipe.chat.run import chat as run

    run(checkpoint, configfile, load, sampling, image or [], prompt, as_json)


@app.command()
@takes_options
def serve(
    checkpoint: Annotated[str, typer.Argument(help="A directory, recipe, recipe@stage, or owner/name on the hub.")],
    load: LoadOptions,
    sampling: SamplingOptions,
    other: Annotated[str | None, typer.Argument(help="Another one, to compare answers side by side.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 takes a free one.")] = 7860,
    allow_host: Annotated[list[str] | None, typer.Option(help="Another name of this server, of a proxy.")] = None,
    configfile: ConfigFile = Path("config/config.yaml"),
) -> None:
    """Serve a checkpoint, or two: a page to talk to them, and OpenAI's protocol below /v1."""
    from mmpipe.chat.run import serve as run

    run([checkpoint] if other is None else [checkpoint, other], configfile, load, sampling, port, allow_host or [])


@app.command()
def schema(out: Annotated[Path | None, typer.Option(help="Write to this file instead.")] = None) -> None:
    """Print the JSON schema of all configuration files (config/schema.json), for editors."""
    from mmpipe.plan.schema import configuration_schema

    text = json.dumps(configuration_schema(), indent=2, ensure_ascii=False) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
