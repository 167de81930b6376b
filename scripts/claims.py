"""Measures two claims of section 5.2: the time that the first-order approximation saves, and parameter counts.

    python scripts/claims.py --rounds 10

The paper says that the network's computation was roughly 33 % faster without second derivatives, at nearly the same
accuracy. It also says that MAML has fewer parameters than matching networks and the meta-learner LSTM, because it has
no parameters besides the classifier's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from benchmark import choose_clock, describe_conditions, seconds_per_call
from implementations import Noise

from maml.algorithm.base import Parts
from maml.config.compose import compose
from maml.config.paths import RESULTS
from maml.config.schema import build
from maml.hardware.base import Hardware
from maml.model.base import Model
from maml.record.atomic import write_text_atomically
from maml.seeding import Stream
from maml.training.meta_gradient import MetaGradient

DEVICE, NUM_THREADS = torch.device("cpu"), 1
SHAPES = {"omniglot_5way_1shot": (28, 28, 1), "mini_imagenet_5way_1shot": (84, 84, 3)}


@dataclass(frozen=True)
class Measurement:
    """One measured quantity.

    Attributes:
        claim: name of the quantity.
        published: the paper's statement about it; empty if there is none.
        ours: our number.
        range: lowest and highest number over the rounds; empty for a count.
        shape: name of the experiment whose sizes were used.
    """

    claim: str
    published: str
    ours: str
    range: str
    shape: str


# Time.


def build_meta_gradient(experiment: str, algorithm: str) -> tuple[MetaGradient, int]:
    """Builds an experiment's meta-gradient, and returns it with the meta-batch size.

    The pixels are noise, because the time does not depend on them.
    """
    settings, _ = compose([f"+experiment={experiment}", f"algorithm={algorithm}"])
    ways, shots, query = (settings.domain[key] for key in ("num_ways", "num_shots", "num_query"))
    domain = Noise(settings.domain["_target_"], ways, shots, query)

    def make_model(in_shape: Sequence[int], out_dim: int) -> Model:
        return build(settings.model, in_shape=in_shape, out_dim=out_dim)

    hardware = Hardware("cpu", num_threads=NUM_THREADS)
    execution = hardware.choose(domain.workload, num_iterations=1, earlier={})
    hardware.apply(execution)  # switches of the process, such as our kernels
    parts = Parts(domain, make_model, build(settings.inner), build(settings.outer), Stream(0))
    return MetaGradient(build(settings.algorithm, parts=parts), execution), settings.meta_batch_size


def measure_speed_up(experiment: str, rounds: int) -> list[Measurement]:
    """Times a meta-gradient of MAML and of FOMAML in turns, so that a ratio compares times measured close together."""
    clock, _ = choose_clock(DEVICE, NUM_THREADS)
    runs = []
    for name in ("maml", "fomaml"):
        ours, count = build_meta_gradient(experiment, name)
        tasks = ours.algorithm.domain.sample_tasks(count, Stream(1))
        runs.append(lambda ours=ours, tasks=tasks: ours.gradient(ours.algorithm.theta, tasks)[0])
        runs[-1]()
    ratios = []
    for _ in range(rounds):
        second_order, first_order = (seconds_per_call(run, clock) for run in runs)
        ratios.append(second_order / first_order)
    # The paper's sentence can mean either of the two quantities. It is about MiniImagenet only.
    published = "roughly 33 %" if experiment.startswith("mini_imagenet") else ""
    readings = {
        "speed-up of FOMAML: t_maml / t_fomaml - 1": [ratio - 1 for ratio in ratios],
        "time saved by FOMAML: 1 - t_fomaml / t_maml": [1 - 1 / ratio for ratio in ratios],
    }
    return [
        Measurement(
            claim, published, f"{statistics.median(values):.1%}", f"{min(values):.1%} to {max(values):.1%}", experiment
        )
        for claim, values in readings.items()
    ]


# Parameters.


def embedding_size(in_shape: tuple[int, ...], num_filters: int) -> tuple[int, int]:
    """Returns the numbers of parameters and outputs of four modules: 3x3 convolution, batch norm, 2x2 max-pooling.

    A module has 9 * inputs * filters weights, and a bias, a scale and a shift per filter. MAML's modules have no scale.
    """
    height, width, channels = in_shape
    later_modules = 3 * (9 * num_filters + 3) * num_filters
    return (9 * channels + 3) * num_filters + later_modules, (height // 16) * (width // 16) * num_filters


def lstm_size(num_inputs: int, hidden_size: int) -> int:
    """Returns the number of parameters of an LSTM layer: four gates with weights for input and state, and one bias."""
    return 4 * hidden_size * (num_inputs + hidden_size + 1)


def matching_networks_size(in_shape: tuple[int, ...], full_context: bool) -> int:
    """Returns a lower bound on the number of parameters of matching networks (Vinyals et al. 2016).

    The embedding has 64 filters and E outputs. Full context embeddings, as in Table 1's row, add LSTMs with E units: a
    bidirectional one over the support set, and one with 2 E inputs, the query's embedding and the attention's result.
    Queries and support images share one embedding network, as in Ravi and Larochelle's code.
    """
    size, outputs = embedding_size(in_shape, 64)
    return size + full_context * (2 * lstm_size(outputs, outputs) + lstm_size(2 * outputs, outputs))


def meta_learner_lstm_size(in_shape: tuple[int, ...], num_ways: int) -> int:
    """Returns the number of parameters of the meta-learner LSTM (Ravi and Larochelle 2017): learner and meta-learner.

    The learner is a classifier with 32 filters, whose parameters are the initial cell state. All of them share the
    weights of the meta-learner: an LSTM with 20 units, whose inputs are the loss and the gradient (two numbers each),
    and an input gate and a forget gate, whose inputs are those 20 units, the parameter and the gate's last value.
    """
    size, outputs = embedding_size(in_shape, 32)
    return size + num_ways * (outputs + 1) + lstm_size(4, 20) + 2 * (20 + 2 + 1)


def parameter_counts(experiment: str, in_shape: tuple[int, ...]) -> list[Measurement]:
    """Counts meta-learned parameters: MAML's from the config, the other methods' from their published architectures."""
    meta_gradient, _ = build_meta_gradient(experiment, "maml")
    algorithm = meta_gradient.algorithm
    ours = sum(value.numel() for value in algorithm.theta.values())
    classifier = sum(value.numel() for value in algorithm.model.init(Stream(0)).values())
    on_mini_imagenet = experiment.startswith("mini_imagenet")
    counts = {
        # 32,773 is the size of the authors' published checkpoint.
        "MAML": (ours, "32,773" if on_mini_imagenet else ""),
        "MAML, beyond its classifier": (ours - classifier, "none"),
        "matching networks, embedding alone": (matching_networks_size(in_shape, False), "more than MAML"),
        "matching networks, full context": (matching_networks_size(in_shape, True), "more than MAML"),
    }
    if on_mini_imagenet:
        size = meta_learner_lstm_size(in_shape, algorithm.domain.out_dim)
        counts["meta-learner LSTM"] = (size, "more than MAML")
    return [
        Measurement(f"parameters: {name}", published, f"{count:,}", "", experiment)
        for name, (count, published) in counts.items()
    ]


# Writing.

NOTES = """
Times are those of one meta-gradient (one meta-batch, with noise for pixels). MAML and FOMAML take turns; a number is
the median over rounds, its range the lowest and the highest. The paper's 33 % is for MiniImagenet, and may mean either
of the two rows. The FOMAML rows of Table 1 show the other half of the claim, the same accuracy.

