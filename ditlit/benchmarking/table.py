"""A report as plain text."""

from collections.abc import Sequence

from ditlit.benchmarking.plan import Plan, Row
from ditlit.benchmarking.report import Report, Speed
from ditlit.errors import counted

NOTHING = "-"
UNITS = [("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)]
SPEEDS = ["", "step", "(lowest to highest)", "images/s", "FLOP/s", "of ceiling", "of datasheet", "peak memory"]
PLANNED = ["", "step", "hours", "GPU-hours", "states", "activations", "memory per GPU", ""]


def as_text(report: Report) -> str:
    """The report for a terminal."""
    parts = [heading(report), speeds(report), remarks(report)]
    if report.plan is not None:
        parts.append(planned(report, report.plan))
    if report.run_rows:
        parts.append(whole_run(report))
    return "\n\n".join(parts)


def heading(report: Report) -> str:
    machine, subject = report.machine, report.subject
    cuda = f", CUDA {machine.cuda}" if machine.cuda else ""
    batch = f"batch {subject.batch_size} on this device"
    if subject.accumulate > 1:
        batch += f" in {subject.accumulate} parts"
    if report.plan is not None:
        batch += f", of {subject.global_batch_size} on {gpus(report.plan)}"
    settings = [subject.precision, batch]
    if subject.checkpointing:
        settings += [
            "checkpointing" if subject.checkpointing is True else f"{subject.checkpointing} blocks checkpointed"
        ]
    settings += ["compiled"] if subject.compile else []
    return "\n".join(
        [
            f"{machine.device}, {machine.cpu_threads} threads; ditlit {machine.ditlit}, torch {machine.torch}{cuda}, "
            f"lightning {machine.lightning}, diffusers {machine.diffusers}",
            f"{subject.denoiser}: {number(subject.parameters)} parameters, "
            f"{number(subject.macs)} multiply-adds a forward pass",
            "; ".join(settings),
            f"medians of {report.repeats} steps after {report.warmup}",
        ]
    )


def speeds(report: Report) -> str:
    lines = [SPEEDS, ["training step"], *(speed(name, found) for name, found in report.training.items())]
    if report.sampling:
        lines += [["sampling step"], *(speed(name, found) for name, found in report.sampling.items())]
    return aligned(lines)


def speed(name: str, found: Speed) -> list[str]:
    step = found.step
    return [
        f"  {name}", seconds(step.median), f"({seconds(step.low)} to {seconds(step.high)})",
        f"{found.images_per_second:.4g}", number(found.flops), percent(found.of_ceiling), percent(found.of_datasheet),
        gigabytes(found.peak_memory),
    ]  # fmt: skip


def remarks(report: Report) -> str:
    ceiling, lines = report.ceiling, []
    if ceiling.measured is not None:
        rows, width, hidden = ceiling.product
        lines.append(f"Ceiling: {number(ceiling.measured)}FLOP/s in products of {rows} x {width} by {width} x {hidden} "
                     f"and back in {ceiling.dtype}, taking turns with the steps.")  # fmt: skip
    sheet = "not known for this device" if ceiling.datasheet is None else f"{number(ceiling.datasheet)}FLOP/s"
    lines.append(f"Datasheet: {sheet}.")
    if report.data_wait_share is None:
        lines.append(f"Data: {report.subject.data}; the wait for batches is not measured.")
    else:
        share = percent(report.data_wait_share)
        lines.append(f"Data: {report.subject.data}; the loop waits for batches for {share} of its time.")
    lines.append(f"Start: the first step takes {seconds(report.startup_seconds)} longer.")
    if report.sampling:
        sampler = report.sampler
        lines.append(
            f"Sampling: {sampler['sampler']}, {sampler['num_steps']} steps, guidance {sampler['guidance_scale']:g}, "
            f"{sampler['batch_size']} images at once in {sampler['precision']}; images/s of whole draws."
        )
    for other in (name for name in report.training if name != "ditlit"):
        pairs = (("training", report.training), ("sampling", report.sampling))
        ratios = [f"{found[other].step.median / found['ditlit'].step.median:.2f}x in {of}" for of, found in pairs]
        lines.append(f"Speed of ditlit relative to {other}: {', '.join(ratios)}.")
    if report.not_compared is not None:
        lines.append(f"Not compared with diffusers: {report.not_compared.removeprefix('--compare diffusers ')}.")
    if report.largest_batch is not None:
        lines.append(largest(report))
    return "\n".join(lines)


def largest(report: Report) -> str:
    found, size = report.largest_batch, report.subject.global_batch_size
    where = "1 GPU" if report.plan is None else gpus(report.plan)
    text = f"Largest batch: {counted(found.samples, 'sample')} at once on this device."
    if found.accumulate is None:
        return f"{text} No number of accumulated batches makes global_batch_size {size} fit {where}."
    return f"{text} For global_batch_size {size} on {where}: --trainer.accumulate_grad_batches {found.accumulate}"


def planned(report: Report, plan: Plan) -> str:
    title = f"Plan: {plan.steps:,} steps of {report.subject.global_batch_size} images on {gpus(plan)}"
    notes = [
        "Measured on this device, one setting after the other, with one GPU's share of the batch: steps, and",
        "activations (what comes and goes in a step). Arithmetic: states (weights, gradients, optimizer and moving",
        "average, by their number and type); and FSDP, with plain's step, states in equal shards, and at most plain's",
        "activations and the gathered block. Hours take scaling to be perfect, without validation and checkpoints.",
    ]
    return "\n".join([title, aligned([PLANNED, *map(planned_row, report.plan_rows)]), *notes])


def whole_run(report: Report) -> str:
    title = f"The run: {report.run_steps:,} steps of {report.subject.global_batch_size} images on GPUs like this one"
    notes = [
        "Measured on this device with each GPU's share of the batch; hours take scaling to be perfect, without",
        "validation and checkpoints.",
    ]
    return "\n".join([title, aligned([PLANNED, *map(planned_row, report.run_rows)]), *notes])


def planned_row(row: Row) -> list[str]:
    if row.why is not None:
        return [f"  {row.setting}", NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, row.why]
    remark = f"and {seconds(row.startup)} once" if row.setting == "compile" else ""
    return [
        f"  {row.setting}", seconds(row.step), f"{row.hours:,.1f}", f"{row.gpu_hours:,.1f}", gigabytes(row.states),
        gigabytes(row.activations), gigabytes(row.memory), remark,
    ]  # fmt: skip


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells in columns, the first to the left and the others to the right."""
    number = max(map(len, lines))
    full = [[*line, *[""] * (number - len(line))] for line in lines]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    rows = (
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in full
    )
    return "\n".join("  ".join(row).rstrip() for row in rows)


def gpus(plan: Plan) -> str:
    return "1 GPU" if plan.gpus == 1 else f"{plan.gpus} GPUs"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{value:.3f} s" if value >= 0.1 else f"{1000 * value:.2f} ms"


def number(value: float | None) -> str:
    """With a unit, as in 118.64 G."""
    if value is None:
        return NOTHING
    unit, size = next(((u, s) for u, s in UNITS if value >= s), ("", 1))
    return f"{value / size:.2f} {unit}" if unit else f"{value:.0f}"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"


def gigabytes(value: int | None) -> str:
    return NOTHING if value is None else f"{value / 1e9:.2f} GB"
