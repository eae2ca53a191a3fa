"""Submit a training or an evaluation to a SLURM cluster: check it, write its script, hand it to `sbatch`."""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

import dinov2
from dinov2.run import checks, local, sweep
from dinov2.run.follow import follow
from dinov2.run.job_folder import Run, write_config, write_record
from dinov2.run.script import JOB_FOLDER, JOB_ID, PACKAGE_ROOT, render
from dinov2.run.task import SubmissionError, Task
from dinov2.utils import cluster

DEFAULT_GPUS = 8  # of a node about which nothing is known; as in DINOv2
BIG_GPUS = "DINOV2_BIG_GPU_CONSTRAINT"  # a site's own name for its large GPUs
EXIT_USAGE = 2

# `dinov2 submit NAME ...`
TASKS = {
    "train": "dinov2.run.train.train",
    "knn": "dinov2.run.eval.knn",
    "linear": "dinov2.run.eval.linear",
    "log_regression": "dinov2.run.eval.log_regression",
    "evaluate": "dinov2.run.eval.cross_validation",
}


def get_args_parser(
    description: str | None = None, parents: list[argparse.ArgumentParser] | None = None, add_help: bool = True
) -> argparse.ArgumentParser:
    """Return the launcher's own options."""
    parser = argparse.ArgumentParser(
        description=description, parents=parents or [], add_help=add_help, allow_abbrev=False
    )
    group = parser.add_argument_group("SLURM")
    add = group.add_argument
    add("--ngpus", "--gpus", "--gpus-per-node", type=int, help="GPUs per node, one process each (default: all; 0: CPU)")
    add("--nodes", "--nnodes", type=int, default=1, help="number of nodes (default: %(default)s)")
    add("--timeout", type=int, default=2800, help="time limit in minutes (default: %(default)s)")
    add("--time", help="time limit as SLURM writes it, such as 2-00:00:00, in place of --timeout")
    add(
        "--partition",
        default=cluster.get_slurm_partition(),
        help="partition (default: $SBATCH_PARTITION, or the cluster's)",
    )
    add("--use-big-gpus", action="store_true", help=f"only nodes with the feature that ${BIG_GPUS} names")
    add("--constraint", help="only nodes with these features")
    add("--comment", default="", help="a comment that SLURM keeps with the job")
    add("--exclude", default="", help="nodes not to use")
    add("--nodelist", default="", help="nodes to use")
    add("--qos", help="quality of service")
    add("--account", help="account to charge")
    add("--cpus-per-task", type=int, help="CPUs per process (default: its GPU's share of the node)")
    add("--mem-per-gpu", help="main memory per GPU with its unit, such as 30G (default: the cluster's)")
    add(
        "--signal-delay",
        type=int,
        default=120,
        help="seconds before the time limit at which a training writes its checkpoint (default: %(default)s)",
    )
    group = parser.add_argument_group("launcher")
    add = group.add_argument
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="one run for each value of a config key, as a job array; may be repeated for every combination",
    )
    add("--dry-run", action="store_true", help="print the sbatch script and the resolved config; submit nothing")
    add("--local", action="store_true", help="run on this machine, now, without SLURM")
    add("--wait", action="store_true", help="follow the log until the job ends, and exit as it does")
    return parser