MAML's parameters are counted from the config. The other counts are lower bounds, from the published architectures:

- one module of the embedding: (9 * inputs + 3) * filters, for 3x3 weights, bias, and batch normalisation's scale and
  shift; four modules; E = outputs after four halvings, rounded down
- LSTM(inputs, units): 4 * units * (inputs + units + 1), with one bias per gate
- matching networks, full context (the rows that Table 1 quotes): 64 filters, + 2 LSTM(E, E) + LSTM(2 E, E); one
  embedding network for support and query images
- meta-learner LSTM: 32 filters, + ways * (E + 1) for the learner, whose parameters are the initial cell state,
  + LSTM(4, 20) + 2 * (20 + 2 + 1) for the meta-learner

Not counted: running averages, the second biases of LSTM implementations, and the state of optimizers. Matching networks
have no classifier layer. Their width and their context LSTMs make them larger, not additional meta-learned parts: if
both networks have 64 filters, as on Omniglot, the embedding alone is no larger than MAML's classifier.
"""


def write(out: Path, measurements: Sequence[Measurement], conditions: Mapping[str, str]) -> None:
    """Writes claims.csv, with one row per measured quantity, and claims.md."""
    out.mkdir(parents=True, exist_ok=True)
    kept = {key: conditions[key] for key in ("hardware", "commit", "command")}
    rows: list[dict[str, Any]] = [asdict(measurement) | kept for measurement in measurements]
    write_text_atomically(out / "claims.csv", pd.DataFrame(rows, dtype=object).to_csv(index=False))
    lines = ["# Claims of section 5.2", ""]
    lines += [f"- {key}: {value}" for key, value in conditions.items()]
    lines += ["", "| claim | shape | published | ours | range |", "| --- | --- | ---: | ---: | ---: |"]
    lines += [f"| {m.claim} | {m.shape} | {m.published} | {m.ours} | {m.range} |" for m in measurements]
    write_text_atomically(out / "claims.md", "\n".join(lines) + "\n" + NOTES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all claims and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each algorithm (default %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "claims", help="folder (default results/claims)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(NUM_THREADS)
    conditions = describe_conditions(DEVICE, NUM_THREADS) | {"rounds": str(options.rounds)}
    measurements = [
        measurement
        for experiment, in_shape in SHAPES.items()
        for measurement in (*measure_speed_up(experiment, options.rounds), *parameter_counts(experiment, in_shape))
    ]
    write(options.out, measurements, conditions)
    print((options.out / "claims.md").read_text())


if __name__ == "__main__":
    main()
