"""``starmesh profile``: measures this machine, shows what came of it, and writes the profile.

What it measures is ``instance.measuring``'s, imported only when it runs: it loads torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from starmesh.cli import local_options
from starmesh.cli.run import fail

if TYPE_CHECKING:
    from rich.console import Console

    from starmesh.instance.measuring.steps import MeasuredSteps
    from starmesh.profiles import Profile
    from starmesh.profiles.fit import StepFit

_SUFFIX = ".toml"


def profile(
    *,
    model: local_options.Model = local_options.DEFAULT_MODEL,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.toml", help="Where it goes. (default: only shown)")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for measuring steps; longer is more exact.")] = 75.0,
    device: local_options.Device = "cpu",
    dtype: local_options.Dtype = "float32",
    threads: local_options.Threads = 1,
    kv_memory_mib: local_options.KvMemoryMib = 512,
    block_tokens: Annotated[int, typer.Option(min=1, max=256, help="Tokens of a KV block.")] = 16,
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 64,
    max_step_tokens: Annotated[int, typer.Option(min=1, help="Tokens computed in a step.")] = 512,
) -> None:
    """Measure what steps and transfers cost on this machine, for simulations and for rescheduling (--profile FILE).

    Runs the engine on the model, on otherwise idle cores if the numbers are to mean something.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from starmesh.instance.measuring import MeasuringFailed

    if out is not None and (out.suffix != _SUFFIX or not out.absolute().parent.is_dir()):
        raise typer.BadParameter(f"must be a {_SUFFIX} file in a directory that exists", param_hint="--out")
    if max_sequences > max_step_tokens:
        raise typer.BadParameter(f"must be at least --max-sequences, {max_sequences}", param_hint="--max-step-tokens")
    directory = local_options.model_directory(model)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("loading the model", total=1.0)
            from starmesh.instance.measuring.measure import MeasureSettings, measure_profile

            measured = measure_profile(
                MeasureSettings(
                    model_dir=directory,
                    device=device,
                    dtype=dtype,
                    threads=threads,
                    kv_memory_mib=kv_memory_mib,
                    block_tokens=block_tokens,
                    max_sequences=max_sequences,
                    max_step_tokens=max_step_tokens,
                    budget_s=seconds,
                ),
                name=out.stem if out is not None else "measured",
                command=f"starmesh profile --model {model} --seconds {seconds:g} --device {device} "
                f"--dtype {dtype} --threads {threads} --kv-memory-mib {kv_memory_mib}",
                on_progress=lambda what, part: progress.update(task, description=what, completed=part),
            )
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed; measuring needs `pip install starmesh[engine]`")
    except (MeasuringFailed, ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    show_steps(console, measured.steps, measured.fit)
    show_profile(console, measured.profile)
    if out is not None:
        from starmesh.profiles import write_profile

        try:
            write_profile(measured.profile, out)
        except OSError as error:
            fail(f"cannot write {out}: {error.strerror}; name another file with --out")
        console.print(f"written to {out}; use it with `starmesh simulate --profile {out}`", soft_wrap=True)


def show_steps(console: Console, steps: MeasuredSteps, fit: StepFit) -> None:
    """Print each kind of step: measured, and how far off the fitted model is."""
    from rich.table import Table

    table = Table(box=None)
    for column in ("step", "measured", "model", "error"):
        table.add_column(column, justify="left" if column == "step" else "right", no_wrap=True)
    for step, error in zip(steps.times, fit.errors, strict=True):
        if step.prefill_tokens:
            start = (step.prefill_pairs - step.prefill_tokens * (step.prefill_tokens + 1) // 2) // step.prefill_tokens
            kind = f"{step.prefill_tokens} tokens of a prompt after {start:,}"
        else:
            many = "sequence" if step.sequences == 1 else "sequences"
            kind = f"{step.sequences} {many} of {step.resident_tokens // step.sequences:,} tokens"
        modelled_s = step.seconds * (1 + error)
        table.add_row(kind, f"{step.seconds * 1e3:.2f} ms", f"{modelled_s * 1e3:.2f} ms", f"{error:+.0%}")
    console.print(table)
    console.print(
        f"median error {fit.median_error:.1%}, largest {max(map(abs, fit.errors)):.0%}; rounds: {steps.rounds}; "
        f"steps of one kind vary by {steps.noise:.1%}"
    )


def show_profile(console: Console, profile: Profile) -> None:
    """Print what a profile says, in units for people."""
    cost = profile.cost
    console.print(
        f"a decode step: {cost.step_base_s * 1e3:.3g} ms, {cost.step_sequence_s * 1e6:.3g} µs for each sequence and "
        f"{cost.step_token_s * 1e9:.3g} ns for each resident token\n"
        f"a prompt: {cost.prefill_token_s * 1e6:.3g} µs a token and {cost.prefill_pair_s * 1e9:.3g} ns for each token "
        f"that it attends to\n"
        f"a transfer: {cost.transfer_setup_s * 1e3:.3g} ms and {cost.transfer_bytes_per_s / 1e9:.3g} GB/s between two "
        f"processes of this machine\n"
        f"KV memory: {profile.kv_tokens:,} tokens of {profile.layout.token_bytes:,} bytes",
        soft_wrap=True,
    )
