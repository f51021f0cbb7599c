"""The command line: parses words, calls, prints; no logic. Heavy imports wait until a command needs them."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow a shared machine down several times

import typer

from evomerge.errors import EvoMergeError, InputError
from evomerge.report.console import Loading
from evomerge.report.tables import showing

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
job_app = typer.Typer(
    help="Searches that were submitted to a Ray cluster.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(job_app, name="job")

CampaignFile = Annotated[Path, typer.Argument(metavar="FILE", help="Campaign file (YAML).")]
RunPlace = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, its name under runs/, or URL#NAME.")]
TrialNumber = Annotated[int | None, typer.Option("--trial", help="This trial.")]
Knee = Annotated[bool, typer.Option("--knee", help="The front's best balance.")]
Prefer = Annotated[str | None, typer.Option(help="What serves weights best: a=2,b=1 (others count 1).")]
Least = Annotated[str | None, typer.Option("--min", help="Of the front's models with at least: a=0.7,b=0.5.")]
Largest = Annotated[str | None, typer.Option("--max", help="Of the front's models with at most: loss=0.4.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print the (first) table as CSV, for scripts.")]
ShardSize = Annotated[str, typer.Option(help="Largest file of weights, such as 500MB or 5GB.")]
TokenizerFrom = Annotated[
    str | None,
    typer.Option(metavar="EXPERT", help="Take tokenizer, chat template and generation configuration from this expert."),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="The job that evomerge submit named.")]
ServerAddress = Annotated[
    str | None,
    typer.Option("--address", help="http://HOST:8265 of the cluster's head (default: RAY_ADDRESS, or this machine)."),
]
OutFolder = Annotated[Path, typer.Option("--out", help="New folder for the merged checkpoint.")]


@app.command()
def check(file: CampaignFile, as_json: AsJson = False) -> None:
    """Check a campaign before anything expensive: what is merged, searched and scored, and what it costs."""
    from evomerge.campaign.campaign import read_campaign
    from evomerge.check import check_campaign
    from evomerge.report.checked import checked

    with showing(as_json=as_json) as show:
        with Loading() as loading:
            report = check_campaign(read_campaign(file), loading)
        show(checked(file, report))


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
    from evomerge.campaign.campaign import read_campaign
    from evomerge.ledger.location import locate
    from evomerge.report.front import print_finished
    from evomerge.report.progress import search as search_shown

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
def submit(
    file: CampaignFile,
    run: Annotated[
        str | None, typer.Option(help="As for search, and as the cluster's head finds it (default: runs/NAME here).")
    ] = None,
    workers: Annotated[str | None, typer.Option(help="ray:8 or ray:auto (default: what the file says).")] = None,
    address: ServerAddress = None,
    as_json: AsJson = False,
) -> None:
    """Hand a campaign's search to a Ray cluster and return at once; the same command resumes it."""
    from evomerge.report.jobs import submitted
    from evomerge.submit import submit as submit_to

    with showing(as_json=as_json) as show:
        show(submitted(submit_to(file, address, run=run, workers=workers), _option(address)))


@app.command()
def front(
    run: RunPlace,
    everything: Annotated[bool, typer.Option("--all", help="Show every model on the front.")] = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Show the front of a run beside base, experts, uniform average and best single coefficient."""
    from evomerge.report.front import front as front_shown
    from evomerge.run.run import open_run

    with showing(as_json=as_json, as_csv=as_csv) as show:
        show(front_shown(open_run(run), everything=everything))


@app.command()
def status(
    place: Annotated[str, typer.Argument(metavar="[RUN|FOLDER|URL]", help="A run, or where runs are.")] = "runs",
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Say how far a run is: driver, progress, best so far, time left, failures, what happened last.

    Of a folder or database of many, the runs that are driven at the moment; if none is, the one written last.
    """
    from evomerge.ledger.location import find_place
    from evomerge.report.status import status as status_shown
    from evomerge.run.status import current_status

    with showing(as_json=as_json, as_csv=as_csv) as show:
        show(status_shown(current_status(find_place(place))))


@app.command("show")
def show_(
    run: RunPlace,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="Number of a trial, or knee.")],
    everything: Annotated[bool, typer.Option("--all", help="Show the coefficients of every group.")] = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Show one trial: its fate, scores, gains and losses against each expert, coefficients, where it came from."""
    from evomerge.report.trial import trial as trial_shown
    from evomerge.run.comparison import trial_of
    from evomerge.run.run import open_run

    with showing(as_json=as_json, as_csv=as_csv) as show:
        opened = open_run(run)
        show(trial_shown(opened, trial_of(opened, trial), everything=everything))


@app.command()
def compare(
    run: RunPlace,
    one: Annotated[str, typer.Argument(metavar="MODEL|RUN", help="Number, knee, uniform, expert:NAME; or a run.")],
    other: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Another model of the run.")] = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Compare two models of a run, paired over the same items; or two runs, by their fronts at equal cost."""
    from evomerge.report.pairs import comparison

    with showing(as_json=as_json, as_csv=as_csv) as show:
        show(comparison(run, one, other))


