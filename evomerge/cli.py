"""The command line: parses words, calls, prints; no logic. Heavy imports wait until a command needs them."""

import os
import sys
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow a shared machine down several times

import typer

from evomerge.errors import EvoMergeError, InputError

app = typer.Typer(
    help="Find the coefficients with which fine-tuned checkpoints of one base model should be merged.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
families_app = typer.Typer(
    help="Small real expert families to try things on.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(families_app, name="families")

CampaignFile = Annotated[Path, typer.Argument(metavar="FILE", help="Campaign file (YAML).")]
RunPlace = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, its name under runs/, or URL#NAME.")]
ShardSize = Annotated[str, typer.Option(help="Largest file of weights, such as 500MB or 5GB.")]
TokenizerFrom = Annotated[
    str | None,
    typer.Option(metavar="EXPERT", help="Take tokenizer, chat template and generation configuration from this expert."),
]
OutFolder = Annotated[Path, typer.Option("--out", help="New folder for the merged checkpoint.")]


@app.command()
def check(file: CampaignFile) -> None:
    """Check a campaign before anything expensive: what is merged, searched and scored, and what it costs."""
    from evomerge.campaign import read_campaign
    from evomerge.check import check_campaign
    from evomerge.report.terminal import Loading, print_check

    with Loading() as loading:
        report = check_campaign(read_campaign(file), loading)
    print_check(file, report)


@app.command()
def search(
    file: CampaignFile,
    run: Annotated[
        str | None, typer.Option(help="Folder, URL or URL#NAME of a database (default: runs/NAME of the campaign).")
    ] = None,
    workers: Annotated[
        str | None, typer.Option(help="inline, ray:8 or ray:auto (default: what the file says).")
    ] = None,
) -> None:
    """Run a campaign; the same command resumes it after an interruption, or extends it when the budget grew."""
    from evomerge.campaign import read_campaign
    from evomerge.ledger.location import locate
    from evomerge.report.terminal import Loading, print_finished
    from evomerge.report.terminal import search as search_shown

    campaign = read_campaign(file, workers=workers)
    location = locate(run or Path("runs") / campaign.name).called(campaign.name)
    try:
        with Loading() as loading:
            finished_before, result = search_shown(campaign, location, loading)
    except KeyboardInterrupt as interrupt:
        typer.echo("evomerge: stopped; the same command goes on where this one ended", err=True)
        raise typer.Exit(130) from interrupt
    print_finished(result, file, was_finished=finished_before)


@app.command()
def front(
    run: RunPlace,
    everything: Annotated[bool, typer.Option("--all", help="Show every model on the front.")] = False,
) -> None:
    """Show the front of a run beside base, experts, uniform average and best single coefficient."""
    from evomerge.report.terminal import print_front
    from evomerge.run import open_run

    print_front(open_run(run), everything=everything)


@app.command()
def runs(
    place: Annotated[str, typer.Argument(metavar="[FOLDER|URL]", help="Folder with runs, or a database.")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the runs in a folder or a database: state, trials, front, hypervolume, when last written."""
    from evomerge.ledger.location import locate
    from evomerge.report.runs import print_runs, runs_as_json
    from evomerge.runs import summarize_runs

    location = locate(place)
    summaries = summarize_runs(location)
    if as_json:
        typer.echo(runs_as_json(summaries))
    else:
        print_runs(summaries, location)


@app.command()
def mirror(
    run: RunPlace,
    optuna: Annotated[str, typer.Option(help="Storage of the study, such as sqlite:///study.db.")],
    study: Annotated[str | None, typer.Option(help="Name of the study (default: the campaign's).")] = None,
) -> None:
    """Copy a run's trials into an Optuna study, for optuna-dashboard; again adds what is new."""
    from evomerge.report.terminal import mirror as mirror_shown
    from evomerge.run import open_run

    opened = open_run(run)
    mirror_shown(opened, optuna, study or opened.campaign.name)


@app.command()
def replay(run: RunPlace) -> None:
    """Propose a run's trials again from its record, and show the first difference; nothing is scored."""
    from evomerge.report.replay import replay as replay_shown
    from evomerge.run import open_run

    replay_shown(open_run(run))


@app.command()
def report(
    run: RunPlace,
    out: Annotated[Path | None, typer.Option(help="HTML file (default: report.html in the run's own folder).")] = None,
) -> None:
    """Write the page of a run, with all that it shows, to one HTML file that works offline."""
    from evomerge.report.html import write_report
    from evomerge.report.terminal import Loading
    from evomerge.run import open_run

    opened = open_run(run)
    path = out or opened.location.file("report.html")
    with Loading() as loading:
        write_report(opened, path, loading)
    typer.echo(f"report   {path}  ({path.stat().st_size / 1e6:.1f} MB, works offline)")


@app.command()
def ui(
    place: Annotated[str, typer.Argument(metavar="[RUN|FOLDER|URL]", help="A run, or where many are.")] = "runs",
    host: Annotated[
        str, typer.Option(help="Address to serve at; elsewhere than on 127.0.0.1, with a token.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port (default: 8700, or the next that is free).")] = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Serve the page of a run, or of many, live while they are written; it only reads. Ctrl-C ends it."""
    from evomerge.report.browser import open_browser
    from evomerge.report.server import serve
    from evomerge.runs import find_runs

    def started(address: str) -> None:
        typer.echo(f"page     {address}  (Ctrl-C ends it)")
        if show:
            open_browser(address)

    serve(find_runs(place), host=host, port=port, started=started)


@app.command()
def export(  # noqa: PLR0913, PLR0917  (the options of a command)
    run: RunPlace,
    out: OutFolder,
    trial: Annotated[int | None, typer.Option(help="Export this trial.")] = None,
    knee: Annotated[bool, typer.Option("--knee", help="Export the front's best balance.")] = False,
    prefer: Annotated[
        str | None, typer.Option(help="Export what serves weights best: a=2,b=1 (others count 1).")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load the export again and score it against the ledger.")
    ] = False,
    shard_size: ShardSize = "5GB",
    tokenizer_from: TokenizerFrom = None,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Write a merge of LoRA adapters as one adapter of the base.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the export to Hugging Face's hub.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository that --push creates private.")
    ] = False,
) -> None:
    """Write one model of a run as a Hugging Face checkpoint, with its recipe and model card."""
    from evomerge.export import Form, export_trial, parse_preference, verify_export
    from evomerge.push import push as push_folder
    from evomerge.push import require_pushable
    from evomerge.report.terminal import Loading, print_export, print_verification
    from evomerge.run import open_run

    opened = open_run(run)
    form = Form(shard_size=shard_size, tokenizer_from=tokenizer_from, as_adapter=as_adapter)
    preference = parse_preference(prefer) if prefer is not None else None
    picked = opened.pick(trial=trial, at_knee=knee, preference=preference)
    if private and not push:
        raise InputError("--private: says how --push creates its repository; give --push OWNER/NAME, too")
    if push:
        require_pushable(push)
    with Loading() as loading:
        exported = export_trial(opened, picked, out, loading, form)
    print_export(opened, picked, out, exported, verified=verify)
    if verify:
        with Loading() as loading:
            rows = verify_export(opened, picked, out, loading)
        print_verification(rows)
    if push:
        message = f"Merge by evomerge: {opened.campaign.name}, trial {picked.number}"
        typer.echo(f"pushed   {push_folder(out, push, message, private=private)}")


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML), ours or mergekit's.")],
    out: OutFolder,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    shard_size: ShardSize = "5GB",
    tokenizer_from: TokenizerFrom = None,
) -> None:
    """Build one merged model from a recipe, or from a mergekit configuration as it is, without a search."""
    from evomerge.export import Form, merge_recipe
    from evomerge.report.terminal import Loading

    notes: list[str] = []
    with Loading() as loading:
        form = Form(shard_size=shard_size, tokenizer_from=tokenizer_from)
        digest = merge_recipe(recipe, out, device, loading, notes.append, form)
    for note in notes:
        typer.echo(note)
    typer.echo(f"merged   {out}  (tensors {digest[:12]})")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A mergekit or mergekit-evolve configuration.")],
    out: Annotated[Path, typer.Option(help="New file: a recipe, or of mergekit-evolve's a campaign.")],
) -> None:
    """Turn a mergekit configuration into a recipe, or a mergekit-evolve configuration into a campaign."""
    from evomerge.interop.convert import convert

    kind, notes = convert(file, out)
    for note in notes:
        typer.echo(f"note     {note}")
    typer.echo(f"{kind:8} {out}")


@app.command()
def operators() -> None:
    """List the operators: what each does, and the numbers that can be set or searched, with default and range."""
    from evomerge.report.terminal import print_operators

    print_operators()


@families_app.command("make")
def families_make(
    name: Annotated[str, typer.Argument(help="digits, digits4, orders or text.")],
    out: Annotated[Path, typer.Option(help="Folder of the family.")],
) -> None:
    """Train a family of experts on the CPU: base, experts, held-out items and a ready campaign file."""
    from evomerge.report.terminal import make_family

    make_family(name, out)


@families_app.command("list")
def families_list() -> None:
    """List the families."""
    from evomerge.families.family import FAMILIES

    for name, family in FAMILIES.items():
        typer.echo(f"{name:8} {family.description}")


def main() -> None:
    """Run a command; a mistake of the user's is one line and status 2, a failure of ours one line and status 1."""
    try:
        app()
    except EvoMergeError as error:
        message = " ".join(str(error).split())
        typer.echo(f"evomerge: {'' if isinstance(error, InputError) else 'failed: '}{message}", err=True)
        sys.exit(error.exit_status)
    except OSError as error:
        typer.echo(f"evomerge: failed: {error}; make room or give access, and type the command again", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
