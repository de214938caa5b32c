"""An encoder-decoder Transformer learns to translate: dense, block-sparse or sampled.

    python -m models.translation --help
    python -m models.translation                                # numbers in words, two minutes
    python -m models.translation --train a.de a.en --valid b.de b.en --test c.de c.en
    python -m models.translation --compare --density 0.5 --fraction 0.75 ...
    python -m models.translation --translate FILE ...           # with what was trained

After Vaswani et al. 2017, "Attention Is All You Need". Every model is a line of
`translation.jsonl` as soon as it is done; `--resume` goes on where a run was stopped.
"""

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models import _cli as cli
from models import _parallel_text as texts
from models import _translation_size as sizing
from models._buckets import Batches
from models._cli import Mistake, option
from models._runs import Runs, whereabouts
from models._train import CtrlC, Stopped, output_folder
from models._translation_bench import TRANSLATED, Bench, Data, Task
from models._translation_report import report
from models._translation_size import Size
from models._translation_train import Training

ABOUT = "Trains encoder-decoder Transformers to translate: dense, block-sparse or sampled."
OUT = Path(__file__).parent.parent / "out"
DENSE = "dense"
KINDS = (DENSE, "block-sparse", "sampled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the runs depend on. Every field is a flag."""

    train: tuple[Path, ...] = option(
        (), "source and target to learn, line by line (plain, .gz, .xz); default: numbers in words"
    )
    valid: tuple[Path, ...] = option((), "source and target to choose by")
    test: tuple[Path, ...] = option((), "source and target to report")
    out: Path = option(OUT, "folder for results, pictures and checkpoints")  # noqa: RUF009
    resume: bool = option(False, "go on from the results and checkpoints in --out")
    compare: bool = option(False, "dense, block-sparse and sampled, at equal parameters and FLOPs")
    kinds: tuple[str, ...] = option(KINDS, "of models to --compare")
    tokens: str = option(
        "sentencepiece", "pieces of words, or bytes", choices=("sentencepiece", "bytes")
    )
    pieces: str = option("unigram", "which model of pieces", choices=("unigram", "bpe"))
    vocabulary: int = option(4000, "pieces at most, of both languages", least=300)
    longest: int = option(64, "tokens of a sentence to train on; longer ones are out", least=4)
    width: int = option(128, "features of the dense model", least=8)
    hidden: int = option(512, "features of its hidden layers", least=8)
    layers: int = option(2, "of the encoder, and of the decoder", least=1)
    heads: int = option(4, "of attention", least=1)
    gated: bool = option(False, "gated hidden layers (GLU)")
    activation: str = option("relu", "of hidden layers", choices=("relu", "gelu", "silu"))
    positions: str = option("rotary", "of tokens", choices=("rotary", "learned"))
    density: float = option(1.0, "stored share of the blocks of linear layers", above=0, most=1)
    block: int = option(16, "side of a block of weights", least=1)
    fraction: float = option(1.0, "sampled share of products of linear layers", above=0, most=1)
    sample_block: int = option(1, "neighbours that are sampled together", least=1)
    policy: str = option("forward", "what is sampled", choices=("forward", "backward", "weight"))
    attention: str = option(
        "full", "what a token sees of its sentence", choices=("full", "window", "longformer")
    )
    window: int = option(16, "tokens to each side that sparse attention sees", least=1)
    attention_block: int = option(16, "queries and keys of a block of attention", least=1)
    dropout: float = option(0.1, "of what each part of a layer adds", least=0, most=0.9)
    dtype: str = option(
        "float32", "to compute in; parameters are float32", choices=("float32", "bfloat16")
    )
    remat: bool = option(False, "compute again in the backward pass, to save memory")
    steps: int = option(500, "of training", least=1)
    batch_tokens: int = option(1024, "of the longer side of a batch, padding included", least=8)
    buckets: int = option(3, "shapes of batches", least=1)
    accumulate: int = option(1, "parts of a batch that are computed one after another", least=1)
    learning_rates: tuple[float, ...] = option(
        (3e-3,), "highest values; the one with the lowest validation loss is kept", above=0
    )
    schedule: str = option("cosine", "how the rate falls", choices=("cosine", "inverse_sqrt"))
    warmup: float = option(0.1, "share of the steps in which it rises", least=0, most=1)
    smoothing: float = option(0.1, "of labels", least=0, most=0.9)
    clip: float = option(1.0, "the largest norm of a gradient", above=0)
    average: float = option(0.998, "decay of averaged parameters; less at first", least=0, most=1)
    seeds: int = option(1, "runs of each model at its learning rate", least=1)
    seed: int = option(0, "the first one, of weights, patterns and batches", least=0, most=2**30)
    beam: int = option(4, "sequences that beam search keeps; beside it greedy search", least=1)
    alpha: float = option(0.6, "exponent of the length penalty", least=0)
    translate: Path | None = option(  # noqa: RUF009
        None, "do not train: translate the lines of this file with the model in --out"
    )
    measure_every: int = option(200, "steps between validation losses", least=1)
    checkpoint_every: int = option(200, "steps between checkpoints", least=1)

    def size(self, vocabulary: int) -> Size:
        """Of the model that the flags describe."""
        own: Any = {name: getattr(self, name) for name in Size._fields if hasattr(self, name)}
        return Size(**own | {"vocabulary": vocabulary, "longest": 2 * self.longest + 10})

    def training(self, rate: float) -> Training:
        own: Any = {name: getattr(self, name) for name in Training._fields if hasattr(self, name)}
        return Training(**own | {"learning_rate": rate})


def check(config: Config) -> None:
    """Raises `Mistake` for flags that do not fit each other."""
    unit = config.heads * (2 if config.positions == "rotary" else 1)
    cli.check_multiple("width", config.width, "twice --heads" if unit > config.heads else "--heads",
                       unit)  # fmt: skip
    sparse, sampled = config.density < 1, config.fraction < 1
    if sparse and sampled and not config.compare:
        raise Mistake(
            "--density and --fraction are both below 1, but layers that store some blocks are not "
            "sampled: give one of them"
        )
    if sparse:
        for name in ("width", "hidden"):
            cli.check_multiple(name, getattr(config, name), "--block", config.block)
    if sampled:
        for name in ("width", "hidden"):
            cli.check_multiple(name, getattr(config, name), "--sample_block", config.sample_block)
    if unknown := sorted(set(config.kinds) - set(KINDS)):
        raise Mistake(f"--kinds {' '.join(unknown)}: choose from {', '.join(KINDS)}")
    if config.compare and not ((sparse or "block-sparse" not in config.kinds)
                               and (sampled or "sampled" not in config.kinds)):  # fmt: skip
        raise Mistake(
            "--compare takes the stored share of block-sparse models from --density and the "
            "sampled share from --fraction: give both below 1, for example 0.5 and 0.75"
        )


def data(config: Config) -> Data:
    """The text that the flags name, in tokens."""
    corpus = texts.load(config.train, config.valid, config.test)
    kind = config.pieces if config.tokens == "sentencepiece" else "bytes"
    path = config.out / "translation-tokens.model"
    kept = config.resume or config.translate is not None
    tokens = texts.tokens(kind, config.vocabulary, corpus.train, path, resume=kept)
    source, target, out = texts.encoded(corpus.train, tokens, config.longest)
    shape = config.batch_tokens, config.buckets, config.accumulate
    train = Batches(source, target, *shape, seed=config.seed)
    size = TRANSLATED // config.beam
    valid, test = (
        Batches(*texts.encoded(part, tokens)[:2], size=size, buckets=2, seed=None)
        for part in (corpus.valid, corpus.test)
    )
    print(corpus.about)
    print(f"{len(target) + out:,} pairs, {out:,} of them with a side longer than {config.longest} "
          f"tokens or empty, which are left out; {len(train):,} batches in an epoch, "
          f"{config.steps / len(train):.1f} epochs")  # fmt: skip
    names = ("longest", "batch_tokens", "buckets", "beam", "alpha")
    about = {name: getattr(config, name) for name in names} | {"tokens": tokens.digest}
    about |= {name: getattr(corpus, name).digest for name in ("train", "valid", "test")}
    return Data(corpus, tokens, train, valid, test, about)


def contenders(config: Config, data: Data) -> dict[str, Size]:
    """What is trained, by name."""
    size = config.size(data.tokens.size)
    if not config.compare:
        return {sizing.kind(size): size}
    dense, shapes = size._replace(density=1.0, fraction=1.0), data.train.shape_counts()
    others = {
        "block-sparse": size._replace(fraction=1.0),
        "sampled": size._replace(density=1.0),
    }
    found = {DENSE: dense} if DENSE in config.kinds else {}
    costs = {"parameters": sizing.parameters, "FLOPs": lambda size: sizing.flops(size, shapes)}
    for kind, other in others.items():
        if kind not in config.kinds:
            continue
        sizes = [sizing.matched(other, cost, cost(dense)) for cost in costs.values()]
        for one in sizes:
            equal = [name for name, cost in costs.items() if sizing.near(cost(one), cost(dense))]
            found[f"{kind}, equal {' and '.join(equal)}"] = one
            if len(equal) == len(costs):  # what is stored is what is computed
                break
    return found


def experiment(bench: Bench, stop: CtrlC) -> dict[str, list[dict[str, Any]]]:
    """The results of all seeds of each model, at the learning rate that is best for it."""
    config, known, found = bench.config, {}, {}

    def result(task: Task) -> dict[str, Any]:
        if task not in known:
            known[task] = bench.result(task, stop)
        return known[task]

    for name, size in contenders(config, bench.data).items():
        scores = {
            rate: result(Task(name, size, rate, config.seed))["valid"]
            for rate in config.learning_rates
        }
        rate = min(scores, key=scores.__getitem__)
        tasks = [Task(name, size, rate, config.seed + i) for i in range(config.seeds)]
        found[name] = [
            {**result(task), "width": size.width, "hidden": size.hidden, "rate": rate}
            for task in tasks
        ]
    return found


def write(config: Config, text: Data) -> None:
    """Translates a file, without training."""
    lines = texts.lines(config.translate or Path())
    ((name, size),) = contenders(dataclasses.replace(config, compare=False), text).items()
    task = Task(name, size, config.learning_rates[0], config.seed)
    for line in Bench(config, text, None, {}).translated(task, lines):
        print(line)


def main(argv: list[str] | None = None) -> int:
    """Trains, translates, compares and reports; the exit code."""
    config = cli.parse(Config, argv, command="python -m models.translation", about=ABOUT)
    check(config)
    output_folder(config.out)
    text = data(config)
    if config.translate:
        write(config, text)
        return 0
    runs = Runs(config.out / "translation.jsonl", resume=config.resume)
    where = whereabouts(cli.shell_command("models.translation", config))
    where |= {name: version(name) for name in ("flax", "sacrebleu", "sentencepiece")}
    try:
        with CtrlC() as stop:
            found = experiment(Bench(config, text, runs, where), stop)
    except Stopped:
        return cli.stopped(
            "models.translation", config, f"Results and checkpoints are in {config.out}"
        )
    report(config, text.corpus, found, where)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