@app.command()
def score(
    run: RunPlace,
    tasks: Annotated[Path, typer.Option(metavar="FILE", help="evaluation and objectives, as in a campaign.")],
    trial: TrialNumber = None,
    knee: Knee = False,
    prefer: Prefer = None,
    least: Least = None,
    largest: Largest = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Score one model of a run on tasks that its campaign did not have, to see what the merge forgot."""
    from evomerge.report.pairs import rescored
    from evomerge.report.progress import rescore
    from evomerge.run.run import open_run

    with showing(as_json=as_json, as_csv=as_csv) as show:
        opened = open_run(run)
        picked = opened.pick(trial=trial, at_knee=knee, **_wish(prefer, least, largest))
        show(rescored(opened, rescore(opened, picked, tasks)))


@app.command()
def runs(
    place: Annotated[str, typer.Argument(metavar="[FOLDER|URL]", help="Folder with runs, or a database.")] = "runs",
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """List the runs in a folder or a database: state, trials, front, hypervolume, when last written."""
    from evomerge.ledger.location import locate
    from evomerge.report.runs import runs as runs_shown
    from evomerge.run.runs import summarize_runs

    with showing(as_json=as_json, as_csv=as_csv) as show:
        location = locate(place)
        show(runs_shown(summarize_runs(location), location))


@app.command()
def mirror(
    run: RunPlace,
    optuna: Annotated[str, typer.Option(help="Storage of the study, such as sqlite:///study.db.")],
    study: Annotated[str | None, typer.Option(help="Name of the study (default: the campaign's).")] = None,
    as_json: AsJson = False,
) -> None:
    """Copy a run's trials into an Optuna study, for optuna-dashboard; again adds what is new."""
    from evomerge.report.mirrored import mirrored
    from evomerge.report.progress import counting
    from evomerge.run.mirror import mirror as mirror_to
    from evomerge.run.run import open_run

    with showing(as_json=as_json) as show:
        opened = open_run(run)
        name = study or opened.campaign.name
        with counting("mirror") as count:
            counts = mirror_to(opened, optuna, name, count)
        show(mirrored(opened, optuna, name, counts))


@app.command()
def replay(run: RunPlace, as_json: AsJson = False) -> None:
    """Propose a run's trials again from its record, and show the first difference; nothing is scored."""
    from evomerge.report.progress import counting
    from evomerge.report.replay import replayed
    from evomerge.run.replay import replay as propose_again
    from evomerge.run.replay import require_same_proposals
    from evomerge.run.run import open_run

    with showing(as_json=as_json) as show:
        opened = open_run(run)
        with counting("replay") as count:
            replays = propose_again(opened, count)
        show(replayed(opened, replays))
        require_same_proposals(replays)


@app.command()
def report(
    run: RunPlace,
    out: Annotated[Path | None, typer.Option(help="HTML file (default: report.html in the run's own folder).")] = None,
) -> None:
    """Write the page of a run, with all that it shows, to one HTML file that works offline."""
    from evomerge.report.html import write_report
    from evomerge.run.run import open_run

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
    from evomerge.ledger.location import find_place
    from evomerge.report.browser import open_browser
    from evomerge.report.server import serve

    def started(address: str) -> None:
        typer.echo(f"page     {address}  (Ctrl-C ends it)")
        if show:
            open_browser(address)

    serve(find_place(place), host=host, port=port, started=started)


@app.command()
def export(
    run: RunPlace,
    out: OutFolder,
    trial: TrialNumber = None,
    knee: Knee = False,
    prefer: Prefer = None,
    least: Least = None,
    largest: Largest = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load the export again and score it against the ledger.")
    ] = False,
    shard_size: ShardSize = "5GB",
    tokenizer_from: TokenizerFrom = None,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Write a merge of LoRA adapters as one adapter of the base.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Upload the export to Hugging Face's hub; folders are named without their paths."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository that --push creates private.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write one model of a run as a Hugging Face checkpoint, with its recipe and model card."""
    from evomerge.publish.export import Form, export_trial, require_same_scores, verify_export
    from evomerge.publish.push import push as push_folder
    from evomerge.publish.push import require_pushable
    from evomerge.report.exported import exported, pushed, verification
    from evomerge.run.run import open_run

    with showing(as_json=as_json) as show:
        opened = open_run(run)
        form = Form(
            shard_size=shard_size, tokenizer_from=tokenizer_from, as_adapter=as_adapter, is_public=push is not None
        )
        picked = opened.pick(trial=trial, at_knee=knee, **_wish(prefer, least, largest))
        if private and not push:
            raise InputError("--private: says how --push creates its repository; give --push OWNER/NAME, too")
        if push:
            require_pushable(push)
        with Loading() as loading:
            written = export_trial(opened, picked, out, loading, form)
        show(exported(opened, picked, out, written, verified=verify))
        if verify:
            with Loading() as loading:
                rows = verify_export(opened, picked, out, loading)
            show(verification(rows))
            require_same_scores(rows)
        if push:
            message = f"Merge by evomerge: {opened.campaign.name}, trial {picked.number}"
            show(pushed(push_folder(out, push, message, private=private)))


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML), ours or mergekit's.")],
    out: OutFolder,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    shard_size: ShardSize = "5GB",
    tokenizer_from: TokenizerFrom = None,
    as_json: AsJson = False,
) -> None:
    """Build one merged model from a recipe, or from a mergekit configuration as it is, without a search."""
    from evomerge.publish.export import Form, merge_recipe
    from evomerge.report.exported import merged

    with showing(as_json=as_json) as show:
        form = Form(shard_size=shard_size, tokenizer_from=tokenizer_from)
        with Loading() as loading:
            built = merge_recipe(recipe, out, device, loading, form)
        show(merged(out, built))


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
def operators(as_json: AsJson = False, as_csv: AsCsv = False) -> None:
    """List the operators: what each does, and the numbers that can be set or searched, with default and range."""
    from evomerge.report.operators import operators as operators_shown

    with showing(as_json=as_json, as_csv=as_csv) as show:
        show(operators_shown())


