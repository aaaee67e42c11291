"""``mae jobs``: run and inspect jobs; tables for people, ``--json`` for programs."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmae.cli.output import print_result, print_table
from openmae.cli.parser import ACTIONS, Parser, add_spec_arguments
from openmae.errors import Preempted, RunError, SpecError
from openmae.jobs.platforms import PLATFORMS

if TYPE_CHECKING:
    from openmae.jobs.client import Client
    from openmae.jobs.job import Job

_STYLES = {"COMPLETE": "green", "ERROR": "red", "RUNNING": "cyan", "CANCELED": "yellow", "UNKNOWN": "magenta"}
_Run = Callable[[argparse.Namespace], None]


def add_arguments(parser: Parser) -> None:
    """Declare the subcommands; each sets ``run``."""
    commands = parser.add_commands()
    submit = _command(commands, "submit", "check an action, then run or queue it as a job", _submit)
    submit.add_argument("action", choices=tuple(ACTIONS), metavar="ACTION", help=", ".join(ACTIONS))
    add_spec_arguments(submit, "config option, or a shorthand such as num_epochs=3")
    submit.add_argument("--parent", metavar="JOB", help="job whose model this one takes")
    submit.add_argument("--platform", choices=PLATFORMS, default="local", help="where it runs (default: %(default)s)")
    submit.add_argument("--name", help="name shown in lists")
    submit.add_argument("--gpus", type=int, metavar="N", help="GPUs per node")
    submit.add_argument("--nodes", type=int, metavar="N", help="number of nodes")
    submit.add_argument(
        "--automl",
        type=str.lower,
        choices=("auto", "on", "off"),
        help="for train: run a hyperparameter search (auto or on; default), or train once (off)",
    )
    submit.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="pass on a variable; its value is never shown"
    )
    submit.add_argument("--wait", action="store_true", help="wait until it has ended; exit code 1 if it failed")
    listing = _command(commands, "list", "list all jobs, oldest first", _list)
    listing.add_argument("--status", type=str.upper, help="only jobs in this state")
    listing.add_argument("--action", help="only jobs of this action")
    _command(commands, "status", "show the state of a job, and why it failed", _status, on_a_job=True)
    logs = _command(commands, "logs", "print the output of a job", _logs, on_a_job=True)
    logs.add_argument("-n", "--tail", type=int, metavar="N", help="only the last N lines")
    logs.add_argument("-f", "--follow", action="store_true", help="wait for more output until the job has ended")
    cancel = _command(commands, "cancel", "stop a job; training writes a checkpoint first", _cancel, on_a_job=True)
    cancel.add_argument("--wait", action="store_true", help="wait until it has stopped")
    _command(commands, "explain", "show where every value of a job's spec came from", _explain, on_a_job=True)
    _command(commands, "results", "list the files that a job has written", _results, on_a_job=True)


def _command(commands: Any, name: str, help: str, run: _Run, on_a_job: bool = False) -> Parser:
    parser: Parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    parser.add_argument("--root", metavar="DIR", help="folder of the jobs (default: OPENMAE_JOBS, or one of this user)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    if on_a_job:
        parser.add_argument("job", metavar="JOB", help="id, or its first characters")
    return parser


def _client(args: argparse.Namespace) -> Client:
    from openmae.jobs.client import Client

    return Client(platform=getattr(args, "platform", "local"), root=args.root)


def _submit(args: argparse.Namespace) -> None:
    from openmae.spec.yaml_reader import Reading, apply_overrides, read_file

    given = Reading()
    apply_overrides(given, args.overrides)
    file = read_file(Path(args.experiment_spec).expanduser()) if args.experiment_spec else Reading()
    for reading in (given, file):
        if reading.problems:
            raise SpecError("\n".join(f"{problem.key}: {problem.text}" for problem in reading.problems))
    missing = [name for name in args.env if name not in os.environ]
    if missing:
        raise SpecError(
            f"--env: {missing[0].partition('=')[0]} is not the name of a variable that is set.",
            "Set it before the command: everybody can read a value on the command line.",
        )
    client = _client(args)
    job = client.create_job(
        args.action,
        file.tree,
        given.tree,
        parent_job_id=args.parent,
        automl_policy=args.automl,
        gpu_count=args.gpus,
        num_nodes=args.nodes,
        env_vars={name: os.environ[name] for name in args.env},
        name=args.name,
    )
    if args.wait:
        job = client.wait(job.id)
    _show_job(args, job)
    if args.wait:
        _raise_failure(client, job)


def _raise_failure(client: Client, job: Job) -> None:
    """Raise the error whose exit code tells how an ended job failed or was interrupted."""
    if job.status == "CANCELED":
        raise Preempted if job.exit_code == Preempted.exit_code else KeyboardInterrupt
    if failure := client.get_failure_analysis(job.id):
        problem = failure.error.partition("\n  Fix: ")[0]  # the fix is the first suggestion
        raise RunError(f"Job {job.id} failed: {problem}", failure.suggestions[0])


def _list(args: argparse.Namespace) -> None:
    jobs = _client(args).list_jobs(args.status, args.action)
    rows = [
        (
            *(job.id[:8], job.name, job.action, _styled(job.status), job.created_at[:19]),
            *((job.parent_job_id or "")[:8], job.message),
        )
        for job in jobs
    ]
    heads = ("job", "name", "action", "state", "created (UTC)", "parent", "message")
    print_result([job.to_dict() for job in jobs], heads, rows, as_json=args.json)


def _status(args: argparse.Namespace) -> None:
    client = _client(args)
    job = client.get_job_status(args.job)
    failure = client.get_failure_analysis(job.id)
    if args.json:
        print(json.dumps({**job.to_dict(), "failure": asdict(failure) if failure else None}, indent=1))
        return
    _show_job(args, job)
    print_table(("at (UTC)", "state", "message"), [(t.at[:23], _styled(t.state), t.message) for t in job.transitions])
    if failure:
        rows = [("error", failure.error), ("try", "\n".join(failure.suggestions))]
        print_table(("failure", failure.category), rows)


def _logs(args: argparse.Namespace) -> None:
    from openmae.jobs.logs import read_log
    from openmae.storage import layout

    client = _client(args)
    if args.follow:
        for line in client.get_job_logs(args.job, args.tail, follow=True):
            print(line, flush=True)
    elif args.json:
        print(json.dumps({"log": client.get_job_logs(args.job, args.tail)}))
    else:
        for piece in read_log(client.store.folder(client.get_job_status(args.job).id) / layout.JOB_LOG, args.tail):
            print(piece, end="")


def _cancel(args: argparse.Namespace) -> None:
    client = _client(args)
    job = client.cancel_job(args.job)
    _show_job(args, client.wait(job.id) if args.wait else job)


def _explain(args: argparse.Namespace) -> None:
    explanation = _client(args).explain_job(args.job)
    rows = [
        (item["key"], "" if item["value"] is None else str(item["value"]), item["function"], item["why"])
        for item in explanation
    ]
    print_result(explanation, ("key", "value", "from", "why"), rows, as_json=args.json)


def _results(args: argparse.Namespace) -> None:
    found = _client(args).list_results(args.job)
    rows = [(item.kind, f"{item.size:,}", "best" if item.best else "", item.path) for item in found]
    print_result([asdict(item) for item in found], ("kind", "bytes", "", "path"), rows, as_json=args.json)


def _show_job(args: argparse.Namespace, job: Job) -> None:
    rows = [
        *(("job", job.id), ("name", job.name), ("action", job.action), ("state", _styled(job.status))),
        *(("message", job.message), ("platform", job.platform), ("parent", job.parent_job_id or "")),
        *(("created (UTC)", job.created_at[:19]), ("results", job.results_folder)),
        ("exit code", "" if job.exit_code is None else str(job.exit_code)),
        *(("notice", notice) for notice in job.notices),
    ]
    print_result(job.to_dict(), None, [row for row in rows if row[1]], as_json=args.json)


def _styled(state: str) -> Any:
    from rich.text import Text

    return Text(state, style=_STYLES.get(state, ""))