def parse_arguments(task_class: type[Task], argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse options of the launcher and of the program, in any order; overrides may stand anywhere."""
    launcher = get_args_parser(add_help=False)
    own, rest = launcher.parse_known_args(argv)
    both = argparse.ArgumentParser(
        description=task_class.__doc__,
        parents=[task_class.get_args_parser(add_help=False), launcher],
        allow_abbrev=False,
    )
    return both.parse_args(rest, namespace=own)


def submit_jobs(task_class: type[Task], args: argparse.Namespace, name: str) -> int:
    """Check the job, and submit, run or show it as the arguments say.

    Args:
        task_class: what to run.
        args: of the program and of this launcher, see `parse_arguments`.
        name: of the job.

    Returns:
        The exit code of the launcher: with `--wait` or `--local` that of the job, otherwise 0.

    Raises:
        SubmissionError: the job cannot run as asked for.
        ConfigError: the config has problems.
    """
    if not args.output_dir:
        raise SubmissionError("--output-dir is missing: the folder for checkpoints, logs and the sbatch script")
    output_dir = os.path.abspath(os.path.expanduser(args.output_dir))
    task = task_class(args)
    overrides = sweep.expand(args.sweep) or {"": []}
    runs = [Run(name, task.config(os.path.join(output_dir, name), opts)) for name, opts in overrides.items()]
    _check_paths(task, runs, output_dir)
    if args.local:
        return _run_locally(task, runs, output_dir)

    partitions = _cluster_partitions(args)
    script = render(
        task.program,
        task.arguments(),
        parameters=_parameters(args, name, partitions, resumes=task.resume_code is not None, n_runs=len(runs)),
        output_dir=output_dir,
        runs=[run.name for run in runs] if args.sweep else (),
        takes_config=task.takes_config,
        first_arguments=task.first_arguments(),
        resume_code=task.resume_code,
        title=f"{name}, dinov2 {dinov2.__version__}",
        command_line=sys.orig_argv,
    )
    if args.dry_run:
        _show(script, runs)
        return 0
    _warn_of_local_paths(task, runs, output_dir, partitions)
    job_id, folders = _submit(script, runs, output_dir, name)
    _report(job_id, folders, output_dir.replace(JOB_ID, job_id))
    logs = {run.name: folder / "task_0.log" for run, folder in zip(runs, folders)}
    return follow(job_id, logs) if args.wait else 0


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_paths(task: Task, runs: Sequence[Run], output_dir: str) -> None:
    data = {path: meaning for run in runs for path, meaning in task.data_paths(run.config).items()}
    problems = list(checks.missing_paths(data))
    if problem := checks.folder_problem(Path(output_dir.split(JOB_ID)[0])):
        problems.append(problem)
    _refuse(problems)


def _cluster_partitions(args: argparse.Namespace) -> dict[str, cluster.Partition] | None:
    if cluster.get_cluster_type() is not cluster.ClusterType.SLURM:
        if args.dry_run:
            _warn("no sbatch on the PATH: partition and resources are not checked")
            return None
        raise SubmissionError(
            "no sbatch on the PATH: this machine submits to no SLURM cluster. Log in to one that does, or run here "
            "with --local (or torchrun --standalone --nproc_per_node=GPUS dinov2/train/train.py ...)"
        )
    partitions = cluster.query_partitions()
    if partitions is None:
        _warn("sinfo does not answer: partition and resources are not checked")
    return partitions


def _parameters(
    args: argparse.Namespace,
    name: str,
    partitions: Mapping[str, cluster.Partition] | None,
    *,
    resumes: bool,
    n_runs: int,
) -> dict[str, int | str]:
    """Return what to ask of SLURM, after a check of what can be had."""
    known = partitions or {}
    partition = args.partition or next((each.name for each in known.values() if each.default), None)
    gpus = args.ngpus if args.ngpus is not None else _gpus_of_a_node(known, partition)
    minutes = args.timeout if args.time is None else cluster.parse_time(args.time)
    limit = checks.time_limit(known, partition)
    if limit is not None and (minutes is None or minutes > limit):
        note = "and resumed when it is over" if resumes else "and ends there"
        _warn(f"the job is given {limit} minutes, the limit of partition {partition}, {note}")
        minutes = limit

    problems = []
    if args.nodes < 1 or gpus < 0:
        problems.append(f"--nodes {args.nodes} --ngpus {gpus}: at least one node, and no negative number of GPUs")
    elif partitions is not None:
        problems += checks.resource_problems(
            partitions, partition, nodes=args.nodes, gpus=gpus, cpus_per_task=args.cpus_per_task
        )
    if resumes and minutes is not None and 60 * minutes <= args.signal_delay + 60:
        problems.append(
            f"a time limit of {minutes} min leaves no time to train: SLURM may signal its end as early as "
            f"{args.signal_delay + 60} s before it; give more time, or less --signal-delay"
        )
    if args.use_big_gpus and args.constraint:
        problems.append("--use-big-gpus and --constraint both choose the nodes: give one")
    elif args.use_big_gpus and not os.environ.get(BIG_GPUS):
        problems.append(
            f"--use-big-gpus: set {BIG_GPUS} to a feature of your cluster's nodes (see sinfo -o '%N %f %G')"
        )
    if args.mem_per_gpu and not gpus:
        problems.append("--mem-per-gpu needs GPUs: --ngpus is 0")
    _refuse(problems)

    return cluster.get_slurm_executor_parameters(
        nodes=args.nodes,
        num_gpus_per_node=gpus,
        mem_per_gpu=args.mem_per_gpu,
        cpus_per_task=args.cpus_per_task or checks.shared_cpus(known, partition, gpus),
        job_name=name,
        partition=partition,
        timeout_min=minutes,
        qos=args.qos,
        account=args.account,
        constraint=os.environ[BIG_GPUS] if args.use_big_gpus else args.constraint,
        nodelist=args.nodelist or None,
        exclude=args.exclude or None,
        comment=args.comment or None,
        signal=f"USR2@{args.signal_delay}" if resumes else None,
        array=f"0-{n_runs - 1}" if args.sweep else None,
    )


def _gpus_of_a_node(partitions: Mapping[str, cluster.Partition], partition: str | None) -> int:
    names = partition.split(",") if partition else list(partitions)
    counts = [node.gpus for name in names if name in partitions for node in partitions[name].nodes if node.gpus]
    return min(counts, default=0 if partitions else DEFAULT_GPUS)


def _warn_of_local_paths(
    task: Task, runs: Sequence[Run], output_dir: str, partitions: Mapping[str, cluster.Partition] | None
) -> None:
    data = [path for run in runs for path in task.data_paths(run.config)]
    nodes = sorted({node.name for partition in (partitions or {}).values() for node in partition.nodes})
    for warning in checks.locality_warnings([output_dir, sys.prefix, str(PACKAGE_ROOT), *data], nodes):
        _warn(warning)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise SubmissionError("\n".join(problems))


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


# --- submission -----------------------------------------------------------------------------------------------------


def _submit(script: str, runs: Sequence[Run], output_dir: str, name: str) -> tuple[str, list[Path]]:
    """Submit the script and write the job's folders, whose names may hold its id, before it may start."""
    command = ["sbatch", "--parsable", "--hold"]
    answer = subprocess.run(command, input=script, capture_output=True, text=True, env=_environment(script))
    if answer.returncode:
        raise SubmissionError(f"sbatch refused the job: {answer.stderr.strip()}")
    job_id = answer.stdout.strip().split(";")[0]
    try:
        root = output_dir.replace(JOB_ID, job_id)
        folders = [run.folder(root) / JOB_FOLDER / job_id for run in runs]
        for folder in (Path(root, JOB_FOLDER, job_id), *folders):
            folder.mkdir(parents=True, exist_ok=True)
        for run, folder in zip(runs, folders):
            if run.config is not None:
                write_config(folder, run.config, job_id)
        Path(root, JOB_FOLDER, job_id, "submit.sh").write_text(script)
        write_record(Path(root, JOB_FOLDER, job_id), job_id, name, [run.folder(root) for run in runs])
        subprocess.run(["scontrol", "release", job_id], check=True, capture_output=True, text=True)
    except BaseException as error:
        subprocess.run(["scancel", job_id], check=False)
        if isinstance(error, subprocess.CalledProcessError):
            raise SubmissionError(f"the job {job_id} could not be released: {error.stderr.strip()}") from error
        raise
    return job_id, folders


def _environment(script: str) -> dict[str, str]:
    """Return the user's environment for the job.

    Left out are the variables of an allocation or a launcher around us, which would be taken for the job's own, and
    those SBATCH variables that would silently win over an option in the script.
    """
    chosen = {line.split()[1].split("=")[0].strip("-") for line in script.splitlines() if line.startswith("#SBATCH")}
    overruled = {f"SBATCH_{name.replace('-', '_').upper()}" for name in chosen} | {
        "SBATCH_TIMELIMIT",
        "SBATCH_NO_REQUEUE",
    }
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    ours = {"SLURM_CONF", "SLURM_CLUSTERS"}
    return {
        key: value
        for key, value in os.environ.items()
        if key in ours or not (key.startswith(("SLURM_", "SRUN_")) or key in overruled | launcher)
    }


def _report(job_id: str, folders: Sequence[Path], output_dir: str) -> None:
    own = Path(output_dir, JOB_FOLDER, job_id)
    more = f" (and {len(folders) - 1} more)" if len(folders) > 1 else ""
    print(f"submitted job {job_id}")
    print(f"  output   {output_dir}")
    print(f"  script   {own / 'submit.sh'}")
    print(f"  log      {folders[0] / 'task_0.log'}{more}")
    print(f"  state    squeue -j {job_id}")
    print(f"  stop     scancel {job_id}")


def _show(script: str, runs: Sequence[Run]) -> None:
    print(script.rstrip())
    for run in runs:
        if run.config is not None:
            print(f"\n# --- config.yaml{f' of {run.name}' if run.name else ''} ---")
            print(OmegaConf.to_yaml(run.config).rstrip())


def _run_locally(task: Task, runs: Sequence[Run], output_dir: str) -> int:
    if task.args.dry_run:
        _show(f"# on this machine with {local.count_processes(task)} process(es)", runs)
        return 0
    return max(local.execute(local.prepare(task, run, output_dir)) for run in runs)


# --- commands -------------------------------------------------------------------------------------------------------


def run_command(task_class: type[Task], name: str, argv: Sequence[str] | None = None) -> int:
    """Parse, submit, and turn what the user can change into one message and exit code 2."""
    args = parse_arguments(task_class, argv)
    try:
        return submit_jobs(task_class, args, name=name)
    except (SubmissionError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dinov2 submit NAME ...`."""
    names = ", ".join(TASKS)
    parser = argparse.ArgumentParser(prog="dinov2 submit", description=f"Submit a task to SLURM: {names}.")
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=names)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the task; TASK --help shows them")
    args = parser.parse_args(argv)
    return importlib.import_module(TASKS[args.task]).main(args.arguments)


if __name__ == "__main__":
    sys.exit(main())