@job_app.command("status")
def job_status(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job (default: all).")] = None,
    address: ServerAddress = None,
    as_json: AsJson = False,
) -> None:
    """Show what became of a job, or list all."""
    from evomerge.report.jobs import all_jobs, one_job
    from evomerge.workers.jobs import JobServer

    with showing(as_json=as_json) as show:
        server = JobServer(address)
        if job is None:
            show(all_jobs(server.jobs(), server.address))
        else:
            show(one_job(server.job(job), server.address, _option(address)))


@job_app.command("logs")
def job_logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job is over; Ctrl-C leaves it be.")] = False,
    address: ServerAddress = None,
) -> None:
    """Print what a job has printed."""
    from evomerge.workers.jobs import JobServer

    server = JobServer(address)
    if not follow:
        typer.echo(server.logs(job), nl=False)
        return
    try:
        server.follow(job, partial(typer.echo, nl=False))
    except KeyboardInterrupt as interrupt:
        raise typer.Exit(130) from interrupt


@job_app.command("stop")
def job_stop(job: JobName, address: ServerAddress = None) -> None:
    """Let a job finish what is under way and end, as Ctrl-C does; evomerge submit goes on with its run."""
    from evomerge.report.jobs import stopping
    from evomerge.workers.jobs import JobServer

    with showing() as show:
        show(stopping(JobServer(address).stop(job), _option(address)))


def _option(address: str | None) -> str:
    """How a command to come names the job server that this one was given."""
    return f" --address {address}" if address else ""


@families_app.command("make")
def families_make(
    name: Annotated[str, typer.Argument(help="digits, digits4, orders or text.")],
    out: Annotated[Path, typer.Option(help="Folder of the family.")],
    as_json: AsJson = False,
) -> None:
    """Train a family of experts on the CPU: base, experts, held-out items and a ready campaign file."""
    from evomerge.report.families import made
    from evomerge.report.progress import make_family

    with showing(as_json=as_json) as show:
        show(made(make_family(name, out), out))


@families_app.command("list")
def families_list(as_json: AsJson = False) -> None:
    """List the families."""
    from evomerge.report.families import families

    with showing(as_json=as_json) as show:
        show(families())


def _wish(prefer: str | None, least: str | None, largest: str | None) -> dict[str, dict[str, float] | None]:
    """Read what is wished of a model of the front, as ``Run.pick`` takes it."""
    from evomerge.strict import read_numbers

    given = {"preference": (prefer, "--prefer"), "minimum": (least, "--min"), "maximum": (largest, "--max")}
    return {name: None if text is None else read_numbers(text, option) for name, (text, option) in given.items()}


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
